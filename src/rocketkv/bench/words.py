"""What the lines and panels and axes of a plot are called, in a reader's words, and the colours of the lines."""

from collections.abc import Iterable
from itertools import cycle

OURS = ("#0072B2", "#3FA0D8", "#004C78", "#6E62B6")  # blues, as many as there are lines of RocketKV
THEIRS = {"all tokens, our kernels": "#00875F", "all tokens, torch's SDPA": "#B06A00", "torch's SDPA": "#B06A00"}
OTHER = "#C4501B"  # transformers
WORDS = {
    "sparse": "RocketKV",
    "rocketkv": "RocketKV",
    "sparse:hybrid": "RocketKV, page bounds",
    "sparse:lowbit:int8": "RocketKV, 8-bit cache",
    "dense": "all tokens, our kernels",
    "attention": "RocketKV, the kernel alone",
    "sdpa": "torch's SDPA",
    "sdpa_grouped": "all tokens, torch's SDPA",
    "sdpa_gqa": "all tokens, torch's SDPA",
    "flash_attn": "all tokens, FlashAttention",
    "flashinfer": "all tokens, FlashInfer",
    "full": "transformers",
    "static": "transformers, static cache",
    "transformers_default": "transformers",
    "transformers_static": "transformers, static cache",
    "model_rocketkv": "RocketKV",
    "model_transformers": "transformers",
    "decode_full": "transformers, decoding",
    "decode_rocketkv": "RocketKV, decoding",
    "prefill_full": "transformers, prompt",
    "prefill_rocketkv": "RocketKV, prompt",
}
PANELS = {  # what is drawn of a benchmark, and in which unit
    "decode": {"median_ms": (1.0, "milliseconds per token"), "kv_bytes": (2.0**20, "KV cache, MiB")},
    "memory": {"peak_rss_bytes": (2.0**30, "peak memory of the process, GiB")},
}
ACROSS = {"seq_len": "length of the text, tokens", "token_budget": "token budget", "batch": "rows of the batch"}
TIME = {"median_ms": (1.0, "milliseconds")}


def colors_of(labels: Iterable[str]) -> dict[str, str]:
    """Return a colour per label: blues for RocketKV, and the same one for a baseline in all plots."""
    ours = cycle(OURS)
    return {label: next(ours) if label.startswith("RocketKV") else THEIRS.get(label, OTHER) for label in labels}
