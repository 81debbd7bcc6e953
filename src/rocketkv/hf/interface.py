"""The attention function and the mask function, which transformers calls by the name of our implementation."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rocketkv.errors import UnsupportedError
from rocketkv.hf.layer import RocketKVLayer
from rocketkv.hf.passes import Pass
from rocketkv.hf.support import unsupported

NAME = "rocketkv"  # our attention implementation in the registries of transformers
_REFUSED_OPTIONS = ("softcap", "s_aux", "position_bias")  # our attention would have to ignore them


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    rocketkv_pass: Pass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Let compressed layers attend through their cache, and all others through SDPA; registered as `NAME`.

    Args:
        module: the model's attention layer, with its `layer_idx`.
        query: `[B, Hq, T, D]` float, after RoPE.
        key: `[B, Hkv, T, D]`, as the cache's `update` returned it: the new tokens only, in a compressed layer.
        value: like `key`.
        attention_mask: the mask that `mask` made; None for a compressed layer.
        scaling: factor on the dot products; None stands for 1 / sqrt(D).
        dropout: must be 0 in a compressed layer.
        rocketkv_pass: the pass that the hook handed down; None without a compressed cache.
        kwargs: options that are passed on to SDPA.

    Returns:
        `[B, T, Hq, D]` and no attention weights.

    Raises:
        UnsupportedError: a compressed layer needs an option, a mask or a window that our attention does not have.
    """
    index: Any = module.layer_idx
    layer = None if rocketkv_pass is None else rocketkv_pass.layers[index]
    if rocketkv_pass is None or not isinstance(layer, RocketKVLayer):
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return output, None
    for option in _REFUSED_OPTIONS:
        if kwargs.get(option) is not None:
            raise unsupported(type(module).__name__, f"its attention needs {option}")
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise unsupported(type(module).__name__, "its attention is bidirectional")
    if kwargs.get("sliding_window") != layer.window:
        raise unsupported(type(module).__name__, "its sliding window is not the one of its configuration")
    if attention_mask is not None or dropout > 0:
        raise UnsupportedError(
            f"{type(module).__name__} passes {'dropout' if dropout > 0 else 'a mask of its own'} "
            "to a compressed layer; use model.eval() and left padding only."
        )
    if not rocketkv_pass.waits[index]:
        raise unsupported(type(module).__name__, "it attends without updating its cache")
    if torch.is_autocast_enabled(device := query.device.type):  # an empty cache gets autocast's dtype, as SDPA does
        dtype = layer.cache.dtype or torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            output = rocketkv_pass.attend(index, *(x.to(dtype) for x in (query, key, value)), scaling).to(query.dtype)
    else:
        output = rocketkv_pass.attend(index, query, key, value, scaling)
    return output.transpose(1, 2).contiguous(), None


def mask(*args: Any, kv_length: int, **kwargs: Any) -> Tensor | None:
    """Make no mask for layers that report no columns (`RocketKVLayer.get_mask_sizes`), else SDPA's; registered too."""
    return None if kv_length == 0 else sdpa_mask(*args, kv_length=kv_length, **kwargs)
