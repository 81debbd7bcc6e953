"""Storage of a layer as a backend gets it, random, ragged and poisoned, and the comparison with the reference."""

from dataclasses import replace

import torch

from rocketkv import ops
from rocketkv.backends import Backend, LayerTensors, Scoring
from rocketkv.index import LowBitIndex, PageIndex
from rocketkv.ops import NO_TERMS, LogitTerms

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCORINGS = tuple(Scoring)


def make_layer(
    generator: torch.Generator,
    scoring: Scoring,
    lengths: list[list[int]],
    *,
    group: int = 3,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    page_size: int | list[int] = 3,
    num_channels: int | list[int] = 20,
    top_k: int | list[int] = 24,
    dense_below: int = 0,
    sinks: int = 0,
    recents: int = 0,
    archived: bool = False,
    tied: bool = False,
    int8: bool = False,
    weighted: bool = True,
    terms: LogitTerms = NO_TERMS,
) -> LayerTensors:
    """Return a layer's storage with NaN in all unwritten memory; `tied` draws keys of few distinct values.

    With `weighted`, channels of page bounds are chosen by the spread of their keys, too.
    """
    held = torch.tensor(lengths)
    batch, num_kv_heads = held.shape
    capacity, seen = int(held.max()) + 40, held.amax(1) + 7
    positions = torch.full((batch, num_kv_heads, capacity), -1, dtype=torch.int32)
    slots = torch.zeros(batch, num_kv_heads, capacity, dtype=torch.int64)
    for row in range(batch):
        for head in range(num_kv_heads):
            chosen = torch.randperm(int(seen[row]), generator=generator)[: lengths[row][head]].sort().values
            positions[row, head, : chosen.shape[0]] = chosen
            slots[row, head, : chosen.shape[0]] = chosen if archived else torch.arange(chosen.shape[0])
    storage = torch.full((2, batch, num_kv_heads, int(seen.max()) + 40 if archived else capacity, head_dim), torch.nan)
    tokens = torch.randn(2, batch, num_kv_heads, capacity, head_dim, generator=generator)
    if tied:
        tokens = tokens.sign()
    for row in range(batch):
        for head in range(num_kv_heads):
            at = slots[row, head, : lengths[row][head]]
            storage[:, row, head, at] = tokens[:, row, head, : at.shape[0]]
    keys, values = storage.to(dtype)
    exponents = None
    if int8:
        codes = ops.quantize_tokens(keys, values)
        keys, values = ops.dequantize_tokens(*codes, dtype)

    def column(value: int | list[int]) -> torch.Tensor:
        return torch.tensor([value] * batch if isinstance(value, int) else value)

    index: PageIndex | LowBitIndex | None = None
    if scoring in (Scoring.PAGES, Scoring.BOUNDS):
        is_weighted = weighted and scoring == Scoring.PAGES
        index = PageIndex(ops.take_tokens(keys, slots), held, column(page_size), weighted=is_weighted)
    elif scoring == Scoring.LOWBIT:
        index = LowBitIndex(ops.take_tokens(keys, slots), held)
        index.reserve(capacity)
    if int8:
        keys, values, exponents = codes
    return LayerTensors(
        keys=keys,
        values=values,
        exponents=exponents,
        dtype=dtype,
        positions=positions,
        lengths=held,
        archive_lengths=seen[:, None].expand(-1, num_kv_heads).clone() if archived else None,
        seen=seen,
        scoring=scoring,
        pages=index.stored if isinstance(index, PageIndex) else None,
        lowbit=index.stored if isinstance(index, LowBitIndex) else None,
        num_channels=column(num_channels),
        top_k=column(top_k),
        dense_lengths=column(top_k).clamp(min=dense_below),
        sinks=column(sinks),
        recents=column(recents),
        num_heads=group * num_kv_heads,
        scale=head_dim**-0.5,
        terms=terms,
    )


def keys_and_values(layer: LayerTensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values in the form that the reference takes."""
    if layer.exponents is None:
        return layer.keys, layer.values
    return ops.dequantize_tokens(layer.keys, layer.values, layer.exponents, layer.dtype)


def clone(x: torch.Tensor | None) -> torch.Tensor | None:
    """Return a copy of a tensor, or None for None."""
    return None if x is None else x.clone()


def slots_of(layer: LayerTensors) -> torch.Tensor:
    """Return the slots of the kept tokens, `[B, Hkv, position_capacity]`; 0 beyond the lengths."""
    places = torch.arange(layer.positions.shape[2])
    slots = layer.positions.long() if layer.archive_lengths is not None else places.expand_as(layer.positions)
    return slots.where(places < layer.lengths[..., None], 0)


def spread_of(layer: LayerTensors) -> torch.Tensor | None:
    """Return the spread by which channels are chosen; None if there is none."""
    index = layer.lowbit or layer.pages
    return None if index is None else index.spread


def reference_scores(layer: LayerTensors, query: torch.Tensor, spread: torch.Tensor | None) -> torch.Tensor:
    """Return the score of every token by the reference, with channels chosen by this spread."""
    grouped = query.reshape(*layer.keys.shape[:2], -1, layer.keys.shape[3])
    num_tokens = int(layer.lengths.max())
    if layer.scoring == Scoring.PAGES:
        logits = ops.hybrid_logits(
            grouped,
            layer.pages.bounds,
            page_size=layer.pages.page_size,
            num_tokens=num_tokens,
            num_channels=layer.num_channels,
            scale=layer.scale,
            spread=spread,
        )
    elif layer.scoring == Scoring.BOUNDS:
        logits = ops.bound_logits(
            grouped, layer.pages.bounds, page_size=layer.pages.page_size, num_tokens=num_tokens, scale=layer.scale
        )
    elif layer.scoring == Scoring.LOWBIT:
        logits = ops.lowbit_logits(
            grouped,
            layer.lowbit._replace(spread=spread),
            lengths=layer.lengths,
            num_tokens=num_tokens,
            num_channels=layer.num_channels,
            scale=layer.scale,
        )
    else:
        keys = ops.take_tokens(keys_and_values(layer)[0], slots_of(layer)[:, :, :num_tokens]).float()
        logits = grouped.float() @ keys.transpose(2, 3) * layer.scale
    return ops.score_tokens(logits, layer.lengths, layer.terms)


def check_steps(backend: Backend, layer: LayerTensors, generator: torch.Generator, steps: int = 3) -> None:
    """Take some steps, and compare storage, choice, output and traffic with the reference."""
    batch, num_kv_heads, _, head_dim = layer.keys.shape
    size = layer.dtype.itemsize
    step = backend.bind(layer)
    assert step is not None
    for _ in range(steps):
        query, key, value = (
            torch.randn(batch, heads, 1, head_dim, generator=generator).to(layer.dtype)
            for heads in (layer.num_heads, num_kv_heads, num_kv_heads)
        )
        before = replace(
            layer,
            **{name: x.clone() for name, x in vars(layer).items() if isinstance(x, torch.Tensor)},
            pages=None if layer.pages is None else ops.PageBounds(*map(clone, layer.pages)),
            lowbit=None if layer.lowbit is None else ops.LowBitKeys(*map(clone, layer.lowbit)),
        )
        # Channels are chosen by the spread from before the new token.
        spread = None if spread_of(before) is None else spread_of(before).clone()
        chosen = torch.full_like(layer.positions, -2)
        output, num_bytes = step(query, key, value, chosen)

        # append
        torch.testing.assert_close(layer.lengths, before.lengths + 1)
        torch.testing.assert_close(layer.seen, before.seen + 1)
        slots = before.lengths if before.archive_lengths is None else before.archive_lengths
        stored = [key, value] if layer.exponents is None else [*ops.quantize_tokens(key, value)]
        for name, new in zip(("keys", "values", "exponents"), stored, strict=False):
            getattr(before, name).scatter_(2, slots[..., None, None].expand_as(new), new)
            torch.testing.assert_close(getattr(layer, name), getattr(before, name), rtol=0, atol=0, equal_nan=True)
        if layer.exponents is not None:
            key, value = ops.dequantize_tokens(*stored, layer.dtype)
        newest = before.seen[:, None, None].expand(-1, num_kv_heads, 1).int()
        before.positions.scatter_(2, before.lengths[..., None], newest)
        assert torch.equal(layer.positions, before.positions)
        if before.lowbit is not None:
            ops.append_lowbit(before.lowbit, key, before.lengths)
        elif before.pages is not None:
            bounds, page_size, own = before.pages
            ops.fold_into_pages(bounds, key, slots=before.lengths[..., None], page_size=page_size)
            if own is not None:
                ops.extend_spread(own, bounds, lengths=layer.lengths, page_size=page_size)
        for mine, expected in zip(layer.index, before.index, strict=True):
            torch.testing.assert_close(mine, expected, rtol=0, atol=0, equal_nan=True)

        # choose
        selects = (layer.lengths > layer.dense_lengths[:, None]) & (layer.scoring != Scoring.DENSE)
        counts = layer.top_k[:, None].where(selects, layer.lengths)
        scores = reference_scores(layer, query, spread) if layer.scoring != Scoring.DENSE else None
        scored = 0
        for row in range(batch):
            for head in range(num_kv_heads):
                count, length = int(counts[row, head]), int(layer.lengths[row, head])
                places = chosen[row, head, :count].long()
                assert torch.equal(places, places.unique())
                assert int(places[0]) >= 0
                assert int(places[-1]) < length
                assert chosen[row, head, count] == -1
                if count == length:
                    continue
                pinned = (places < layer.sinks[row]) | (places >= length - layer.recents[row])
                assert int(pinned.sum()) == int(layer.sinks[row] + layer.recents[row])
                open_scores = scores[row, head, int(layer.sinks[row]) : length - int(layer.recents[row])]
                best = open_scores.sort(descending=True).values[: count - int(pinned.sum())]
                mine = scores[row, head, places[~pinned]].sort(descending=True).values
                torch.testing.assert_close(mine, best, rtol=1e-4, atol=1e-7)
                pages = 0 if layer.pages is None else -(-length // int(layer.pages.page_size[row]))
                num_channels = int(layer.num_channels[row])
                scored += {
                    Scoring.PAGES: pages * num_channels * size,
                    Scoring.BOUNDS: pages * layer.index[0].shape[3] * size if layer.index else 0,
                    Scoring.EXACT: length * head_dim * size,
                    Scoring.LOWBIT: num_channels * (length // 64 * (32 + 2 * size) + length % 64 * size),
                }[layer.scoring] + (0 if spread is None else 4 * head_dim)
        token_bytes = 2 * head_dim * size if layer.exponents is None else 2 * (head_dim + -(-head_dim // 32))
        assert int(torch.as_tensor(num_bytes).sum()) == scored + int(counts.sum()) * token_bytes

        # attend
        places = chosen.clamp_min(0).long()
        at = slots_of(layer).gather(2, places[:, :, : int(counts.max())])
        arguments = {"slots": at, "counts": counts, "scale": layer.scale, "terms": layer.terms}
        keys, values = keys_and_values(layer)
        exact = ops.decode_sparsely(query.double(), keys.double(), values.double(), **arguments)
        plain = ops.decode_sparsely(query, keys, values, **arguments)
        allowed = 2 * (plain.double() - exact).abs().max() + 1e-6
        assert output.dtype == layer.dtype
        assert (output.double() - exact).abs().max() <= allowed


def check_8_bits_of_extremes(backend: Backend, dtype: torch.dtype, generator: torch.Generator, steps: int) -> None:
    """Append zeros, numbers at the ends of the range and NaN, and compare what is stored with the reference."""
    layer = make_layer(generator, Scoring.DENSE, [[4, 4]], dtype=dtype, int8=True)
    assert layer.exponents is not None
    ends = [0.0, 1.0, -1.0, 127.6, -127.5, torch.finfo(dtype).max, torch.finfo(dtype).tiny, 3e-7, torch.nan, torch.inf]
    key = torch.tensor(ends, dtype=dtype)[torch.randint(0, len(ends), (steps, 1, 2, 1, 64), generator=generator)]
    key[0], key[1, ..., :32], key[2, ..., 8] = 0.0, key[1, ..., :1], torch.nan
    step = backend.bind(layer)
    for i, new in enumerate(key):
        step(torch.zeros(1, 6, 1, 64, dtype=dtype), new, -new)
        stored = (layer.keys, layer.values, layer.exponents)
        for mine, expected in zip(stored, ops.quantize_tokens(new, -new), strict=True):
            assert torch.equal(mine[:, :, 4 + i : 5 + i], expected)
