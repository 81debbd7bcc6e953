"""Asks one question about documents of different lengths, all in one batch.

python examples/batch.py [MODEL]
"""

import sys
from pydoc_data.topics import topics  # long texts that every Python has

from transformers import AutoModelForCausalLM, AutoTokenizer

from rocketkv import RocketKVCache, RocketKVConfig, enable

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = enable(AutoModelForCausalLM.from_pretrained(name))

documents = ("with", "while", "assert", "import")
chats = [[{"role": "user", "content": topics[document] + "\nSum this up in a sentence."}] for document in documents]
batch = tokenizer.apply_chat_template(
    chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
)

cache = RocketKVCache(model.config, RocketKVConfig(token_budget=128))
output = model.generate(**batch, cache=cache, max_new_tokens=40, do_sample=False)
for row, document in enumerate(documents):
    answer = tokenizer.decode(output[row, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{document}: {answer}\n")
print(f"{cache.stats().total.kv_bytes / 2**20:.1f} MiB for {len(documents)} documents")
