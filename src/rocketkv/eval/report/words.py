"""What the methods are called in plots, in a reader's words."""

NAMES = {
    "full": "full cache",
    "exact_topk": "exact top-k, the oracle",
    "snapkv": "SnapKV",
    "streaming_llm": "StreamingLLM",
    "quest": "Quest",
    "sparq": "SparQ",
    "hybrid": "page bounds alone",
    "rocketkv": "RocketKV",
    "rocketkv_mt": "RocketKV, multi-turn",
    "rocketkv_paper": "RocketKV (paper)",
}
OPTIONS = {"kv_dtype=int8": "8 bits", "selection=hybrid": "page bounds", "eviction=snapkv": "stage 1 by the sum"}


def words_of(method: str) -> str:
    """Return the words for a method of `METHODS`, with options after its name or without."""
    name, *options = method.split(":")
    return ", ".join([NAMES.get(name, name), *(OPTIONS.get(option, option) for option in options)])
