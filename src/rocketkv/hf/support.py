"""Which models of transformers can decode through a compressed cache, and why the others cannot.

One judge serves `enable(model)` and `RocketKVCache(model.config, ...)`. The judge cannot know everything, such as the
code of a model that does not come with transformers; the hooks and the attention function refuse the rest.
"""

import inspect
import sys

from transformers import CONFIG_MAPPING, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
)

from rocketkv.errors import InputError, UnsupportedError

_PECULIAR = {  # by model_type: reasons that neither the configuration nor the class tells
    "diffllama": "its attention is the difference of two",
    "doge": "it adds a mask of its own, made from the values, to the attention logits",
    "dory": "it runs its layers several times over and caches each time anew",
    "hrm_text": "it runs its layers several times over and caches each time anew",
    "llama4_text": "its layers attend in chunks",
    "mllama_text_model": "some of its layers attend to images only",
    "modernbert-decoder": "its decoder cannot be told apart from its head",
    "moshi": "its attention does not say how wide its window is",
    "nemotron": "its layers hand no options down to their attention",
    "paligemma": "its prompts attend in both directions",
}


def unsupported(name: str, reason: str) -> UnsupportedError:
    """Return the refusal of the model `name`."""
    return UnsupportedError(f"{name} is not supported: {reason}; use it with transformers' own DynamicCache.")


def check_model(model: object) -> PreTrainedModel:
    """Return the decoder of a model that can use a compressed cache.

    Raises:
        InputError: this is no model of transformers.
        UnsupportedError: the model is not supported; the message names it and says why.
    """
    if not isinstance(model, PreTrainedModel):
        name = type(model).__name__
        if hasattr(model, "get_base_model"):
            raise InputError(f"{name} wraps a model; call enable(model.get_base_model()) and go on with the wrapper.")
        shown = name if hasattr(model, "parameters") and not isinstance(model, type) else repr(model)
        raise InputError(
            f"{shown} is no model of transformers; give what AutoModelForCausalLM.from_pretrained returns."
        )
    name = type(model).__name__
    _check_config(model.config, name)
    decoder = model.get_decoder()
    _check_class(type(model), name)
    if not isinstance(decoder, PreTrainedModel):
        raise unsupported(name, "its decoder cannot be told apart from its head")
    _check_class(type(decoder), name)
    return decoder


def check_config(config: object) -> PreTrainedConfig:
    """Return the configuration of a model that can use a compressed cache.

    Raises:
        InputError: this is no configuration of transformers.
        UnsupportedError: the model is not supported; the message names it and says why.
    """
    if isinstance(config, PreTrainedModel):
        raise InputError(f"{type(config).__name__} is a model; give its configuration, model.config.")
    if not isinstance(config, PreTrainedConfig):
        raise InputError(f"{config!r} is no configuration of a model of transformers; give model.config.")
    model_class = _class_of(config)
    name = config.model_type if model_class is None else model_class.__name__
    _check_config(config, name)
    if model_class is not None:
        _check_class(model_class, name)
        decoder_class = MODEL_MAPPING.get(type(config.get_text_config(decoder=True)), None)
        if isinstance(decoder_class, type):
            _check_class(decoder_class, name)
    return config


def rope_limit(config: PreTrainedConfig) -> int | None:
    """Return the length in tokens beyond which a decoder turns all keys otherwise (LongRoPE); None if it never does."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    limits = [part.get("original_max_position_embeddings") for part in kinds if part.get("rope_type") == "longrope"]
    return min((int(limit) for limit in limits if limit is not None), default=None)


def joins_images(model_class: type) -> bool:
    """Return whether a model lets the tokens of an image attend to each other in both directions."""
    source = _source_of(model_class)
    return any(name in source for name in ("or_mask_function", "block_sequence_ids", "token_type_ids_mask_function"))


def plain_implementation(model_class: type[PreTrainedModel]) -> str:
    """Return the attention implementation that a model must be loaded with, which computes what is not compressed."""
    return "sdpa" if model_class._supports_sdpa else "eager"


def _class_of(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class of transformers that generates text with this configuration; None if there is none."""
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if isinstance(found := mapping.get(type(config), None), type):
            return found
    return None


def is_full(layer: DynamicLayer, config: PreTrainedConfig) -> bool:
    """Return whether a layer attends to everything, be it through a window as long as the model's context."""
    if type(layer) is DynamicLayer:
        return True
    context = getattr(config, "max_position_embeddings", None)
    return context is not None and bool(layer.sliding_window >= context)


def _check_config(config: PreTrainedConfig, name: str) -> None:
    """Refuse, by name, a model that would answer wrongly or has nothing to compress."""
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        raise unsupported(name, "it is an encoder-decoder")
    if _is_known(config) and config.base_config_key != "text_config" and not (_class_of(config) or _class_of(text)):
        raise unsupported(name, "it generates no text")
    for kind in (config.model_type, text.model_type):
        if kind in _PECULIAR:
            raise unsupported(name, _PECULIAR[kind])
    if getattr(text, "kv_lora_rank", None) is not None:
        raise unsupported(name, "multi-head latent attention (MLA) caches no plain keys and values")
    if getattr(text, "alibi", False):
        raise unsupported(name, "it adds position biases to the attention logits (ALiBi)")
    if getattr(text, "num_kv_shared_layers", None):
        raise unsupported(name, "some of its layers share the cache of others")
    if not getattr(text, "is_causal", True) or getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        raise unsupported(name, "its attention is bidirectional")
    if getattr(text, "is_decoder", True) is False and "self.is_decoder" in _source_of(_class_of(text)):
        raise unsupported(name, "its attention is bidirectional unless its configuration has is_decoder=True")
    try:
        layers = DynamicCache(config=config).layers
    except (AttributeError, KeyError, TypeError, ValueError):
        raise unsupported(name, "transformers' own cache cannot be made from its configuration") from None
    for i, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise unsupported(name, f"layer {i} keeps a {type(layer).__name__}, not plain keys and values")
    if not any(is_full(layer, text) for layer in layers):
        raise unsupported(name, "it has sliding-window layers only, so there is nothing to compress")


def _source_of(model_class: type | None) -> str:
    """Return the source of the file that defines a class of transformers; an empty string for None."""
    return "" if model_class is None else inspect.getsource(sys.modules[model_class.__module__])


def _is_known(config: PreTrainedConfig) -> bool:
    """Return whether the configuration is one of transformers, not of code that comes with a model."""
    return type(config).__module__.startswith("transformers.") and config.model_type in CONFIG_MAPPING


def _check_class(model_class: type[PreTrainedModel], name: str) -> None:
    """Refuse, by name, a model or decoder whose attention is not ours to compute."""
    if not model_class._can_set_attn_implementation() or not getattr(model_class, "_supports_attention_backend", False):
        raise unsupported(name, "its attention bypasses transformers' attention interface")
    source = _source_of(model_class)
    if plain_implementation(model_class) != "sdpa" and "s_aux=" not in source and "softcap=" not in source:
        raise unsupported(name, "its attention does not run as attn_implementation='sdpa'")
