"""Configurations, as small as possible, of every model type that transformers generates text with."""

from functools import cache
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from rocketkv import enable
from rocketkv.hf.versions import CACHE_ARGUMENT

# Whatever a configuration calls its sizes; each takes those that it knows.
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
    "init_std": 0.3,
    "d_model": 64,
    "d_ff": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "rotary_dim": 16,
    "partial_rotary_factor": 1.0,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_experts": 2,
    "num_local_experts": 2,
    "n_routed_experts": 2,
    "moe_num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_k": 1,
    "moe_topk": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "mamba_expand": 2,
    "mamba_d_ssm": 128,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 32,
    "mamba_head_dim": 32,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "mamba_d_state": 16,
    "ssm_state_size": 16,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
DECODER = {"is_decoder": True}
SPECIAL: dict[str, dict[str, Any]] = {  # what they need beside that
    name: DECODER
    for name in (
        *("bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "roberta"),
        *("roberta-prelayernorm", "roc_bert", "xlm-roberta", "xlm-roberta-xl"),
    )
}
SPECIAL["mimo_v2_flash"] = {"v_head_dim": 6}  # values narrower than keys, as in the released model
SPECIAL |= {  # hybrids
    name: {"layer_types": [kind, "full_attention"]}
    for kind, names in (
        ("conv", ("lfm2", "lfm2_moe", "lfm3")),
        (
            "linear_attention",
            ("granitemoehybrid", "minimax", "olmo_hybrid", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
        ),
    )
    for name in names
}
HYBRIDS = (
    "qwen3_next",
    "falcon_h1",
    "lfm2",
    "nemotron_h",
)  # states per layer, or beside tokens; short; no cache at all
_GEMMA: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128, "tie_word_embeddings": False}
_SHARING = {"num_hidden_layers": 6, "layer_types": _GEMMA["layer_types"] * 3, "num_kv_shared_layers": 4}
SPECIAL["gemma4_unified_text"] = {**_GEMMA, **_PER_LAYER, "global_head_dim": 32}
SPECIAL["gemma4_text"] = {**SPECIAL["gemma4_unified_text"], **_SHARING, "initializer_range": 0.5}
SPECIAL["gemma3n_text"] = {
    **_PER_LAYER,
    **_SHARING,
    "sliding_window": 16,
    "initializer_range": 0.5,
    "intermediate_size": 48,
    "activation_sparsity_pattern": [0.0] * 6,
    "laurel_rank": 4,
}
SHARED = ("gemma3n_text", "gemma4_text")  # layers that share the cache of others
SPECIAL["bamba"] = {"attn_layer_indices": [1]}
SPECIAL["jamba"] = {"attn_layer_offset": 1, "attn_layer_period": 2}
SPECIAL["lara_mini"] = {"sliding_window": 16}
SPECIAL["blt"] = {"encoder_hash_byte_group_vocab": 64}  # else three million embeddings
SPECIAL["gpt_neo"] = {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}


# Types that answer as with a full cache; `test_families.py` has the others.
WORKS = """
    afmoe apertus apertus1p5_text arcee aria_text bamba bart beam bert bert-generation biogpt
    bitnet blenderbot blenderbot-small camembert codegen cohere cohere2 cohere2_moe ctrl cwm
    data2vec-text dots1 electra emu3 ernie ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe
    falcon_h1 flex_olmo flint fuyu gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4 gemma4_text
    gemma4_unified gemma4_unified_text glm glm4 glm4_moe gpt-sw3
    gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite granite_swa granitemoe granitemoe_swa
    granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax
    internlm3 iquestcoder jais2 jamba jetmoe kolibri1 laguna lfm2 lfm2_moe lfm3 llama marian
    mbart mellum mimo_v2_flash minimax_m2 minimax_m3_vl_text ministral ministral3 mistral
    mixtral moss_transcribe_diarize nanochat nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe opt
    pegasus persimmon phi phi3 phi4_multimodal phimoe plbart qwen2 qwen2_moe qwen3 qwen3_5
    qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next roberta roberta-prelayernorm
    roc_bert sarvam_moe seed_oss smollm3 solar_open starcoder2 vaultgemma whisper xlm-roberta
    xlm-roberta-xl zaya
"""

# They bypass the attention interface in earlier versions of transformers, or warn.
SINCE_5_24 = """
    codegen gpt_bigcode gptj
"""

UNCOMPILED = {  # types that `rocketkv.compile` leaves as they are, by the reason
    "windows or states": """
        bamba falcon_h1 gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text gpt_oss granite_swa
        granitemoe_swa granitemoehybrid jamba lfm2 lfm2_moe lfm3 mimo_v2_flash nemotron_h olmo_hybrid
        qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next zaya
    """,
    "counts positions itself": """
        bart blenderbot blenderbot-small marian mbart pegasus plbart qwen2_vl qwen2_5_vl qwen3_vl
    """,
    "torch cannot trace it": "ctrl",
}


def tiny_config(kind: str) -> PreTrainedConfig:
    """Return a configuration of this type with the smallest sizes that it allows."""
    config_class = CONFIG_MAPPING[kind]
    plain = config_class()

    def known(config: PreTrainedConfig) -> dict[str, Any]:
        names = {**{name: name for name in SIZES}, **{name: name for name in config.attribute_map}}
        return {
            name: SIZES[name]
            for name in names
            if name in SIZES
            and not isinstance(_read(config, name), (list, tuple, dict, type(...)))
            and not isinstance(getattr(type(config), name, None), property)
        }

    options = known(plain)
    for name in plain.sub_configs:
        if (part := getattr(plain, name, None)) is not None:
            options[name] = {**known(part), "model_type": part.model_type, **SPECIAL.get(part.model_type, {})}
    return config_class(**{**options, **SPECIAL.get(kind, {})})


def _read(config: PreTrainedConfig, name: str) -> Any:
    """Return an attribute; `...` for one that is not there, and None for one that differs from layer to layer."""
    try:
        return getattr(config, name, ...)
    except RuntimeError:
        return None


@cache
def enabled_model(kind: str) -> PreTrainedModel:
    """Return the enabled random model of this type; tests share it, and must leave it as it is."""
    torch.manual_seed(0)
    return enable(AutoModelForCausalLM.from_config(tiny_config(kind)).eval())


def skip_before_5_24(kind: str) -> None:
    """Skip a test of a type that works with transformers 5.24 and later only, where an earlier one is at hand."""
    if kind in SINCE_5_24.split() and CACHE_ARGUMENT == "past_key_values":
        pytest.skip("an earlier transformers")
