"""The attention function and the mask function, which transformers calls by the name of our implementation."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from rocketkv.errors import UnsupportedError
from rocketkv.hf.layer import RocketKVLayer
from rocketkv.hf.passes import Pass
from rocketkv.hf.support import unsupported
from rocketkv.ops import LogitTerms

# Our attention implementations in the registries of transformers, by the one that a model had: ours leaves all layers
# that it does not compute to that one.
NAMES = {"sdpa": "rocketkv", "eager": "rocketkv_eager"}
_MASKS = {"sdpa": sdpa_mask, "eager": eager_mask}


def register() -> None:
    """Make our implementations known to transformers by their names."""
    for plain, name in NAMES.items():
        AttentionInterface.register(name, partial(attention, plain))
        AttentionMaskInterface.register(name, partial(mask, plain))


def attention(
    plain: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    rocketkv_pass: Pass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Let compressed layers attend through their cache, and all others as transformers does; see `register`.

    Args:
        plain: the implementation by which transformers computes all others, a key of `NAMES`.
        module: the model's attention layer, with its `layer_idx`.
        query: `[B, Hq, T, D]` float, after RoPE.
        key: `[B, Hkv, T, D]`, as the cache's `update` returned it: the new tokens only, in a compressed layer.
        value: like `key`, or `[B, Hkv, T, Dv]` with Dv < D, which is stored with zeros at its end.
        attention_mask: the mask that `mask` made; None for a compressed layer.
        scaling: factor on the dot products; None stands for 1 / sqrt(D).
        dropout: must be 0 in a compressed layer.
        rocketkv_pass: the pass that the hook handed down; None without a compressed cache.
        kwargs: options of the layer, among them its sinks (`s_aux`) and its soft cap (`softcap`).

    Returns:
        `[B, T, Hq, Dv]`, and the attention weights if transformers computed the layer and returns them.

    Raises:
        UnsupportedError: a compressed layer needs an option, a mask or a window that our attention does not have.
    """
    index: Any = getattr(module, "layer_idx", None)  # a vision tower's modules have none
    layer = None if rocketkv_pass is None else rocketkv_pass.layers[rocketkv_pass.owners.get(index, index)]
    if rocketkv_pass is None or not isinstance(layer, RocketKVLayer):
        attend = sdpa_attention_forward if plain == "sdpa" else _eager_attention(type(module))
        result: tuple[Tensor, Tensor | None] = attend(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return result
    if kwargs.get("position_bias") is not None:
        raise unsupported(type(module).__name__, "its attention needs position_bias")
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise unsupported(type(module).__name__, "its attention is bidirectional")
    if kwargs.get("sliding_window") != layer.window:
        raise unsupported(type(module).__name__, "its sliding window is not the one of its configuration")
    if attention_mask is not None or dropout > 0:
        raise UnsupportedError(
            f"{type(module).__name__} passes {'dropout' if dropout > 0 else 'a mask of its own'} "
            "to a compressed layer; use model.eval() and left padding only."
        )
    if index not in rocketkv_pass.owners and not rocketkv_pass.waits[index]:
        raise unsupported(type(module).__name__, "it attends without updating its cache")
    ahead = rocketkv_pass.ahead
    ahead = None if ahead is None else ahead.to(query.device)  # a device map may put layers on several devices
    terms = LogitTerms(kwargs.get("s_aux"), kwargs.get("softcap"), ahead)
    if (width := value.shape[3]) < key.shape[3]:
        value = functional.pad(value, (0, key.shape[3] - width))
    if torch.is_autocast_enabled(device := query.device.type):  # an empty cache gets autocast's dtype, as SDPA does
        dtype = layer.cache.dtype or torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            output = rocketkv_pass.attend(index, *(x.to(dtype) for x in (query, key, value)), scaling, terms)
            output = output.to(query.dtype)
    else:
        output = rocketkv_pass.attend(index, query, key, value, scaling, terms)
    return output[..., :width].transpose(1, 2).contiguous(), None


def mask(plain: str, *args: Any, kv_length: int, **kwargs: Any) -> Tensor | None:
    """Make no mask for layers that report no columns (`RocketKVLayer.get_mask_sizes`), else transformers' own."""
    return None if kv_length == 0 else _MASKS[plain](*args, kv_length=kv_length, **kwargs)


def _eager_attention(module_class: type) -> Callable[..., Any]:
    """Return the attention function in plain torch that transformers defines beside a model's attention layer."""
    attend: Callable[..., Any] = sys.modules[module_class.__module__].eager_attention_forward
    return attend
