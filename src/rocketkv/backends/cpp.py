"""The CPU backend: kernels in C++ (csrc/), one library per instruction set."""

import platform
from functools import cache, lru_cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from rocketkv.backends.base import FLOATS, LayerTensors, Scoring, decline_numbers
from rocketkv.ops import PageBounds

NAME = "cpp"
DEVICES: tuple[str, ...] = ("cpu",)
SCORINGS: tuple[Scoring, ...] = tuple(Scoring)
OUTPUTS = 8  # allocated at a time: torch's way to a single tensor is long, and cold in the middle of a model's step


def instruction_set() -> str:
    """The instruction set that the kernels are used in, or why they are not."""
    library = _load()
    return library if isinstance(library, str) else library.__name__.rpartition("_kernels_")[2]


def thread_runtime() -> str:
    """The OpenMP runtime whose threads the kernels use; empty if they run on one thread."""
    library = _load()
    return "" if isinstance(library, str) else str(library.thread_runtime())


def decline(tokens: Tensor, kv_dtype: str = "auto") -> str | None:
    """Why tokens like these, `[B, H, S, D]`, are not for this backend; None: they are, however they are stored."""
    library = _load()
    if isinstance(library, str):
        return library
    if tokens.device.type != "cpu":
        return f"it runs on the CPU, not on {tokens.device.type}"
    return decline_numbers(tokens)


def build_pages(index: PageBounds, keys: Tensor, lengths: Tensor) -> None:
    """See `ops.build_pages`."""
    bounds, page_size, spread = index
    keys = keys if keys[0, 0].is_contiguous() else keys.contiguous()
    lengths, page_size = lengths.contiguous(), page_size.contiguous()
    library().build_pages(
        _dtype(keys.dtype),
        *keys.shape[:2],
        keys.shape[3],
        keys.data_ptr(),
        *keys.stride()[:2],
        lengths.data_ptr(),
        bounds.data_ptr(),
        page_size.data_ptr(),
        bounds.shape[2],
        bounds.shape[3],
        0 if spread is None else spread.data_ptr(),
        torch.get_num_threads(),
    )


def use_huge_pages(buffer: Tensor) -> None:
    """Ask for huge pages for a buffer that nothing was written to; it is only slower without them."""
    if buffer.device.type == "cpu" and not isinstance(_load(), str):
        library().use_huge_pages(buffer.data_ptr(), buffer.nbytes)


def takes_linear(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` takes these tensors."""
    return (
        x.device.type == "cpu"
        and x.dtype in FLOATS
        and weight.dtype == x.dtype
        and weight.is_contiguous()
        and not isinstance(_load(), str)
    )


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """See `backends.linear`."""
    x = x.contiguous()
    num_out, num_in = weight.shape
    output = x.new_empty(*x.shape[:-1], num_out)
    library().linear(
        _dtype(x.dtype),
        weight.data_ptr(),
        x.data_ptr(),
        output.data_ptr(),
        x.numel() // num_in,
        num_in,
        num_out,
        torch.get_num_threads(),
    )
    return output


def bind(layer: LayerTensors) -> "CppStep":
    """A step over this storage."""
    return CppStep(layer)


class CppStep:
    """One decode step as one native call (csrc/step.cpp); see `FusedStep`."""

    def __init__(self, layer: LayerTensors) -> None:
        self._layer = layer  # keeps the buffers alive
        pages, lowbit = layer.pages, layer.lowbit
        tensors = [x for x in (*vars(layer).values(), *layer.index) if isinstance(x, Tensor)]
        assert all(x.is_contiguous() for x in tensors)
        self._shape = (layer.keys.shape[0], layer.num_heads, 1, layer.keys.shape[3])
        self._outputs = _spare_outputs(self._shape, layer.dtype)
        spread = lowbit.spread if lowbit is not None else pages.spread if pages is not None else None
        self._native = library().Layer(
            dtype=_dtype(layer.dtype),
            batch=layer.keys.shape[0],
            num_kv_heads=layer.keys.shape[1],
            num_heads=layer.num_heads,
            head_dim=layer.keys.shape[3],
            scale=layer.scale,
            keys=layer.keys.data_ptr(),
            values=layer.values.data_ptr(),
            exponents=0 if layer.exponents is None else layer.exponents.data_ptr(),
            token_capacity=layer.keys.shape[2],
            positions=layer.positions.data_ptr(),
            position_capacity=layer.positions.shape[2],
            archived=layer.archive_lengths is not None,
            lengths=layer.lengths.data_ptr(),
            archive_lengths=0 if layer.archive_lengths is None else layer.archive_lengths.data_ptr(),
            seen=layer.seen.data_ptr(),
            scoring=getattr(library().Scoring, layer.scoring),
            bounds=0 if pages is None else pages.bounds.data_ptr(),
            num_rows=0 if pages is None else pages.bounds.shape[3],
            page_size=0 if pages is None else pages.page_size.data_ptr(),
            codes=0 if lowbit is None else lowbit.codes.data_ptr(),
            ranges=0 if lowbit is None else lowbit.ranges.data_ptr(),
            open_keys=0 if lowbit is None else lowbit.open_keys.data_ptr(),
            spread=0 if spread is None else spread.data_ptr(),
            num_blocks=layer.index[0].shape[2] if layer.index else 0,
            num_channels=layer.num_channels.data_ptr(),
            top_k=layer.top_k.data_ptr(),
            dense_lengths=layer.dense_lengths.data_ptr(),
            sinks=layer.sinks.data_ptr(),
            recents=layer.recents.data_ptr(),
        )

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, chosen: Tensor | None = None) -> tuple[Tensor, int]:
        """See `FusedStep`."""
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        try:
            output = self._outputs.pop()
        except IndexError:
            with torch.inference_mode(False):
                self._outputs += torch.empty(OUTPUTS, *self._shape, dtype=self._layer.dtype, device="cpu").unbind()
            output = self._outputs.pop()
        num_bytes = self._native.decode(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            output.data_ptr(),
            0 if chosen is None else chosen.data_ptr(),
            torch.get_num_threads(),
        )
        return output, num_bytes


@lru_cache(maxsize=16)
def _spare_outputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Outputs not yet given away, which steps of one kind share: memory used a moment ago is warm."""
    return []


def library() -> ModuleType:
    """The native library; ask `decline` first."""
    found = _load()
    assert not isinstance(found, str)
    return found


def library_names() -> list[str]:
    """The modules whose kernels this CPU can run, the best first; what torch is told not to use they do not use."""
    names = ["_kernels_generic"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        capability = torch.backends.cpu.get_cpu_capability()
        names = ["_kernels_x86_64_v3"] if capability in ("AVX2", "AVX512") else []
        if capability == "AVX512":
            names.insert(0, "_kernels_x86_64_v4")
            if torch.cpu._is_avx512_bf16_supported():  # private, but the same from torch 2.9 on
                names.insert(0, "_kernels_x86_64_v4_bf16")
    return [f"{__package__}.{name}" for name in names]


@cache
def _load() -> ModuleType | str:
    """The library for this CPU, or why there is none."""
    names = library_names()
    if not names:
        return f"this CPU runs {torch.backends.cpu.get_cpu_capability()} code only; the kernels need AVX2"
    try:
        return import_module(names[0])
    except ImportError as error:
        return f"its native library does not load ({error})"


def _dtype(dtype: torch.dtype) -> object:
    """The library's name of a dtype."""
    return _native_dtypes()[dtype]


@cache
def _native_dtypes() -> dict[torch.dtype, object]:
    return {dtype: getattr(library().Dtype, str(dtype).removeprefix("torch.")) for dtype in FLOATS}
