"""The CPU backend calls kernels in C++ (csrc/)."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rocketkv.backends.amx import prefer_torch
from rocketkv.backends.base import FLOATS, LayerTensors, Scoring, Spec, check_prompt, decline_numbers
from rocketkv.backends.library import native, native_dtype, why_missing
from rocketkv.backends.structs import address, keys_struct, layer_struct, lowbit_struct, pages_struct, set_terms
from rocketkv.errors import InputError
from rocketkv.ops import NO_TERMS, LogitTerms, LowBitKeys, PageBounds

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
    _check_prompt(query, keys, values, lengths=lengths, num_queries=num_queries, scale=scale, terms=terms)
    batch, num_heads, num_tokens, head_dim = query.shape
    allocate = query.new_empty if lengths is None and num_queries is None else query.new_zeros
    if lengths is None:
        lengths = torch.full(keys.shape[:2], keys.shape[2], dtype=torch.int64, device=keys.device)
    output = allocate(batch, num_tokens, num_heads, head_dim).transpose(1, 2)  # as models go on with it
    query, keys, values = (x if x.stride(3) == 1 else x.contiguous() for x in (query, keys, values))
    lengths, num_queries = lengths.contiguous(), None if num_queries is None else num_queries.contiguous()
    prompt = _prompt(query, keys, lengths, num_queries, scale, terms)
    prompt.values, prompt.output = _rows(values), _rows(output)
    native.prefill(prompt, torch.get_num_threads())
    return output


def score_window(
    query: Tensor,
    keys: Tensor,
    *,
    lengths: Tensor,
    num_queries: Tensor,
    scale: float,
    terms: LogitTerms = NO_TERMS,
    by_peak: bool = False,
) -> Tensor:
    """See `ops.score_window`; tensors that do not fit raise an InputError."""
    _check_prompt(query, keys, keys, lengths=lengths, num_queries=num_queries, scale=scale, terms=terms)
    scores = torch.zeros(keys.shape[:3], dtype=torch.float32, device=keys.device)
    query, keys = (x if x.stride(3) == 1 else x.contiguous() for x in (query, keys))
    lengths, num_queries = lengths.contiguous(), num_queries.contiguous()
    native.score_window(
        _prompt(query, keys, lengths, num_queries, scale, terms),
        by_peak=by_peak,
        scores=scores.data_ptr(),
        num_slots=keys.shape[2],
        num_threads=torch.get_num_threads(),
    )
    return scores


def build_pages(index: PageBounds, keys: Tensor, lengths: Tensor) -> None:
    """See `ops.build_pages`."""
    bounds, page_size, spread = index
    keys = keys if keys[0, 0].is_contiguous() else keys.contiguous()
    lengths, page_size = lengths.contiguous(), page_size.contiguous()
    pages = pages_struct(PageBounds(bounds, page_size, spread))
    native.build_pages(keys_struct(keys, lengths), pages, torch.get_num_threads())


def build_lowbit(index: LowBitKeys, keys: Tensor, lengths: Tensor) -> None:
    """See `ops.build_lowbit`."""
    assert all(x.is_contiguous() for x in index)
    keys, lengths = keys if keys[0, 0].is_contiguous() else keys.contiguous(), lengths.contiguous()
    native.build_lowbit(keys_struct(keys, lengths), lowbit_struct(index), torch.get_num_threads())


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
        self._native = layer_struct(layer)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, ranks: Tensor | None = None) -> tuple[Tensor, int]:
        """See `Step`."""
        key, value = key.contiguous(), value.contiguous()
        return self._run(query, key.data_ptr(), value.data_ptr(), ranks)

    def read_again(self, query: Tensor) -> tuple[Tensor, int]:
        """See `ReadingStep`."""
        return self._run(query, 0, 0, None)

    def _run(self, query: Tensor, key: int, value: int, ranks: Tensor | None) -> tuple[Tensor, int]:
        """Run the step; without the address of a key it appends nothing."""
        query = query.contiguous()
        try:
            output = self._outputs.pop()
        except IndexError:
            with torch.inference_mode(False):
                self._outputs += torch.empty(OUTPUTS, *self._shape, dtype=self._layer.dtype, device="cpu").unbind()
            output = self._outputs.pop()
        num_bytes = self._native.decode(
            query=query.data_ptr(),
            key=key,
            value=value,
            output=output.data_ptr(),
            chosen=address(ranks),
            num_threads=torch.get_num_threads(),
        )
        return output, num_bytes


def _check_prompt(query: Tensor, keys: Tensor, values: Tensor, *, terms: LogitTerms, **others: Any) -> None:
    """Raise an InputError if tensors do not fit together, or the kernels do not take them."""
    check_prompt(query, keys, values, terms=terms, **others)
    if reason := decline(Spec.of(keys, terms=terms)):
        raise InputError(f"the kernels do not take this prompt ({reason}); call the same function of backends instead.")


def _prompt(
    query: Tensor, keys: Tensor, lengths: Tensor, num_queries: Tensor | None, scale: float, terms: LogitTerms
) -> "native.Prompt":
    """Return the queries of a prompt and their keys as the library's struct."""
    out = native.Prompt()
    out.dtype = native_dtype(query.dtype)
    out.batch, out.num_heads, out.num_tokens, out.head_dim = query.shape
    out.num_kv_heads = keys.shape[1]
    out.scale = scale
    set_terms(out.terms, terms)
    out.query, out.keys = _rows(query), _rows(keys)
    out.lengths = lengths.data_ptr()
    out.num_queries = address(num_queries)
    return out


def _rows(rows: Tensor) -> "native.Rows":
    """Return rows `[B, H, S, D]` as the library's structure."""
    out = native.Rows()
    out.data = rows.data_ptr()
    out.batch_stride, out.head_stride, out.token_stride = rows.stride()[:3]
    return out


@lru_cache(maxsize=16)
def _spare_outputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Return the list of spare outputs, shared by all steps of one kind: memory used a moment ago is still cached."""
    return []
