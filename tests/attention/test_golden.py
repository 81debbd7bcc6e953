"""Tests of numbers that must not change: small cases of our own (tests/golden) and the published ones.

The published cases are not part of the repository; a README lies beside them.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from golden import make
from inputs import Inputs
from rocketkv import Budget, LayerCache, RocketKVConfig
from rocketkv.ops import topk_mask
from rocketkv.paper import split_budget

pytestmark = pytest.mark.usefixtures("decoded_by")
SINGLE = (0, 1, 4, 5, 8, 9, 12, 13, 16, 17)
MULTI = (0, 1)


def load(shared: Path, kind: str, index: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    folder = shared / "golden"
    case = next(c for c in json.loads((folder / f"{kind}.json").read_text()) if c["index"] == index)
    arrays = np.load(folder / f"{kind}.npz")
    return case, {name: arrays[name] for name in arrays.files}


def golden_inputs(shared: Path, case: dict[str, Any], prompt_len: int, new_tokens: int, check: np.ndarray) -> Inputs:
    folder = str(shared / "golden")
    namespace: dict[str, Any] = {}
    exec(Path(folder, "inputs.py").read_text(), namespace)  # this is a script beside the vectors, not a package
    arrays = namespace["inputs"](
        case["seed"], case["num_heads"], case["num_kv_heads"], case["head_dim"], prompt_len, new_tokens
    )
    np.testing.assert_allclose([x.sum() for x in arrays], check, rtol=1e-5)
    return Inputs(*map(torch.from_numpy, arrays))


@pytest.fixture
def published_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let stage 1 choose among equal scores as the published vectors have it: by `torch.topk` of each row and head.

    Our own choice differs from that one among equal scores only.
    """

    def choose(scores: torch.Tensor, *, candidates: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        mask, ours = (
            torch.zeros_like(scores, dtype=torch.bool),
            topk_mask(scores, candidates=candidates, num_tokens=num_tokens),
        )
        for row, head in np.ndindex(*candidates.shape):
            own = scores[row, head, : int(candidates[row, head])]
            best = own.topk(min(int(num_tokens[row]), len(own)), sorted=False).indices
            mask[row, head, best] = True
            marked = scores[row, head, ours[row, head]]
            assert torch.equal(own[best].sort().values, marked.sort().values)
        return mask

    monkeypatch.setattr("rocketkv.eviction.snapkv.topk_mask", choose)


def relative_error(output: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(output.numpy() - expected) / np.linalg.norm(expected))


@pytest.mark.usefixtures("published_ties")
@pytest.mark.parametrize("index", SINGLE)
def test_single_turn(shared: Path, index: int) -> None:
    spec, arrays = load(shared, "single_turn", index)
    case = spec["case"]
    inputs = golden_inputs(shared, case, case["prompt_len"], case["new_tokens"], arrays[f"check_{index}"])
    assert split_budget(
        case["prompt_len"], case["token_budget"], case["head_dim"], new_tokens=case["new_tokens"]
    ) == Budget(spec["prompt_budget"], spec["page_size"], spec["channels"], spec["top_k"])

    cache = LayerCache(
        RocketKVConfig.paper(
            case["token_budget"],
            new_tokens=case["new_tokens"],
            window_size=case["window_size"],
            kernel_size=case["kernel_size"],
            mode="multi_turn" if case["multi_turn"] else "single_turn",
        )
    )
    cache.prefill(*inputs.part(0, case["prompt_len"]))
    np.testing.assert_array_equal(cache.positions[0], arrays[f"kept_{index}"])
    for step in range(case["new_tokens"]):
        at = case["prompt_len"] + step
        output = cache.decode(*inputs.part(at, at + 1))[0, :, 0]
        error = relative_error(output, arrays[f"out_{index}"][step])
        assert error <= (1e-5 if arrays[f"exact_{index}"][step] else 0.3), (step, error)


@pytest.mark.usefixtures("published_ties")
@pytest.mark.parametrize("index", MULTI)
def test_multi_turn(shared: Path, index: int) -> None:
    spec, arrays = load(shared, "multi_turn", index)
    case = spec["case"]
    inputs = golden_inputs(shared, case, sum(map(sum, case["turns"])), 0, arrays[f"check_{index}"])
    cache = LayerCache(
        RocketKVConfig.paper(
            case["token_budget"],
            window_size=case["window_size"],
            kernel_size=case["kernel_size"],
            mode="multi_turn",
            budget=Budget(spec["prompt_budget"], spec["page_size"], spec["channels"], spec["top_k"]),
        )
    )
    at = 0
    for turn, (prompt_len, new_tokens) in enumerate(case["turns"]):
        expected = arrays[f"out_{index}_turn{turn}"]
        exact = arrays[f"exact_{index}_turn{turn}"]
        output = cache.prefill(*inputs.part(at, at + prompt_len))
        at += prompt_len
        np.testing.assert_array_equal(cache.positions[0], arrays[f"kept_{index}_turn{turn}"])
        assert relative_error(output[0, :, -1], expected[0]) <= 1e-5
        exact = exact[-new_tokens:]  # one flag per decode step
        for step in range(new_tokens):
            error = relative_error(cache.decode(*inputs.part(at, at + 1))[0, :, 0], expected[1 + step])
            at += 1
            assert error <= (1e-5 if exact[step] else 0.3), (turn, step, error)


@pytest.mark.parametrize("case", range(len(make.CASES)))
def test_our_own_cases(case: int) -> None:
    expected = np.load(make.FILE)
    found = make.run(case)
    assert set(found) == {name for name in expected.files if name.split("_")[1] == str(case)}
    for name, array in found.items():
        if name.startswith("kept"):
            np.testing.assert_array_equal(array, expected[name])
        else:
            assert relative_error(array, expected[name]) <= 1e-5
