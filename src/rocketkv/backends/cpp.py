"""The CPU backend calls kernels in C++ (csrc/)."""

from functools import lru_cache

import torch
from torch import Tensor

from rocketkv.backends.amx import prefer_torch
from rocketkv.backends.base import FLOATS, LayerTensors, Scoring, Spec, check_prompt, decline_numbers
from rocketkv.backends.library import native, native_dtype, why_missing
from rocketkv.errors import InputError
from rocketkv.ops import NO_TERMS, LogitTerms, PageBounds

NAME = "cpp"
DEVICES: tuple[str, ...] = ("cpu",)
SCORINGS: tuple[Scoring, ...] = tuple(Scoring)
OUTPUTS = 8  # output tensors allocated at a time, because allocating one per step takes torch long


def decline(spec: Spec) -> str | None:
    """Return why this backend does not accept tokens of this kind; None if it accepts them, in any `kv_dtype`."""
    if reason := why_missing():
        return reason
    if spec.device != "cpu":
        return f"it runs on the CPU, not on {spec.device}"
    return decline_numbers(spec, takes_terms=True)


def decline_prefill_densely(spec: Spec) -> str | None:
    """Say why this backend does not attend prompts of this kind; None: it does."""
    if spec.has_terms:  # torch's attention has none
        return decline(spec)
    return decline(spec) or prefer_torch(prefill_densely, spec.dtype, spec.head_dim)


def prefill_densely(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    lengths: Tensor | None = None,
    num_queries: Tensor | None = None,
    scale: float,
    terms: LogitTerms = NO_TERMS,
) -> Tensor:
    """See `ops.prefill_densely`; tensors that do not fit raise an InputError."""
    check_prompt(query, keys, values, lengths=lengths, num_queries=num_queries, scale=scale, terms=terms)
    if reason := decline(Spec.of(keys, terms=terms)):
        raise InputError(f"the kernels do not attend this prompt ({reason}); call backends.prefill_densely instead.")
    query, keys, values = (x if x.stride(3) == 1 else x.contiguous() for x in (query, keys, values))
    batch, num_heads, num_tokens, head_dim = query.shape
    allocate = query.new_empty if lengths is None and num_queries is None else query.new_zeros
    if lengths is None:
        lengths = torch.full(keys.shape[:2], keys.shape[2], dtype=torch.int64, device=keys.device)
    lengths, num_queries = lengths.contiguous(), None if num_queries is None else num_queries.contiguous()
    output = allocate(batch, num_tokens, num_heads, head_dim).transpose(1, 2)  # as models go on with it
    prompt = native.Prompt()
    prompt.dtype = native_dtype(query.dtype)
    prompt.batch, prompt.num_heads, prompt.num_tokens, prompt.head_dim = query.shape
    prompt.num_kv_heads = keys.shape[1]
    prompt.scale = scale
    _set_terms(prompt.terms, terms)
    prompt.query, prompt.output, prompt.keys, prompt.values = (_rows(x) for x in (query, output, keys, values))
    prompt.lengths = lengths.data_ptr()
    prompt.num_queries = _address(num_queries)
    native.prefill(prompt, torch.get_num_threads())
    return output


def build_pages(index: PageBounds, keys: Tensor, lengths: Tensor) -> None:
    """See `ops.build_pages`."""
    bounds, page_size, spread = index
    keys = keys if keys[0, 0].is_contiguous() else keys.contiguous()
    lengths, page_size = lengths.contiguous(), page_size.contiguous()
    built_from, pages = native.Keys(), _pages(PageBounds(bounds, page_size, spread))
    built_from.dtype = native_dtype(keys.dtype)
    built_from.batch, built_from.num_kv_heads, _, built_from.head_dim = keys.shape
    built_from.keys = keys.data_ptr()
    built_from.batch_stride, built_from.head_stride = keys.stride()[:2]
    built_from.lengths = lengths.data_ptr()
    native.build_pages(built_from, pages, torch.get_num_threads())


def use_huge_pages(buffer: Tensor) -> None:
    """Request huge pages for a buffer on a CPU that nothing was written to; without them the buffer is only slower."""
    if buffer.device.type == "cpu" and why_missing() is None:
        native.use_huge_pages(buffer.data_ptr(), buffer.nbytes)


def takes_linear(x: Tensor, weight: Tensor) -> bool:
    """Return whether `linear` accepts these tensors."""
    return (
        x.device.type == "cpu"
        and x.dtype in FLOATS
        and weight.dtype == x.dtype
        and weight.is_contiguous()
        and why_missing() is None
    )


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """See `backends.linear`."""
    x = x.contiguous()
    num_out, num_in = weight.shape
    output = x.new_empty(*x.shape[:-1], num_out)
    native.linear(
        dtype=native_dtype(x.dtype),
        weight=weight.data_ptr(),
        input=x.data_ptr(),
        output=output.data_ptr(),
        num_rows=x.numel() // num_in,
        num_in=num_in,
        num_out=num_out,
        num_threads=torch.get_num_threads(),
    )
    return output


def bind(layer: LayerTensors) -> "CppStep":
    """Return a step over the buffers of `layer`."""
    return CppStep(layer)


class CppStep:
    """One decode step as one native call (csrc/step.cpp); see `Step`."""

    def __init__(self, layer: LayerTensors) -> None:
        self._layer = layer  # keeps the buffers alive
        tensors = [x for x in (*vars(layer).values(), *layer.index) if isinstance(x, Tensor)]
        assert all(x.is_contiguous() for x in tensors)
        self._shape = (layer.keys.shape[0], layer.num_heads, 1, layer.keys.shape[3])
        self._outputs = _spare_outputs(self._shape, layer.dtype)
        self._native = _layer(layer)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, ranks: Tensor | None = None) -> tuple[Tensor, int]:
        """See `Step`."""
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        try:
            output = self._outputs.pop()
        except IndexError:
            with torch.inference_mode(False):
                self._outputs += torch.empty(OUTPUTS, *self._shape, dtype=self._layer.dtype, device="cpu").unbind()
            output = self._outputs.pop()
        num_bytes = self._native.decode(
            query=query.data_ptr(),
            key=key.data_ptr(),
            value=value.data_ptr(),
            output=output.data_ptr(),
            chosen=_address(ranks),
            num_threads=torch.get_num_threads(),
        )
        return output, num_bytes


def _layer(layer: LayerTensors) -> "native.Layer":
    """Return the layer as the library's struct."""
    out = native.Layer()
    out.dtype = native_dtype(layer.dtype)
    out.batch, out.num_kv_heads, out.token_capacity, out.head_dim = layer.keys.shape
    out.num_heads = layer.num_heads
    out.scale = layer.scale
    _set_terms(out.terms, layer.terms)
    out.keys = layer.keys.data_ptr()
    out.values = layer.values.data_ptr()
    out.exponents = _address(layer.exponents)
    out.positions = layer.positions.data_ptr()
    out.position_capacity = layer.positions.shape[2]
    out.archived = layer.archive_lengths is not None
    out.lengths = layer.lengths.data_ptr()
    out.archive_lengths = _address(layer.archive_lengths)
    out.seen = layer.seen.data_ptr()
    out.scoring = native.Scoring[layer.scoring]
    if layer.pages is not None:
        out.pages = _pages(layer.pages)
    if layer.lowbit is not None:
        out.lowbit.codes = layer.lowbit.codes.data_ptr()
        out.lowbit.ranges = layer.lowbit.ranges.data_ptr()
        out.lowbit.open_keys = layer.lowbit.open_keys.data_ptr()
        out.lowbit.num_blocks = layer.lowbit.codes.shape[2]
        out.lowbit.spread = layer.lowbit.spread.data_ptr()
    out.num_channels = layer.num_channels.data_ptr()
    out.top_k = layer.top_k.data_ptr()
    out.sinks = layer.sinks.data_ptr()
    out.recents = layer.recents.data_ptr()
    out.dense_lengths = layer.dense_lengths.data_ptr()
    return out


def _set_terms(out: "native.LogitTerms", terms: LogitTerms) -> None:
    """Let the library's struct have these terms, whose sinks must stay alive while the struct is used."""
    assert terms.sink_logits is None or (terms.sink_logits.dtype, terms.sink_logits.stride()) == (torch.float32, (1,))
    out.sink_logits = _address(terms.sink_logits)
    out.softcap = terms.softcap or 0.0


def _pages(index: PageBounds) -> "native.Pages":
    """Return the page bounds as the library's struct."""
    out = native.Pages()
    out.bounds = index.bounds.data_ptr()
    out.page_size = index.page_size.data_ptr()
    out.num_blocks, out.num_rows = index.bounds.shape[2:4]
    out.spread = _address(index.spread)
    return out


def _rows(rows: Tensor) -> "native.Rows":
    """Return rows `[B, H, S, D]` as the library's structure."""
    out = native.Rows()
    out.data = rows.data_ptr()
    out.batch_stride, out.head_stride, out.token_stride = rows.stride()[:3]
    return out


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@lru_cache(maxsize=16)
def _spare_outputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Return the list of spare outputs, shared by all steps of one kind: memory used a moment ago is still cached."""
    return []
