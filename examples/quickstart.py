"""Asks a question about a long text, with the compressed cache and with transformers' own.

python examples/quickstart.py [MODEL]
"""

import sys
from pydoc_data.topics import topics  # a long text that every Python has

from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from rocketkv import RocketKVCache, RocketKVConfig, enable

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name)
model = enable(AutoModelForCausalLM.from_pretrained(name))

chat = [{"role": "user", "content": topics["try"] + "\nWhat is the finally clause for?"}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)

compressed = RocketKVCache(model.config, RocketKVConfig(token_budget=128))
for cache in (compressed, DynamicCache(config=model.config)):
    output = model.generate(**prompt, cache=cache, max_new_tokens=40, do_sample=False)
    print(f"{type(cache).__name__}: {tokenizer.decode(output[0, prompt['input_ids'].shape[1] :])}\n")

total = compressed.stats().total
print(
    f"Of {total.num_seen:,.0f} tokens {total.num_stored:,.0f} are kept in {total.retained_fraction:.0%} of the bytes; "
    f"a step reads {total.read_bytes / 2**20:.1f} MiB, 1/{total.compression_factor:.0f} of what the full cache reads."
)
