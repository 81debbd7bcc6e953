"""Which models of transformers can decode through a compressed cache, and why the others cannot.

One judge serves `enable(model)` and `RocketKVCache(model.config, ...)`. The judge cannot know everything, such as the
code of a model that does not come with transformers; the hooks and the attention function refuse the rest.
"""

import inspect
import sys
from functools import cache as once

from torch.nn import Module, ModuleList
from transformers import CONFIG_MAPPING, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
)

from rocketkv.errors import InputError, UnsupportedError

_FLAG = "_supports_attention_backend"  # of the classes that say that they use the attention interface
_INTERFACE = "ALL_ATTENTION_FUNCTIONS.get_interface"
_BYPASSES = "its attention bypasses transformers' attention interface"
_KEEPS_OPTIONS = "its layers hand no options down to their attention"
_BIASED = "its attention adds position biases to the logits"
_LAYERS = (  # the layers of transformers' own cache that a model may have; earlier versions lack some
    "DummyLayer",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "LinearAttentionLayer",
)
_PECULIAR = {  # by model_type: reasons that neither the configuration nor the class tells
    "diffllama": "its attention is the difference of two",
    "doge": "it adds a mask of its own, made from the values, to the attention logits",
    "dory": "it runs its layers several times over and caches each time anew",
    "hrm_text": "it runs its layers several times over and caches each time anew",
    "inkling_text": _BIASED,
    "inkling2_text": _BIASED,
    "inkling2_loop_text": _BIASED,
    "llama4_text": "its layers attend in chunks",
    "minimax": "it takes caches of its own class only",
    "mllama_text_model": "some of its layers attend to images only",
    "modernbert-decoder": "its decoder cannot be told apart from its head",
    "moshi": "its attention does not say how wide its window is",
    "nemotron": _KEEPS_OPTIONS,
    "paligemma": "its prompts attend in both directions",
    "qwen4_exp_text": "its attention selects tokens by an index of its own",
    "stablelm": _KEEPS_OPTIONS,
}
_SHARES = ("gemma3n_text", "gemma4_text", "gemma4_unified_text")  # by model_type: see `shared_layers`
_STARTS_ANEW = ("jamba", "zamba")  # by model_type: their states forget what came before a prompt
_COUNTS_FROM_0 = ("bamba",)  # these take the first new token to be at position 0 where they are not told


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
    if not getattr(type(decoder), _FLAG, False) and not _hands_options_down(decoder):
        raise unsupported(name, _BYPASSES)
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


def shared_layers(config: PreTrainedConfig) -> dict[int, int]:
    """Return the last layers of a decoder that share the cache of an earlier one, by index, each with that one."""
    text = config.get_text_config(decoder=True)
    if not (num_shared := getattr(text, "num_kv_shared_layers", None)):
        return {}
    kinds = text.layer_types
    last = {kind: i for i, kind in enumerate(kinds[:-num_shared])}  # the last layer of each kind with a cache
    return {i: last[kinds[i]] for i in range(len(kinds) - num_shared, len(kinds))}


def check_later_prompt(decoder: PreTrainedModel, num_new: int, position_ids: object) -> None:
    """Refuse `num_new` tokens that come after others where a decoder would take them for the beginning of a text.

    Raises:
        UnsupportedError: the decoder's recurrent states start anew at each prompt of several tokens.
        InputError: the decoder needs to be told positions.
    """
    name, kind = type(decoder).__name__, decoder.config.model_type
    if num_new > 1 and kind in _STARTS_ANEW:
        raise UnsupportedError(
            f"the recurrent states of {name} start anew at each prompt, with any cache; call cache.reset() and give "
            "the whole text at once."
        )
    if position_ids is None and kind in _COUNTS_FROM_0:
        raise InputError(f"{name} counts positions from 0 in each forward pass; give position_ids, as generate does.")


@once
def joins_images(module: str) -> bool:
    """Return whether models of a module, given by name, let tokens of an image attend to each other both ways."""
    source = inspect.getsource(sys.modules[module])
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


def is_full(layer: object, config: PreTrainedConfig) -> bool:
    """Return whether a layer attends to everything, be it through a window as long as the model's context."""
    if not isinstance(layer, DynamicLayer):
        return False
    window, context = getattr(layer, "sliding_window", None), getattr(config, "max_position_embeddings", None)
    return window is None or (context is not None and bool(window >= context))


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
    if getattr(text, "num_kv_shared_layers", None) and text.model_type not in _SHARES:
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
        if type(layer).__name__ not in _LAYERS:
            raise unsupported(name, f"layer {i} keeps a {type(layer).__name__}, not plain keys and values")
    if not any(is_full(layer, text) for layer in layers):
        raise unsupported(name, "no layer of it attends to the whole text, so there is nothing to compress")


def _source_of(model_class: type | None) -> str:
    """Return the source of the file that defines a class of transformers; an empty string for None."""
    return "" if model_class is None else inspect.getsource(sys.modules[model_class.__module__])


def _is_known(config: PreTrainedConfig) -> bool:
    """Return whether the configuration is one of transformers, not of code that comes with a model."""
    return type(config).__module__.startswith("transformers.") and config.model_type in CONFIG_MAPPING


def _check_class(model_class: type[PreTrainedModel], name: str) -> None:
    """Refuse, by name, a model or decoder whose attention is not ours to compute."""
    source = _source_of(model_class)
    uses_interface = getattr(model_class, _FLAG, False) or _INTERFACE in source
    if not model_class._can_set_attn_implementation() or not uses_interface:
        raise unsupported(name, _BYPASSES)
    if plain_implementation(model_class) != "sdpa" and "s_aux=" not in source and "softcap=" not in source:
        raise unsupported(name, "its attention does not run as attn_implementation='sdpa'")


def _hands_options_down(decoder: PreTrainedModel) -> bool:
    """Return whether each layer that attends to everything uses the attention interface, with all options of its pass.

    Some classes use the interface and do not say so in their flag; what tells is the code of each attention module,
    and of all modules around it.
    """
    layers = DynamicCache(config=decoder.config).layers
    wanted = {i for i, layer in enumerate(layers) if is_full(layer, decoder.config)}
    for path, module in decoder.named_modules():
        if getattr(module, "layer_idx", None) in wanted and _INTERFACE in _forward_source(module):
            parts = path.split(".")
            around = [decoder.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]
            if all(_forward_source(part).count("**kwargs") > 1 for part in around if not isinstance(part, ModuleList)):
                wanted.remove(module.layer_idx)
    return not wanted


def _forward_source(module: Module) -> str:
    """Return the source of a module's forward pass."""
    return inspect.getsource(type(module).forward)
