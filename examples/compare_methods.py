"""Compares methods on a text: how often each predicts the full cache's next token, and what it reads and holds.

The prompt is computed once; every method forks from it.

python examples/compare_methods.py [MODEL [TEXT_FILE]]
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics  # a long text that every Python has

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rocketkv import RocketKVCache, RocketKVConfig, enable

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
text = Path(sys.argv[2]).read_text() if len(sys.argv) > 2 else topics["try"]
tokenizer = AutoTokenizer.from_pretrained(name)
model = enable(AutoModelForCausalLM.from_pretrained(name))
NEW_TOKENS, BUDGET = 64, 64

methods = {
    "full cache": {"eviction": "keep_all", "selection": "dense"},
    "RocketKV": {},
    "RocketKV, 8 bits": {"kv_dtype": "int8"},
    "RocketKV (paper)": {"eviction": "snapkv", "selection": "hybrid_paper", "recent_tokens": 0},
    "SnapKV": {"eviction": "snapkv", "selection": "dense"},
    "StreamingLLM": {"eviction": "streaming_llm", "selection": "dense"},
}


@torch.inference_mode()
def predict(config: RocketKVConfig) -> tuple[torch.Tensor, RocketKVCache]:
    """Give the text's own tokens one by one; return the predicted ones, and the cache."""
    cache = past.fork(config)
    steps = [model(token[None, None], cache=cache).logits[0, -1].argmax() for token in continuation]
    return torch.stack(steps), cache


ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
prompt, continuation = ids[:-NEW_TOKENS], ids[-NEW_TOKENS:]
past = RocketKVCache(model.config, RocketKVConfig(token_budget=BUDGET, mode="multi_turn"), keep_queries=32)
with torch.inference_mode():
    model(prompt[None], cache=past)

print(f"{len(prompt):,} tokens, budget {BUDGET}\n{'':18} agreement  MiB read  MiB held")
expected, _ = predict(RocketKVConfig(token_budget=BUDGET, **methods["full cache"]))
for label, options in methods.items():
    predicted, cache = predict(RocketKVConfig(token_budget=BUDGET, dense_below=0, **options))
    agreement, total = (predicted == expected).float().mean(), cache.stats().total
    print(f"{label:18} {agreement:9.0%} {total.read_bytes / 2**20:9.1f} {total.kv_bytes / 2**20:9.1f}")
