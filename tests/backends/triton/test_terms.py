"""Attention sinks and soft caps in the GPU kernels, against the reference."""

import pytest
import torch

from inputs import make_inputs, poisoned
from layers import check_steps, make_layer
from rocketkv import ops
from rocketkv.backends import Spec, triton
from rocketkv.ops import LogitTerms

if (reason := triton.decline(Spec("cpu", torch.float32, 64))) is not None:
    pytest.skip(f"{reason}; `make test-triton` runs these in the interpreter", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # masked lanes compute, too
every_term = pytest.mark.parametrize(("has_sinks", "softcap"), [(True, None), (False, 1.5), (True, 0.7)])


@pytest.mark.parametrize("scoring", triton.SCORINGS)
@pytest.mark.parametrize(
    ("group", "head_dim", "dtype", "has_sinks", "softcap"),
    [
        (3, 80, torch.float32, True, 0.7),
        (1, 64, torch.bfloat16, True, None),
        (17, 20, torch.float16, False, 1.5),
    ],
)
def test_steps_of_ragged_rows(
    seeded: torch.Generator,
    scoring: str,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    has_sinks: bool,
    softcap: float | None,
) -> None:
    terms = LogitTerms(3 * torch.randn(2 * group, generator=seeded) if has_sinks else None, softcap)
    options = {"group": group, "head_dim": head_dim, "dtype": dtype, "num_channels": head_dim // 3, "recents": 3}
    layer = make_layer(seeded, scoring, [[150, 3], [23, 90]], archived=group == 3, terms=terms, **options)
    check_steps(triton, layer, seeded, steps=1)


@every_term
@pytest.mark.parametrize("by_peak", [False, True])
def test_scores_of_the_window(seeded: torch.Generator, by_peak: bool, has_sinks: bool, softcap: float | None) -> None:
    x = make_inputs(seeded, 2, 6, 2, 150, 20)
    lengths, num_queries = torch.tensor([[150, 100], [9, 9]]), torch.tensor([16, 5])
    terms = LogitTerms(3 * torch.randn(6, generator=seeded) if has_sinks else None, softcap)
    given = {"lengths": lengths, "num_queries": num_queries, "scale": 0.2, "terms": terms, "by_peak": by_peak}
    keys = poisoned(x.key, lengths)
    ours, plain = (score(x.query[:, :, -16:], keys, **given) for score in (triton.score_window, ops.score_window))
    torch.testing.assert_close(ours, plain)
