"""One decode step of one layer in three launches: append and score, choose, attend.

The host neither waits for the device nor reads any number from it, so a step can be captured in a CUDA graph: grids
follow from capacities, the kernels read the lengths on the device, and programs beyond a length do nothing.
The new token counts as stored from the first kernel on; the last kernel adds it to the lengths.

The kernels take the dense tensors of `LayerTensors` and the scratch tensors below, which pass results from launch to
launch. A unit is what has a score: a page, or a token where each token is scored.

- `channel_sizes`, `[B, Hkv, D_PAD]` float32: the size of the queries along each channel, by which channels are chosen.
- `channel_ranks`, `[B, Hkv, D_PAD]` int32: the number of channels that are chosen before each channel.
- `logits`, `[B, Hkv, G, units]` float32.
- `partials`, `[B, Hkv, parts, 2, G]` float32: a part's largest logit, and its tokens' sum of exponentials relative to
  that logit.
- `scores`, `[B, Hkv, units]` float32.
- `chosen`, `[B, Hkv, top_k]` int32: ranks, ascending.
- `pieces`, `[B, Hkv, pieces, G, D]` float32: the sum of the weighted values of a piece.
- `states`, `[B, Hkv, pieces, 2, G]` float32: the largest logit of a piece, and its sum of weights.
- `pieces_done`, `[B, Hkv]` int32: the number of finished pieces, zero between steps.
- `read_bytes`, `[B, Hkv]` int64: the bytes that the step has read.

The spread of an index, if there is one, is `[B, Hkv, D]` float32. The first launch reads the spread from before the new
token; `choose` updates the spread with the new token.
"""

from typing import Any

import torch
from torch import Tensor

from rocketkv.backends.base import LayerTensors, Scoring
from rocketkv.backends.triton import sizes
from rocketkv.backends.triton.append_score import append_and_score
from rocketkv.backends.triton.attend import attend
from rocketkv.backends.triton.choose import choose
from rocketkv.backends.triton.launch import Launch, num_cores
from rocketkv.ops import GROUP


class TritonStep:
    """One decode step as two or three launches; see `Step`.

    Attributes:
        launches: the launches of a step, in order.
    """

    def __init__(self, layer: LayerTensors) -> None:
        device, head_dim = layer.keys.device, layer.keys.shape[3]
        # Without an index a step attends to all tokens.
        scoring = layer.scoring if layer.index or layer.scoring == Scoring.EXACT else Scoring.DENSE
        head_dim_padded = sizes.padded(head_dim)
        rows = sizes.TILE_BYTES // (head_dim_padded * layer.dtype.itemsize)  # the rows of a tile
        arguments = _storage(layer) | _dimensions(layer, scoring, rows) | _index(layer)
        arguments |= _scratch(layer, arguments)
        num_heads, num_pieces, parts = layer.lengths.numel(), arguments["num_pieces"], arguments["parts_per_program"]
        # Where every core has many programs, a program of low-bit keys needs one warp, which waits for no other. With
        # more channels, a soft cap, or products in float32, one warp would spill registers to memory, and with a soft
        # cap four warps would, too.
        fits_in_warp = scoring == Scoring.LOWBIT and layer.dtype == torch.bfloat16 and head_dim <= 128
        num_warps = 1 if fits_in_warp and parts > sizes.LEAST_PARTS else 4
        if layer.terms.softcap is not None:
            num_warps = 8
        self._append_and_score = Launch(
            append_and_score,
            (num_heads, max(1, -(-arguments["num_parts"] // parts))),
            arguments,
            device=device,
            num_warps=num_warps,
        )
        self._choose = None
        if scoring != Scoring.DENSE:
            self._choose = Launch(choose, (num_heads,), arguments, device=device, num_warps=8)
        # Eight warps have the registers for a wide head_dim, where a tile has few rows, and for dense attention, where
        # Triton 3.8 would spill registers to memory.
        num_warps = 8 if rows < sizes.TILE or scoring == Scoring.DENSE else 4
        self._attend = Launch(attend, (num_heads, num_pieces), arguments, device=device, num_warps=num_warps)
        launches = (self._append_and_score, self._choose, self._attend)
        self.launches = [launch for launch in launches if launch is not None]
        self._read_bytes: Tensor = arguments["read_bytes"]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, ranks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Step`."""
        query = query.contiguous()
        output = torch.empty_like(query)
        self._append_and_score(query=query, key=key.contiguous(), value=value.contiguous())
        if self._choose is not None:
            self._choose()
        self._attend(query=query, output=output, report=ranks)
        return output, self._read_bytes


def _storage(layer: LayerTensors) -> dict[str, Any]:
    """Return the stored tensors and the plan of each row as arguments by name."""
    return {
        "keys": layer.keys,
        "values": layer.values,
        "exponents": layer.exponents,
        "positions": layer.positions,
        "lengths": layer.lengths,
        "archive_lengths": layer.archive_lengths,
        "seen": layer.seen,
        "num_channels": layer.num_channels,
        "top_k": layer.top_k,
        "dense_lengths": layer.dense_lengths,
        "sinks": layer.sinks,
        "recents": layer.recents,
        "scale": layer.scale,
        "softcap": layer.terms.softcap,
        "sink_logits": layer.terms.sink_logits,
        "token_capacity": layer.keys.shape[2],
        "position_capacity": layer.positions.shape[2],
    }


def _index(layer: LayerTensors) -> dict[str, Any]:
    """Return the tensors of the index as arguments by name, with None for those that this index lacks."""
    bounds, page_size, spread = layer.pages or (None, None, None)
    codes, ranges, open_keys, spread = layer.lowbit or (None, None, None, spread)
    return {
        "bounds": bounds,
        "page_size": page_size,
        "codes": codes,
        "ranges": ranges,
        "open_keys": open_keys,
        "spread": spread,
        "num_blocks": layer.index[0].shape[2] if layer.index else 0,
        "NUM_ROWS": 0 if bounds is None else bounds.shape[3],
        "WEIGHTED": spread is not None,
    }


def _dimensions(layer: LayerTensors, scoring: Scoring, rows: int) -> dict[str, Any]:
    """Return the sizes of the work, as arguments by name, for programs that load `rows` rows of keys at a time."""
    batch, num_kv_heads, _, head_dim = layer.keys.shape
    group, capacity = layer.num_heads // num_kv_heads, layer.positions.shape[2]
    head_dim_padded = sizes.padded(head_dim)
    part = GROUP if scoring == Scoring.LOWBIT else min(sizes.PART, rows)
    tile = min(sizes.TILE, rows)
    is_dense = scoring == Scoring.DENSE
    num_units = 0 if is_dense else capacity  # there are at most as many pages as tokens
    most_chosen = 0 if is_dense else min(int(layer.top_k.max()), capacity)
    most_dense = capacity if is_dense else min(int(layer.dense_lengths.max()), capacity)
    num_parts, heads, cores = -(-num_units // part), batch * num_kv_heads, num_cores(layer.keys.device)
    return {
        "num_units": num_units,
        "num_parts": num_parts,
        "parts_per_program": max(sizes.LEAST_PARTS, heads * num_parts // (sizes.SCORING_PROGRAMS_PER_CORE * cores)),
        "num_pieces": min(-(-max(most_dense, most_chosen) // tile), max(1, sizes.PROGRAMS_PER_CORE * cores // heads)),
        "most_chosen": most_chosen,
        "SCORING": str(scoring),
        "HKV": num_kv_heads,
        "G": group,
        "G_PAD": sizes.padded(group),
        "G_POW": sizes.power_of_two(group),
        "D": head_dim,
        "D_PAD": head_dim_padded,
        "PART": part,
        "TILE": tile,
        "WIDTH": min(head_dim_padded, sizes.TILE_BYTES // (2 * GROUP * layer.dtype.itemsize)),  # half a low-bit tile
        "BLOCK": sizes.BLOCK,
        "DIGIT": sizes.DIGIT,
    }


def _scratch(layer: LayerTensors, dimensions: dict[str, Any]) -> dict[str, Tensor]:
    """Return the scratch tensors as arguments by name, filled with zeros."""
    group, head_dim, pieces = dimensions["G"], dimensions["D"], dimensions["num_pieces"]

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return layer.keys.new_zeros((layer.lengths.numel(), *shape), dtype=dtype)

    return {
        "channel_sizes": zeros(dimensions["D_PAD"]),
        "channel_ranks": zeros(dimensions["D_PAD"], dtype=torch.int32),
        "logits": zeros(group, dimensions["num_units"]),
        "partials": zeros(dimensions["num_parts"], 2, group),
        "scores": zeros(dimensions["num_units"]),
        "chosen": zeros(dimensions["most_chosen"], dtype=torch.int32),
        "pieces": zeros(pieces, group, head_dim),
        "states": zeros(pieces, 2, group),
        "pieces_done": zeros(dtype=torch.int32),
        "read_bytes": zeros(dtype=torch.int64),
    }
