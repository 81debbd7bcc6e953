"""One decode step of one layer in two or three launches: append and score, choose, attend.

The host neither waits for the device nor reads any number from it, so a step can be captured in a CUDA graph: grids
follow from capacities, the kernels read the lengths on the device, and blocks beyond a length do nothing.
Where the device can, the second and the third kernel start while the one before still runs, and wait for its end before
they read or write anything (`wait_for_previous` in kernels/device.cuh); the first follows a kernel of torch's.
The new token counts as stored from the first kernel on; the last kernel adds it to the lengths.
Each kernel's file says what scratch memory it hands on to the next.
"""

import torch
from torch import Tensor

from rocketkv.backends.base import LayerTensors, Scoring
from rocketkv.backends.cuda.arguments import SIZES, Layer
from rocketkv.backends.cuda.launch import Device, Launch, Program, Shape
from rocketkv.ops import GROUP, PAGES_PER_BLOCK

DTYPES = {torch.float32: "float", torch.bfloat16: "BFloat16", torch.float16: "Float16"}
WARP = 32
VECTOR_BYTES = 16  # the most that a lane loads at once, from an address that is a multiple of it
WARPS = 4  # warps of a block that scores or attends
CHOOSING_THREADS = 1024
ROW_NUMBERS = 32  # numbers of queries that a lane holds, or so
SCORING_BLOCKS_PER_CORE = 8  # blocks that score, at most, to aim at
PIECES_PER_CORE = 4  # blocks that attend, at most, to aim at
PIECE_TOKENS = 32  # the fewest tokens that are worth a block that attends
MOST_PIECES = 128  # as in attend.cu
MOST_SCORES_IN_BLOCK = 9216  # units whose scores fit in a block's own memory beside its histogram


class CudaStep:
    """One decode step as two or three launches; see `Step`.

    Attributes:
        launches: the launches of a step, in order.
        scratch: the scratch memory by name; None for what a step does not need.
    """

    def __init__(self, layer: LayerTensors, device: Device) -> None:
        # Without an index a step attends to all tokens.
        scoring = layer.scoring if layer.index or layer.scoring == Scoring.EXACT else Scoring.DENSE
        sizes = _sizes(layer, scoring, device)
        self.scratch = _scratch(layer, sizes)
        self._read_bytes = self.scratch["read_bytes"]
        self._tensors = layer  # keeps the buffers alive
        cap = layer.terms.softcap or 0.0
        self._layer = Layer(**{name: sizes[name] for name in SIZES}, scale=layer.scale, softcap=cap)
        self._layer.point(**_stored(layer), **self.scratch)
        self.launches = _launches(layer, scoring, sizes, device)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, ranks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Step`."""
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        if query.data_ptr() % VECTOR_BYTES:
            query = query.clone()
        output = torch.empty_like(query)
        self._layer.point(query=query, key=key, value=value, output=output, report=ranks)
        for launch in self.launches:
            launch(self._layer)
        assert self._read_bytes is not None
        return output, self._read_bytes


def _sizes(layer: LayerTensors, scoring: Scoring, device: Device) -> dict[str, int]:
    """Return the sizes of the work by name: those of `Layer` and the number of heads."""
    batch, num_kv_heads, token_capacity, _ = layer.keys.shape
    capacity, heads = layer.positions.shape[2], batch * num_kv_heads
    is_dense = scoring == Scoring.DENSE
    num_units = 0 if is_dense else capacity
    if layer.pages is not None:
        num_units = min(capacity, layer.pages.bounds.shape[2] * PAGES_PER_BLOCK)
    num_parts = -(-num_units // (GROUP if scoring == Scoring.LOWBIT else WARP))
    rounds = -(-num_parts // WARPS) * heads // (SCORING_BLOCKS_PER_CORE * device.num_cores)
    most_chosen = 0 if is_dense else min(int(layer.top_k.max()), capacity)
    most_attended = capacity if is_dense else max(most_chosen, min(int(layer.dense_lengths.max()), capacity))
    pieces = max(1, PIECES_PER_CORE * device.num_cores // heads)
    pieces = min(-(-most_attended // PIECE_TOKENS), pieces, MOST_PIECES)
    cluster = min(1 << (pieces - 1).bit_length(), device.most_cluster)
    return {
        "token_capacity": token_capacity,
        "position_capacity": capacity,
        "num_blocks": layer.index[0].shape[2] if layer.index else 0,
        "num_units": num_units,
        "num_parts": num_parts,
        "most_chosen": most_chosen,
        "num_kv_heads": num_kv_heads,
        "num_rows": 0 if layer.pages is None else layer.pages.bounds.shape[3],
        "parts_per_block": WARPS * max(1, rounds),
        "num_pieces": -(-pieces // cluster) * cluster,
        "cluster": cluster,
        "heads": heads,
    }


def _scratch(layer: LayerTensors, sizes: dict[str, int]) -> dict[str, Tensor | None]:
    """Return the scratch memory by name."""
    heads, units, pieces = sizes["heads"], sizes["num_units"], sizes["num_pieces"] // sizes["cluster"]
    group, head_dim = layer.num_heads // layer.keys.shape[1], layer.keys.shape[3]

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return layer.keys.new_empty((heads, *shape), dtype=dtype)

    return {
        "logits": new(group, units),
        "partials": new(sizes["num_parts"], 2, group),
        "scores": new(units, dtype=torch.int32) if units > MOST_SCORES_IN_BLOCK else None,
        "chosen": new(sizes["most_chosen"], dtype=torch.int32) if units else None,
        "pieces": new(pieces, group, head_dim),
        "states": new(pieces, 2, group),
        "pieces_done": new(dtype=torch.int32).zero_(),
        "read_bytes": new(dtype=torch.int64),
    }


def _stored(layer: LayerTensors) -> dict[str, Tensor | None]:
    """Return the stored tensors, the plan of each row and the index by name, with None for those that are not there."""
    bounds, page_size, spread = layer.pages or (None, None, None)
    codes, ranges, open_keys, spread = layer.lowbit or (None, None, None, spread)
    stored = {
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
        "bounds": bounds,
        "page_size": page_size,
        "codes": codes,
        "ranges": ranges,
        "open_keys": open_keys,
        "spread": spread,
        "sink_logits": layer.terms.sink_logits,
    }
    assert all(tensor is None or tensor.is_contiguous() for tensor in stored.values())
    return stored


def _launches(layer: LayerTensors, scoring: Scoring, sizes: dict[str, int], device: Device) -> list[Launch]:
    """Return the launches of a step, compiled."""
    heads, units, group = sizes["heads"], sizes["num_units"], layer.num_heads // layer.keys.shape[1]
    at_once = heads_at_once(group, layer.keys.shape[3], layer.dtype)
    numbers: dict[str, str | int] = {"DTYPE": DTYPES[layer.dtype], "G": group, "D": layer.keys.shape[3]}
    rows: dict[str, str | int] = {"HEADS": at_once, "INT8": int(layer.exponents is not None)}
    scored: dict[str, str | int] = {"SCORING": scoring.upper()}

    def launch(kernel: str, constants: dict[str, str | int], shape: Shape) -> Launch:
        program = Program(kernel, tuple(constants.items()))
        return Launch(program, device.load(program), shape)

    blocks = max(1, -(-sizes["num_parts"] // sizes["parts_per_block"]))
    score = launch("append_and_score", numbers | rows | scored, Shape((heads, blocks, 1), WARPS * WARP))
    pieces = (heads, sizes["num_pieces"], -(-group // at_once))
    work = Shape(pieces, WARPS * WARP, overlaps=device.overlaps, cluster=sizes["cluster"])
    attend = launch("attend", numbers | rows, work)
    if scoring == Scoring.DENSE:
        return [score, attend]
    scores_bytes = 4 * units if units <= MOST_SCORES_IN_BLOCK else 0
    work = Shape((heads, 1, 1), CHOOSING_THREADS, scores_bytes, device.overlaps)
    choose = launch("choose", numbers | scored, work)
    return [score, choose, attend]


def heads_at_once(group: int, head_dim: int, dtype: torch.dtype) -> int:
    """Return how many query heads a warp takes at once, so that its lanes hold few numbers of queries each.

    Args:
        group: G, the query heads of a KV head.
        head_dim: the number of channels.
        dtype: the dtype of queries, by which rows.cuh shares out a row among lanes.
    """
    vector = VECTOR_BYTES // dtype.itemsize  # numbers that a lane loads at once
    while head_dim % vector:
        vector //= 2
    lanes = min(WARP, 1 << (head_dim // vector - 1).bit_length())
    numbers = -(-head_dim // vector // lanes) * vector
    passes = -(-group * numbers // ROW_NUMBERS)
    return -(-group // min(passes, group))
