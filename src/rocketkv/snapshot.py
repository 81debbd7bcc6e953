"""A layer's cache as named tensors and plain numbers, from which an equal cache can be made in another process.

The index and the step are not among them: the next step builds them from the kept keys, to the bit as they were.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rocketkv.attention import LayerCache
from rocketkv.budget import Split, check_count
from rocketkv.cache import WorkingSet
from rocketkv.checks import DTYPES, MOST_SEEN, check_terms
from rocketkv.config import RocketKVConfig
from rocketkv.errors import InputError, telling_memory
from rocketkv.exclusive import exclusive
from rocketkv.ops import LogitTerms
from rocketkv.plan import Planner, SelectionPlan
from rocketkv.ragged import GROWTH, RaggedTokens
from rocketkv.state import Observed
from rocketkv.tensor_file import Rows

_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


class Snapshot(NamedTuple):
    """What a layer's cache consists of.

    Attributes:
        tensors: by name; tokens of ragged rows with the room that they had.
        facts: what JSON can hold; None for a cache that has seen nothing.
    """

    tensors: dict[str, Tensor | Rows]
    facts: dict[str, Any] | None


@exclusive
def take(cache: LayerCache) -> Snapshot:
    """Return the state of a cache; the tensors are shared, so write them before the cache goes on.

    Raises:
        InputError: another thread is using the cache.
    """
    working, plan, observed = cache.working, cache.plan, cache._observed
    if working is None:
        return Snapshot({}, None)
    tensors = _rows("tokens", working.tokens, 0)
    facts = {
        "shape": [*working.lengths.shape, working.head_dim],
        "dtype": str(working.like.dtype).removeprefix("torch."),
        "seen": working.row_seen,
        "lengths": working.lengths.tolist(),
        "num_pending": working.num_pending,
        "is_whole": working.is_whole,
        "num_seen": cache.num_seen,
        "num_decoded": cache.num_decoded,
        "just_prefilled": cache.just_prefilled,
        "read_bytes": cache.read_bytes,
        "num_reads": cache._num_reads,
        "plan": None if plan is None else {"splits": plan.splits, "limits": plan.limits},
        "archive": None if working.archive is None else working.archive.lengths.tolist(),
        "observed": None,
    }
    if working.archive is not None:
        tensors |= _rows("archive", working.archive, max(GROWTH, working.archive.max_length // 8))
    if observed is not None:
        tensors["observed"] = observed.query
        sinks, softcap, ahead = observed.terms
        if sinks is not None:
            tensors["observed_sinks"] = sinks
        if ahead is not None:
            tensors["observed_ahead"] = ahead
        facts["observed"] = [observed.num_queries.tolist(), observed.scale, softcap, observed.is_first]
    return Snapshot(tensors, facts)


def restore(config: RocketKVConfig, keep_queries: int, snapshot: Snapshot, device: torch.device) -> LayerCache:
    """Return a cache in the state of a snapshot; its archive stays where the tensors of the snapshot lie, if it can.

    Args:
        config: as the cache of the snapshot had it.
        keep_queries: as above.
        snapshot: with plain tensors on the CPU, each of the shape that `Rows` says.
        device: where keys and values come from.

    Raises:
        InputError: the snapshot is none that `take` could have made.
        OutOfMemoryError: the working set, or the archive on its device, does not fit in memory.
    """
    cache, facts = LayerCache(config, keep_queries), snapshot.facts
    if facts is None:
        return cache
    try:
        with telling_memory("to load the cache"):
            cache.working, cache.plan, cache._observed = _parts(cache, snapshot.tensors, facts, device)
        cache.num_seen = check_count("num_seen", facts["num_seen"], 1)
        cache.num_decoded = check_count("num_decoded", facts["num_decoded"], 0)
        cache.just_prefilled = bool(facts["just_prefilled"])
        cache._num_reads = check_count("num_reads", facts["num_reads"], 1)
        cache._read_bytes = check_count("read_bytes", facts["read_bytes"], 0)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"these are not the parts of a layer's cache ({error}).") from None
    return cache


def _parts(
    cache: LayerCache, tensors: dict[str, Any], facts: dict[str, Any], device: torch.device
) -> tuple[WorkingSet, SelectionPlan | None, Observed | None]:
    """Return working set, plan and observed queries, checked so that no kernel reads beyond a buffer."""
    config = cache.config
    batch, num_kv_heads, head_dim = (check_count("shape", size, 1) for size in facts["shape"])
    like = torch.empty(batch, num_kv_heads, 0, head_dim, dtype=_DTYPE_NAMES[facts["dtype"]], device=device)
    working = WorkingSet(like, config.format, archived=config.mode == "multi_turn", on_host=config.archive_on_host)
    seen = [check_count("seen", num, 1) for num in facts["seen"]]
    _counts(seen, (batch,), MOST_SEEN)
    num_decoded = check_count("num_decoded", facts["num_decoded"], 0)
    working.num_pending = check_count("num_pending", facts["num_pending"], num_decoded)
    working.set_seen(seen)
    tokens = _ragged("tokens", working.tokens, tensors, _counts(facts["lengths"], like.shape[:2], MOST_SEEN))
    num_seen = torch.tensor(seen)[:, None]
    if working.archive is not None:
        archive = _ragged("archive", working.archive, tensors, _counts(facts["archive"], like.shape[:2], MOST_SEEN))
        pending = working.num_pending if working.source is None else 0
        if bool((archive.lengths != num_seen - pending).any()) or pending > int(tokens.lengths.min()):
            raise ValueError("an archive without all that was seen")
        working.archive = archive.to(working.archive.lengths.device)
    positions = tokens.views()["positions"]
    used = torch.arange(tokens.max_length) < tokens.lengths[..., None]
    if bool((used & ((positions < 0) | (positions >= num_seen[..., None]))).any()):
        raise ValueError("positions beyond what was seen")
    working.tokens = tokens.to(device).keep(None, config.new_tokens)
    working.is_whole = bool(facts["is_whole"])
    plan = None
    if facts["plan"] is not None:
        splits = [Split(*(check_count("split", n, 1) for n in split)) for split in facts["plan"]["splits"]]
        limits = [check_count("limit", limit, 1) for limit in facts["plan"]["limits"]]
        if not len(splits) == len(limits) == batch:
            raise ValueError("a plan of other rows")
        plan = Planner(config, cache.selection, head_dim, device).resumed(splits, limits, working.tokens.row_lengths)
        if plan.steps_left < 0:
            raise ValueError("a row longer than its plan")
    observed = None
    if facts["observed"] is not None:
        num_queries, scale, softcap, is_first = facts["observed"]
        query = tensors["observed"].to(device)
        if query.dtype != like.dtype or query.dim() != 4 or query.shape[::3] != like.shape[::3]:
            raise ValueError(f"queries are {query.dtype} {list(query.shape)}")
        if query.shape[1] % num_kv_heads:
            raise ValueError(f"{query.shape[1]} query heads do not share {num_kv_heads} KV heads")
        counts = _counts(num_queries, (batch,), query.shape[2]).to(device)
        sinks, ahead = (tensors.get(name) for name in ("observed_sinks", "observed_ahead"))
        sinks, ahead = (None if x is None else x.to(device).clone() for x in (sinks, ahead))
        terms = LogitTerms(sinks, softcap, ahead)
        observed = Observed(query.clone(), counts, *check_terms(float(scale), terms, query), bool(is_first))
    return working, plan, observed


def _rows(name: str, tokens: RaggedTokens, spare: int) -> dict[str, Tensor | Rows]:
    """Return the fields of ragged tokens by name, with room in the file for `spare` more, rounded up to GROWTH."""
    capacity = -(-(tokens.max_length + spare) // GROWTH) * GROWTH
    return {f"{name}.{field}": Rows(x, tokens.lengths, capacity) for field, x in tokens.fields.items()}


def _ragged(name: str, empty: RaggedTokens, tensors: dict[str, Any], lengths: Tensor) -> RaggedTokens:
    """Return ragged tokens like `empty`, with `lengths` `[B, Hkv]` int64, over the tensors of that name."""
    fields = {}
    for field, like in empty.fields.items():
        x = fields[field] = tensors[f"{name}.{field}"]
        if x.dtype != like.dtype or (*x.shape[:2], *x.shape[3:]) != (*like.shape[:2], *like.shape[3:]):
            raise ValueError(f"{name}.{field} is {x.dtype} {list(x.shape)}")
        if x.shape[2] < int(lengths.max()):
            raise ValueError(f"{name}.{field} has {x.shape[2]} tokens a row, fewer than {int(lengths.max())}")
    if len({x.shape[2] for x in fields.values()}) > 1:  # kernels take the room of the keys for that of all fields
        raise ValueError(f"the fields of {name} have room for different numbers of tokens")
    return RaggedTokens(fields, lengths)


def _counts(numbers: Any, shape: tuple[int, ...], most: int) -> Tensor:
    """Return whole numbers from 0 to `most` as an int64 tensor of this shape."""
    counts = torch.tensor(numbers, dtype=torch.int64)
    if counts.shape != shape or int(counts.min()) < 0 or int(counts.max()) > most:
        raise ValueError(f"{numbers} are not {list(shape)} numbers from 0 to {most}")
    return counts
