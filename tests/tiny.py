"""Tiny random models of the architectures that users bring: for shapes and laws, not for accuracy."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from rocketkv import RocketKVConfig

COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # far from uniform logits, so that greedy choices are no ties
}
GROUPED = {**COMMON, "num_key_value_heads": 2}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=None),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=32),
    "phi3": Phi3Config(**GROUPED),
    "phi3_long_window": Phi3Config(**{**GROUPED, "sliding_window": 2048}),  # as long as the context: no window at all
    "olmo2": Olmo2Config(**GROUPED),
    "gpt_neox": GPTNeoXConfig(**COMMON, rotary_pct=1.0),  # by 0.25, keys of equal tokens would tie where not rotated
    "gemma3": Gemma3TextConfig(
        **GROUPED,
        head_dim=32,
        sliding_window=16,
        query_pre_attn_scalar=48,  # a scale other than 1 / sqrt(head_dim)
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    ),
}

SMALL: dict[str, Any] = {"window_size": 8, "kernel_size": 5}
EVERYTHING = RocketKVConfig(dense_below=0, token_budget=4096)
COMPRESSED = RocketKVConfig(dense_below=0, token_budget=10, **SMALL)
COMPRESSED_MT = RocketKVConfig(dense_below=0, token_budget=10, mode="multi_turn", **SMALL)


def tiny_model(name: str, **changes: int) -> PreTrainedModel:
    """Return a random model, the same at every call."""
    torch.manual_seed(0)
    config = type(CONFIGS[name])(**CONFIGS[name].to_dict() | changes)
    return AutoModelForCausalLM.from_config(config).eval()


def prompts(*lengths: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random left-padded prompts of these lengths and their attention mask."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.int64), torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(3, 128, (length,), generator=generator)
        mask[row, width - length :] = 1
    return ids, mask


def save_tiny(folder: Path, **changes: int) -> None:
    """Save a tiny Llama and a tokenizer of single bytes into a folder, as a user's own model would lie there."""
    tiny_model("llama", vocab_size=256, **changes).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def save_tiny_chat(folder: Path) -> None:
    """Save the same with a longer context, and a tokenizer that pads and has a chat template."""
    save_tiny(folder, max_position_embeddings=16384)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)


@torch.inference_mode()
def generate(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, new: int = 12, **options: Any) -> Tensor:
    """Run a model's own `generate`, greedy and to the end; return `[B, T + new]` token ids."""
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    tokens: Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=new, **options)
    return tokens
