"""The few pure tensor operations that the method is made of; each docstring specifies its operation."""

from rocketkv.ops.attention import decode_densely, decode_sparsely, prefill_densely
from rocketkv.ops.gather import take_tokens
from rocketkv.ops.int8 import dequantize_tokens, quantize_tokens, stored_bytes
from rocketkv.ops.lowbit import (
    GROUP,
    GROUPS_PER_BLOCK,
    LowBitKeys,
    append_lowbit,
    build_lowbit,
    lowbit_logits,
    quantize_groups,
)
from rocketkv.ops.memory import new_storage, on_device
from rocketkv.ops.pages import (
    PAGES_PER_BLOCK,
    PageBounds,
    bound_logits,
    build_pages,
    extend_spread,
    fold_into_pages,
    hybrid_logits,
)
from rocketkv.ops.scores import choose_tokens, score_tokens, score_window, topk_mask
from rocketkv.ops.terms import NO_TERMS, LogitTerms

__all__ = [
    "GROUP",
    "GROUPS_PER_BLOCK",
    "NO_TERMS",
    "PAGES_PER_BLOCK",
    "LogitTerms",
    "LowBitKeys",
    "PageBounds",
    "append_lowbit",
    "bound_logits",
    "build_lowbit",
    "build_pages",
    "choose_tokens",
    "decode_densely",
    "decode_sparsely",
    "dequantize_tokens",
    "extend_spread",
    "fold_into_pages",
    "hybrid_logits",
    "lowbit_logits",
    "new_storage",
    "on_device",
    "prefill_densely",
    "quantize_groups",
    "quantize_tokens",
    "score_tokens",
    "score_window",
    "stored_bytes",
    "take_tokens",
    "topk_mask",
]
