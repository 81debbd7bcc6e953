"""Configurations, as small as possible, of every model type that transformers generates text with."""

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

# Whatever a configuration calls its sizes; each takes those that it knows.
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
    "d_model": 32,
    "d_ff": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "rotary_dim": 8,
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
SPECIAL["lfm2_moe"] = {"layer_types": ["conv", "full_attention"]}
SPECIAL["gpt_neo"] = {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}
# Generate the same tokens; docs/models.md lists them.


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
            and hasattr(config, name)
            and not isinstance(getattr(config, name), (list, tuple, dict))
            and not isinstance(getattr(type(config), name, None), property)
        }

    options = known(plain)
    for name in plain.sub_configs:
        if (part := getattr(plain, name, None)) is not None:
            options[name] = {**known(part), "model_type": part.model_type}
    return config_class(**{**options, **SPECIAL.get(kind, {})})
