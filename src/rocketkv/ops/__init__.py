"""The few tensor operations the method is made of; each docstring is its specification."""

from rocketkv.ops.attention import dense_attention, dense_decode, sparse_attention
from rocketkv.ops.pages import PageBounds
from rocketkv.ops.scores import best_tokens, token_probabilities, top_mask, window_scores

__all__ = [
    "PageBounds",
    "best_tokens",
    "dense_attention",
    "dense_decode",
    "sparse_attention",
    "token_probabilities",
    "top_mask",
    "window_scores",
]
