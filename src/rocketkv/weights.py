"""Weights of linear layers in 8 or 4 bits: a decode step is bound by reading them.

Torch brings products of a few bfloat16 rows with packed weights on CPUs. They are slower than its plain product where
rows are many, as in a prompt; there a layer's weights go back to bfloat16 for as long as its product takes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from rocketkv.errors import InputError, UnsupportedError

GROUP_SIZE = 32  # inputs that share a scale and a zero in int4
ROW_MULTIPLE = 64  # torch's kernels take other sizes too, and read out of bounds
_ROWS_AT_ONCE = 4096  # are packed: what that needs is float32
_INTERLEAVED = {"AVX512": 64, "AVX2": 32}  # weight rows that torch's int4 packing takes together, on which CPU


@dataclass(frozen=True)
class Format:
    """How weights `[O, I]` bfloat16 are held: as `packed` bytes, and `scales` `[groups, O, 1 or 2]` bfloat16.

    Attributes:
        pack: weights to packed bytes and scales.
        unpack: these to weights, rounded.
        multiply: rows `[M, I]` bfloat16, packed bytes, scales to the product with the transposed weights, `[M, O]`.
        max_rows: with more, it is faster to unpack first.
    """

    pack: Callable[[Tensor], tuple[Tensor, Tensor]]
    unpack: Callable[[Tensor, Tensor], Tensor]
    multiply: Callable[[Tensor, Tensor, Tensor], Tensor]
    max_rows: int


def _pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric, a scale per row: `packed` is `[O, I]` int8."""
    scales = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    return (weight.float() / scales).round().clamp(-127, 127).to(torch.int8), scales[None]


def _unpack_int8(packed: Tensor, scales: Tensor) -> Tensor:
    return packed * scales[0]


def _multiply_int8(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    output: Tensor = torch.ops.aten._weight_int8pack_mm(x, packed, scales.flatten())
    return output


def _pack_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Between a group's least and greatest weight, `(code - 8) * scale + zero`: `packed` is `[O, I / 2]` uint8."""
    groups = weight.float().view(len(weight), -1, GROUP_SIZE)
    low, high = groups.aminmax(dim=2, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-30).bfloat16()
    zero = (low + 8 * scale).bfloat16()
    codes = ((groups - zero) / scale + 8).round().clamp(0, 15).to(torch.int32).flatten(1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed, torch.cat([scale, zero], 2).transpose(0, 1)


def _unpack_int4(packed: Tensor, scales: Tensor) -> Tensor:
    """Of each block of weight rows, a byte holds the code of a row of the first half and of one of the second."""
    num_rows = _INTERLEAVED[torch.backends.cpu.get_cpu_capability()]
    halves = packed.view(len(packed) // num_rows, -1, num_rows // 2)  # [blocks, I, rows]
    codes = torch.cat([halves & 15, halves >> 4], 2).view(torch.int8).transpose(0, 1) - 8  # [I, blocks, rows]
    scale, zero = scales[:, None].unbind(3)  # [groups, 1, O]
    return torch.addcmul(zero, codes.reshape(-1, GROUP_SIZE, len(packed)), scale).flatten(0, 1).t()


def _multiply_int4(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    output: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP_SIZE, scales)
    return output


FORMATS = {
    "int8": Format(_pack_int8, _unpack_int8, _multiply_int8, max_rows=8),
    "int4": Format(_pack_int4, _unpack_int4, _multiply_int4, max_rows=256),
}


def linear(x: Tensor, packed: Tensor, scales: Tensor, weights: str) -> Tensor:
    """Multiply rows with the transpose of packed weights.

    Args:
        x: `[..., I]` bfloat16.
        packed: as `FORMATS[weights].pack` returns it.
        scales: likewise.
        weights: a key of `FORMATS`.

    Returns:
        `[..., O]` bfloat16.
    """
    held = FORMATS[weights]
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if len(rows) > held.max_rows:
        return functional.linear(x, held.unpack(packed, scales))
    return held.multiply(rows, packed, scales).view(*x.shape[:-1], -1)


def _fake_linear(x: Tensor, packed: Tensor, scales: Tensor, weights: str) -> Tensor:
    """What `linear` returns, without its data."""
    return x.new_empty(*x.shape[:-1], scales.shape[1])


# One opaque operation in compiled graphs, so that no graph depends on the number of rows.
torch.library.define("rocketkv::packed_linear", "(Tensor x, Tensor packed, Tensor scales, str weights) -> Tensor")
torch.library.impl("rocketkv::packed_linear", "CompositeExplicitAutograd", linear)
torch.library.register_fake("rocketkv::packed_linear", _fake_linear)


class QuantizedLinear(nn.Module):
    """A linear layer with its weights in a format of `FORMATS`, and its bias as it was."""

    packed: Tensor
    scales: Tensor

    def __init__(self, layer: nn.Linear, weights: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.weights = layer.in_features, layer.out_features, weights
        parts = [FORMATS[weights].pack(part) for part in torch.split(layer.weight.detach(), _ROWS_AT_ONCE)]
        self.register_buffer("packed", torch.cat([packed for packed, _ in parts]))
        self.register_buffer("scales", torch.cat([scales for _, scales in parts], 1))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Rows `[..., I]` to `[..., O]`."""
        output: Tensor = torch.ops.rocketkv.packed_linear(x, self.packed, self.scales, self.weights)
        return output if self.bias is None else output + self.bias


def quantize(model: PreTrainedModel, weights: str) -> PreTrainedModel:
    """Hold the weights of a model's linear layers, its head too, in fewer bits; there is no way back.

    Embeddings and norms stay as they are; a head that was tied to the embedding has weights of its own afterwards.
    The model is for inference on this CPU only: int4 is packed in an order that differs between CPUs.

    Args:
        model: a decoder of transformers in bfloat16, on the CPU.
        weights: `int8`, symmetric with a scale per output; `int4`, with a scale and a zero per 32 inputs (5 bits each).

    Returns:
        The same model.

    Raises:
        InputError: there is no such format.
        UnsupportedError: a layer does not fit, or the weights are held in another format already; nothing was changed.
    """
    check_format(weights)
    held = quantized_as(model)
    if held not in (None, weights):
        raise UnsupportedError(f"the weights are in {held} already; load the model anew to have them in {weights}.")
    names = [name for name, layer in model.named_modules() if type(layer) is nn.Linear]
    for name in names:
        if reason := _decline(model.get_submodule(name).weight, weights):
            raise UnsupportedError(f"weights={weights!r} does not fit {type(model).__name__}: {name} {reason}.")
    for name in names:
        model.set_submodule(name, QuantizedLinear(model.get_submodule(name), weights))
    return model


def check_format(weights: str) -> None:
    """Raise an `InputError` if there is no such format."""
    if weights not in FORMATS:
        raise InputError(f"weights={weights!r} does not exist; choose from {', '.join(FORMATS)}.")


def quantized_as(model: PreTrainedModel) -> str | None:
    """The format that a model's weights are held in; None: their own dtype."""
    return next((layer.weights for layer in model.modules() if isinstance(layer, QuantizedLinear)), None)


def _decline(weight: Tensor, weights: str) -> str | None:
    """Why a layer's weights, `[O, I]`, cannot be held so; None: they can."""
    num_out, num_in = weight.shape
    cpu = torch.backends.cpu.get_cpu_capability()
    if weight.device.type != "cpu":
        return f"is on {weight.device.type}; it works on the CPU"
    if weight.dtype != torch.bfloat16:
        return f"is in {str(weight.dtype).removeprefix('torch.')}; load the model in bfloat16"
    if num_in % GROUP_SIZE or num_out % ROW_MULTIPLE:
        return f"maps {num_in} to {num_out} features; multiples of {GROUP_SIZE} and {ROW_MULTIPLE} are needed"
    if weights == "int4" and cpu not in _INTERLEAVED:
        return f"would run {cpu} code; int4 needs AVX2 or AVX-512, int8 does not"
    return None
