"""How the keys and values of a model look, layer by layer, read from its configuration."""

from typing import NamedTuple

from transformers import DynamicCache, PreTrainedConfig

from rocketkv.errors import InputError


class _Layout(NamedTuple):
    """How one layer's keys and values look; the names of the fields stand in error messages."""

    layer_kind: str
    sliding_window: int | None
    KV_heads: int
    head_dim: int


def head_dims(config: PreTrainedConfig) -> list[int]:
    """Return the number of channels of a key, layer by layer."""
    text = config.get_text_config(decoder=True)
    layers = getattr(text, "per_layer_config", None)  # where transformers knows that layers may differ
    return [
        getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        for layer in (layers or [text] * text.num_hidden_layers)
    ]


def check_same_layout(cache_config: PreTrainedConfig, model_config: PreTrainedConfig) -> None:
    """Refuse a model whose layers are not those that a cache was made for.

    Args:
        cache_config: the configuration that the cache was made with.
        model_config: the configuration of the model that is to use the cache.

    Raises:
        InputError: the number of layers differs, or a layer's kind, sliding window, KV heads or head_dim.
    """
    own, other = _layout(cache_config), _layout(model_config)
    if len(own) != len(other):
        raise InputError(
            f"the cache has {len(own)} layers, the model {len(other)}; make it with RocketKVCache(model.config, ...)."
        )
    for i, (mine, its) in enumerate(zip(own, other, strict=True)):
        for name, a, b in zip(_Layout._fields, mine, its, strict=True):
            if a != b:
                raise InputError(
                    f"the cache was made for {name.replace('_', ' ')} {a} in layer {i}, but the model has {b}; "
                    "make it with RocketKVCache(model.config, ...)."
                )


def _layout(config: PreTrainedConfig) -> list[_Layout]:
    """Return how the keys and values of a model look, layer by layer."""
    text = config.get_text_config(decoder=True)
    parts = getattr(text, "per_layer_config", None) or [text] * text.num_hidden_layers
    kv_heads = [getattr(part, "num_key_value_heads", None) or part.num_attention_heads for part in parts]
    return [
        _Layout(type(layer).__name__, getattr(layer, "sliding_window", None), heads, head_dim)
        for layer, heads, head_dim in zip(DynamicCache(config=config).layers, kv_heads, head_dims(config), strict=False)
    ]
