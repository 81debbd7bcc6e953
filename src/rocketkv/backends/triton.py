"""The GPU backend: kernels in Triton, compiled for the device when they are first used.

A decode step (triton_kernels.py), and what a prefill leaves to it (triton_prefill.py): stage 1's scores, the indices.

With TRITON_INTERPRET=1 the kernels run on the CPU, slowly: that is how they are tested where there is no GPU.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rocketkv.backends.base import LayerTensors, Scoring, decline_numbers
from rocketkv.ops import GROUP, LowBitKeys, PageBounds

NAME = "triton"
DEVICES: tuple[str, ...] = ("cuda",)  # torch calls AMD's devices so, too
SCORINGS: tuple[Scoring, ...] = tuple(Scoring)
TILE_BYTES = 1 << 14  # of what a program reads at once, so that registers hold it
PART = 64  # units scored by a program, at most
TILE = 32  # tokens attended to at once, at most
BLOCK = 512  # units looked at together while choosing
WAYS_BITS = 4  # bits of the cut found in one pass over the scores
LEAST_DOT = 16  # rows of a matrix product: fewer query heads are filled up
LEAST_WINDOW_PART = 1024  # tokens that a program scores for stage 1, about
PROGRAMS_PER_CORE = 2  # of attention, aimed at where there are fewer heads than that
CORES_OF_CPU = 4  # of the interpreter, which runs one program after the other: few pieces, but several
PREFILL_OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}


def decline(tokens: Tensor, kv_dtype: str = "auto") -> str | None:
    """Why tokens like these, `[B, H, S, D]`, stored as `kv_dtype` says, are not for this backend; None: they are."""
    kernels = _load()
    if isinstance(kernels, str):
        return kernels
    wanted = "cpu" if kernels.INTERPRETED else "cuda"
    if tokens.device.type != wanted:
        hint = " under TRITON_INTERPRET=1" if kernels.INTERPRETED else ""
        return f"it runs on {wanted}{hint}, not on {tokens.device.type}"
    if reason := decline_numbers(tokens):
        return reason
    if kv_dtype == "int8" and tokens.dtype == torch.float32:
        return (
            "it takes keys and values in 8 bits for 16-bit dtypes only"  # with float32 they would not fit in registers
        )
    return None


def bind(layer: LayerTensors) -> "TritonStep":
    """A step over this storage."""
    return TritonStep(layer)


@dataclass(frozen=True)
class Launch:
    """A kernel, the programs it is started with, and all arguments but those of the token."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    device: torch.device

    @property
    def options(self) -> dict[str, Any]:
        """How it is compiled."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": True}

    def __call__(self, **token: Tensor | None) -> None:
        """Start it for a token."""
        with _current(self.device):
            self.kernel[self.grid](**token, **self.arguments, **self.options)


class TritonStep:
    """One decode step as two or three launches; see `FusedStep`.

    It neither waits for the device nor lets the host's work depend on what is there, so it should bear
    capture in a CUDA graph; no GPU has tried it.
    """

    def __init__(self, layer: LayerTensors) -> None:
        kernels = _load()
        assert not isinstance(kernels, str)
        batch, num_kv_heads, token_capacity, head_dim = layer.keys.shape
        num_heads, group = batch * num_kv_heads, layer.num_heads // num_kv_heads
        position_capacity = layer.positions.shape[2]
        scoring = layer.scoring if layer.index or layer.scoring == Scoring.EXACT else Scoring.DENSE
        bounds, page_size, spread = layer.pages or (None, None, None)
        codes, ranges, open_keys, spread = layer.lowbit or (None, None, None, spread)
        head_dim_padded = max(LEAST_DOT, _power_of_two(head_dim))
        rows = TILE_BYTES // (head_dim_padded * layer.dtype.itemsize)
        width = min(head_dim_padded, TILE_BYTES // (2 * GROUP * layer.dtype.itemsize))  # half a tile of low-bit keys
        part, tile = GROUP if scoring == Scoring.LOWBIT else min(PART, rows), min(TILE, rows)
        num_units = 0 if scoring == Scoring.DENSE else position_capacity  # pages are as many at most
        num_parts = -(-num_units // part)
        selected = 0 if scoring == Scoring.DENSE else min(int(layer.top_k.max()), position_capacity)
        dense = (
            position_capacity if scoring == Scoring.DENSE else min(int(layer.dense_lengths.max()), position_capacity)
        )
        programs = PROGRAMS_PER_CORE * _num_cores(layer.keys.device)
        num_pieces = min(-(-max(dense, selected) // tile), max(1, programs // num_heads))

        def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return layer.keys.new_zeros((num_heads, *shape), dtype=dtype)

        self._read_bytes = scratch(dtype=torch.int64)
        storage = {
            "keys": layer.keys,
            "values": layer.values,
            "exponents": layer.exponents,
            "positions": layer.positions,
            "archive_lengths": layer.archive_lengths,
            "seen": layer.seen,
            "scale": layer.scale,
            "token_capacity": token_capacity,
            "position_capacity": position_capacity,
        }
        plan = {
            "lengths": layer.lengths,
            "dense_lengths": layer.dense_lengths,
            "page_size": page_size,
        }
        channels = {"num_channels": layer.num_channels}
        scores = {
            "logits": scratch(group, num_units),
            "partials": scratch(num_parts, 2, group),
            "num_units": num_units,
            "num_parts": num_parts,
        }
        chosen = {"chosen": scratch(selected, dtype=torch.int32), "most_chosen": selected}
        dims = {"HKV": num_kv_heads, "G": group}
        index = {
            "bounds": bounds,
            "ranges": ranges,
            "open_keys": open_keys,
            "spread": spread,
            "num_blocks": layer.index[0].shape[2] if layer.index else 0,
        }
        row_dims = {"D": head_dim, "NUM_ROWS": 0 if bounds is None else bounds.shape[3], "D_PAD": head_dim_padded}
        tile_dims = {"SCORING": str(scoring), "G_PAD": max(LEAST_DOT, _power_of_two(group))} | row_dims
        self._append_and_score = Launch(
            kernels.append_and_score,
            (num_heads, max(1, num_parts)),
            storage
            | plan
            | channels
            | scores
            | dims
            | tile_dims
            | index
            | {"codes": codes, "sizes": scratch(head_dim_padded), "PART": part, "WIDTH": width},
            num_warps=4,
            device=layer.keys.device,
        )
        self._choose = None
        if scoring != Scoring.DENSE:
            pins = {"top_k": layer.top_k, "sinks": layer.sinks, "recents": layer.recents}
            sizes = {"PART": part, "BLOCK": BLOCK, "WAYS_BITS": WAYS_BITS, "G_POW": _power_of_two(group)}
            arguments = plan | pins | scores | chosen | dims | row_dims | sizes | index
            arguments |= {"scores": scratch(num_units)}
            self._choose = Launch(kernels.choose, (num_heads,), arguments, num_warps=8, device=layer.keys.device)
        self._attend = Launch(
            kernels.attend,
            (num_heads, num_pieces),
            storage
            | plan
            | channels
            | chosen
            | dims
            | tile_dims
            | {
                "top_k": layer.top_k,
                "pieces": scratch(num_pieces, group, head_dim),
                "states": scratch(num_pieces, 2, group),
                "pieces_done": scratch(dtype=torch.int32),
                "num_pieces": num_pieces,
                "read_bytes": self._read_bytes,
                "TILE": tile,
                "WEIGHTED": spread is not None,
            },
            # Few rows are wide ones, and a wide output wants registers; Triton 3.8 spills without selection, too.
            num_warps=8 if rows < TILE or scoring == Scoring.DENSE else 4,
            device=layer.keys.device,
        )

    @property
    def launches(self) -> list[Launch]:
        """What a step starts, in order."""
        return [launch for launch in (self._append_and_score, self._choose, self._attend) if launch is not None]

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, chosen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `FusedStep`."""
        query = query.contiguous()
        output = torch.empty_like(query)
        self._append_and_score(query=query, key=key.contiguous(), value=value.contiguous())
        if self._choose is not None:
            self._choose()
        self._attend(query=query, output=output, report=chosen)
        return output, self._read_bytes


def build_lowbit(index: LowBitKeys, keys: Tensor, lengths: Tensor) -> None:
    """See `build_lowbit` in ops/lowbit.py: two launches."""
    kernels = import_module("rocketkv.backends.triton_prefill")
    batch, num_kv_heads, num_tokens, head_dim = keys.shape
    keys = keys if keys.stride()[2:] == (head_dim, 1) else keys.contiguous()
    with _current(keys.device):
        kernels.build_lowbit[(batch * num_kv_heads, -(-num_tokens // GROUP))](
            keys,
            lengths,
            *index[:3],
            index.codes.shape[2],
            *keys.stride()[:2],
            HKV=num_kv_heads,
            D=head_dim,
            D_PAD=max(LEAST_DOT, _power_of_two(head_dim)),
            **PREFILL_OPTIONS,
        )
        kernels.sum_lowbit_spread[(batch * num_kv_heads, -(-head_dim // kernels.CHANNELS.value))](
            lengths.contiguous(),
            index.ranges,
            index.open_keys,
            index.spread,
            index.codes.shape[2],
            D=head_dim,
            **PREFILL_OPTIONS,
        )


def build_pages(index: PageBounds, keys: Tensor, lengths: Tensor) -> None:
    """See `ops.build_pages`: a launch, and another if there is a spread."""
    bounds, page_size, spread = index
    kernels = import_module("rocketkv.backends.triton_prefill")
    batch, num_kv_heads, _, head_dim = keys.shape
    keys = keys if keys.stride()[2:] == (head_dim, 1) else keys.contiguous()
    lengths, page_size = lengths.contiguous(), page_size.contiguous()
    with _current(keys.device):
        kernels.build_pages[(batch * num_kv_heads, bounds.shape[2])](
            bounds,
            keys,
            lengths,
            page_size,
            bounds.shape[2],
            *keys.stride()[:2],
            HKV=num_kv_heads,
            NUM_ROWS=bounds.shape[3],
            D=head_dim,
            D_PAD=max(LEAST_DOT, _power_of_two(head_dim)),
            **PREFILL_OPTIONS,
        )
        if spread is not None:
            kernels.sum_page_spread[(batch * num_kv_heads, -(-head_dim // kernels.CHANNELS.value))](
                lengths,
                page_size,
                bounds,
                spread,
                bounds.shape[2],
                HKV=num_kv_heads,
                NUM_ROWS=bounds.shape[3],
                D=head_dim,
                **PREFILL_OPTIONS,
            )


def score_window(
    query: Tensor, keys: Tensor, *, lengths: Tensor, num_queries: Tensor, scale: float, by_peak: bool = False
) -> Tensor:
    """See `score_window` in ops/scores.py: two launches, which hold no logits but a tile's."""
    kernels = import_module("rocketkv.backends.triton_prefill")
    batch, num_heads, window, head_dim = query.shape
    num_kv_heads, num_tokens = keys.shape[1:3]
    keys = keys if keys.stride()[2:] == (head_dim, 1) else keys.contiguous()
    num_rows = num_heads // num_kv_heads * window
    head_dim_padded = max(LEAST_DOT, _power_of_two(head_dim))
    tile = min(PART, TILE_BYTES // (head_dim_padded * keys.element_size()))
    part_size = max(tile, LEAST_WINDOW_PART // tile * tile)
    num_parts = -(-num_tokens // part_size)
    rows_at_once = min(tile, max(LEAST_DOT, _power_of_two(num_rows)))
    partials = keys.new_empty(batch * num_kv_heads, num_parts, 2, num_rows, dtype=torch.float32)
    row_groups = -(-num_rows // rows_at_once)
    scores = keys.new_empty(batch, num_kv_heads, row_groups, num_tokens, dtype=torch.float32)
    sizes = {
        "scale": scale,
        "num_parts": num_parts,
        "part_size": part_size,
        "batch_stride": keys.stride(0),
        "head_stride": keys.stride(1),
        "HKV": num_kv_heads,
        "G": num_heads // num_kv_heads,
        "W": window,
        "D": head_dim,
        "R_PAD": rows_at_once,
        "D_PAD": head_dim_padded,
        "TILE": tile,
    }
    grid = (batch * num_kv_heads, num_parts, row_groups)
    inputs = (query.contiguous(), keys, lengths, num_queries, partials)
    with _current(keys.device):
        kernels.sum_window[grid](*inputs, **sizes, **PREFILL_OPTIONS)
        own = {"scores": scores, "num_tokens": num_tokens, "BY_PEAK": by_peak}
        kernels.score_window[grid](*inputs, **own, **sizes, **PREFILL_OPTIONS)
    return scores.amax(2) if by_peak else scores.sum(2)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Launches go to the current GPU, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _power_of_two(number: int) -> int:
    """The least that is not smaller."""
    return 1 << (number - 1).bit_length()


def _num_cores(device: torch.device) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else CORES_OF_CPU


@cache
def _load() -> ModuleType | str:
    """The kernels, or why there are none."""
    try:
        return import_module("rocketkv.backends.triton_kernels")
    except ImportError as error:
        return f"Triton does not load ({error}); install rocketkv[triton]"
