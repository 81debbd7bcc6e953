"""CPUs with matrix units (AMX), for which torch has attention of its own: a short measurement says whose is faster."""

import time
from collections.abc import Callable
from functools import cache
from threading import Lock

import torch
from torch import Tensor

from rocketkv import ops

_SIZES = (8, 2, 1024)  # query heads, KV heads and tokens of the measurement, which takes a few tenths of a second
_ROUNDS = 3
_MEASURING = Lock()


def prefer_torch(attend: Callable[..., Tensor], dtype: torch.dtype, head_dim: int) -> str | None:
    """Say why torch's attention is to be taken for prompts instead of `attend`; None: it is not.

    The answer is measured once in a process, and only on CPUs with AMX: without it our kernels are faster.

    Args:
        attend: our kernel, with the arguments of `ops.prefill_densely`.
        dtype: the dtype of queries, keys and values.
        head_dim: channels of a key.
    """
    if dtype == torch.float32 or not torch.cpu._is_amx_tile_supported():
        return None
    with _MEASURING:  # two measurements at a time would slow each other down and might not agree
        return _measure(attend, dtype, head_dim)


@cache
def _measure(attend: Callable[..., Tensor], dtype: torch.dtype, head_dim: int) -> str | None:
    """Time both attentions; see `prefer_torch`."""
    num_heads, num_kv_heads, num_tokens = _SIZES
    query = torch.zeros(1, num_heads, num_tokens, head_dim, dtype=dtype, device="cpu")
    keys = query[:, :num_kv_heads]
    own_ms, torch_ms = (_best_ms(each, query, keys) for each in (attend, ops.prefill_densely))
    if own_ms <= torch_ms:
        return None
    return f"torch's attention of {num_tokens} tokens takes {torch_ms:.1f} ms on this CPU's AMX, ours {own_ms:.1f} ms"


def _best_ms(attend: Callable[..., Tensor], query: Tensor, keys: Tensor) -> float:
    """Return the milliseconds of the fastest of some calls, after one that does not count."""
    times = []
    for _ in range(_ROUNDS + 1):
        start = time.perf_counter()
        attend(query, keys, keys, scale=1.0)
        times.append(time.perf_counter() - start)
    return 1000 * min(times[1:])
