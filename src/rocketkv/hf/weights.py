"""Weights of linear layers in 8 or 4 bits: reading the weights takes most of a decode step's time.

Torch has products of a few bfloat16 rows with packed weights on CPUs. With many rows, as in a prompt, they are slower
than torch's plain product; a layer's weights then go back to bfloat16 for as long as its product takes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from rocketkv.errors import InputError, UnsupportedError

GROUP_SIZE = 32  # inputs that share a scale and a zero in int4
ROW_MULTIPLE = 64  # torch's kernels accept other sizes too, but read out of bounds there
_ROWS_AT_ONCE = 4096  # weight rows packed at a time, each as float32 meanwhile
_INTERLEAVED = {"AVX512": 64, "AVX2": 32}  # weight rows that torch's int4 packing interleaves, by CPU


@dataclass(frozen=True)
class Format:
    """A format of weights `[O, I]` bfloat16: `packed` bytes, and `scales` `[groups, O, 1 or 2]` bfloat16.

    Attributes:
        pack: turns weights into packed bytes and scales.
        unpack: turns packed bytes and scales into rounded weights.
        multiply: turns rows `[M, I]` bfloat16, packed bytes and scales into the product of the rows with the transposed
            weights, `[M, O]`.
        max_rows: the largest M for which `multiply` is faster than unpacking first.
    """

    pack: Callable[[Tensor], tuple[Tensor, Tensor]]
    unpack: Callable[[Tensor, Tensor], Tensor]
    multiply: Callable[[Tensor, Tensor, Tensor], Tensor]
    max_rows: int


def _pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack symmetrically with a scale per row: `packed` is `[O, I]` int8."""
    scales = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    return (weight.float() / scales).round().clamp(-127, 127).to(torch.int8), scales[None]


def _unpack_int8(packed: Tensor, scales: Tensor) -> Tensor:
    return packed * scales[0]


def _multiply_int8(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    output: Tensor = torch.ops.aten._weight_int8pack_mm(x, packed, scales.flatten())
    return output


def _pack_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack so that a weight is `(code - 8) * scale + zero` within its group's range: `packed` is `[O, I / 2]` uint8."""
    groups = weight.float().view(len(weight), -1, GROUP_SIZE)
    low, high = groups.aminmax(dim=2, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-30).bfloat16()
    zero = (low + 8 * scale).bfloat16()
    codes = ((groups - zero) / scale + 8).round().clamp(0, 15).to(torch.int32).flatten(1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed, torch.cat([scale, zero], 2).transpose(0, 1)


def _unpack_int4(packed: Tensor, scales: Tensor) -> Tensor:
    """Unpack; a byte has the codes of two rows, one from each half of its block of weight rows."""
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


def linear(x: Tensor, packed: Tensor, scales: Tensor, weight_dtype: str) -> Tensor:
    """Multiply rows with the transpose of packed weights.

    Args:
        x: `[..., I]` bfloat16.
        packed: the bytes that `FORMATS[weight_dtype].pack` returned.
        scales: the scales that it returned.
        weight_dtype: a key of `FORMATS`.

    Returns:
        `[..., O]` bfloat16.
    """
    form = FORMATS[weight_dtype]
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if len(rows) > form.max_rows:
        return functional.linear(x, form.unpack(packed, scales))
    return form.multiply(rows, packed, scales).view(*x.shape[:-1], -1)


def _fake_linear(x: Tensor, packed: Tensor, scales: Tensor, weight_dtype: str) -> Tensor:
    """Return an empty tensor like the output of `linear`."""
    return x.new_empty(*x.shape[:-1], scales.shape[1])


# One opaque operation in compiled graphs, so that no graph depends on the number of rows.
torch.library.define("rocketkv::packed_linear", "(Tensor x, Tensor packed, Tensor scales, str weights) -> Tensor")
torch.library.impl("rocketkv::packed_linear", "CompositeExplicitAutograd", linear)
torch.library.register_fake("rocketkv::packed_linear", _fake_linear)


class QuantizedLinear(nn.Module):
    """A linear layer with its weights in a format of `FORMATS`, and its bias as it was.

    Args:
        layer: the layer to take the weights of.
        weight_dtype: a key of `FORMATS`.
    """

    packed: Tensor
    scales: Tensor

    def __init__(self, layer: nn.Linear, weight_dtype: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.weight_dtype = layer.in_features, layer.out_features, weight_dtype
        parts = [FORMATS[weight_dtype].pack(part) for part in torch.split(layer.weight.detach(), _ROWS_AT_ONCE)]
        self.register_buffer("packed", torch.cat([packed for packed, _ in parts]))
        self.register_buffer("scales", torch.cat([scales for _, scales in parts], 1))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map rows `[..., I]` to `[..., O]`."""
        output: Tensor = torch.ops.rocketkv.packed_linear(x, self.packed, self.scales, self.weight_dtype)
        return output if self.bias is None else output + self.bias


def quantize(model: PreTrainedModel, weight_dtype: str) -> PreTrainedModel:
    """Store the weights of a model's linear layers, its head too, in fewer bits; there is no way back.

    Embeddings and norms stay as they are; a head that was tied to the embedding has weights of its own afterwards.
    The model is for inference on this CPU only: int4 is packed in an order that differs between CPUs.

    Args:
        model: a decoder of transformers in bfloat16, on the CPU.
        weight_dtype: `int8` is symmetric with a scale per output; `int4` has a scale and a zero per 32 inputs, 5 bits
            per weight in all.

    Returns:
        The same model.

    Raises:
        InputError: `weight_dtype` does not exist.
        UnsupportedError: a layer does not fit, or the weights are in another format already; nothing was changed.
    """
    check_format(weight_dtype)
    found = quantized_as(model)
    if found not in (None, weight_dtype):
        raise UnsupportedError(
            f"the weights are in {found} already; load the model anew to have them in {weight_dtype}."
        )
    for weight in model.parameters():
        if type(weight) is not nn.Parameter:
            raise UnsupportedError(
                f"the weights are stored as {type(weight).__name__} already; load the model anew in bfloat16, or leave "
                "weight_dtype out."
            )
    names = [name for name, layer in model.named_modules() if type(layer) is nn.Linear]
    for name in names:
        if reason := _decline(model.get_submodule(name).weight, weight_dtype):
            raise UnsupportedError(
                f"weight_dtype={weight_dtype!r} does not fit {type(model).__name__}: {name} {reason}."
            )
    for name in names:
        model.set_submodule(name, QuantizedLinear(model.get_submodule(name), weight_dtype))
    return model


def check_format(weight_dtype: str) -> None:
    """Raise an `InputError` if there is no such format."""
    if weight_dtype not in FORMATS:
        raise InputError(f"weight_dtype={weight_dtype!r} does not exist; choose from {', '.join(FORMATS)}.")


def quantized_as(model: PreTrainedModel) -> str | None:
    """Return the format of a model's quantized weights; None if they are not quantized."""
    return next((layer.weight_dtype for layer in model.modules() if isinstance(layer, QuantizedLinear)), None)


def _decline(weight: Tensor, weight_dtype: str) -> str | None:
    """Return why a layer's weights, `[O, I]`, cannot be in a format; None if they can."""
    num_out, num_in = weight.shape
    cpu = torch.backends.cpu.get_cpu_capability()
    if weight.device.type != "cpu":
        return f"is on {weight.device.type}; it works on the CPU"
    if weight.dtype != torch.bfloat16:
        return f"is in {str(weight.dtype).removeprefix('torch.')}; load the model in bfloat16"
    if num_in % GROUP_SIZE or num_out % ROW_MULTIPLE:
        return f"maps {num_in} to {num_out} features; multiples of {GROUP_SIZE} and {ROW_MULTIPLE} are needed"
    if weight_dtype == "int4" and cpu not in _INTERLEAVED:
        return f"would run {cpu} code; int4 needs AVX2 or AVX-512, int8 does not"
    return None
