"""Asks several questions about one document over one cache, which reads the document once.

python examples/conversation.py [MODEL]
"""

import sys
from pydoc_data.topics import topics  # a long text that every Python has

from transformers import AutoModelForCausalLM, AutoTokenizer

from rocketkv import RocketKVCache, RocketKVConfig, enable

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name)
model = enable(AutoModelForCausalLM.from_pretrained(name))

# The archive of multi_turn keeps every token, so that each question may ask about anything.
cache = RocketKVCache(model.config, RocketKVConfig(token_budget=128, mode="multi_turn"))
chat = [{"role": "user", "content": topics["with"] + "\nWhat does the with statement do?"}]
for next_question in ("Which methods does a context manager have?", "Give a short example.", None):
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    length = prompt["input_ids"].shape[1]
    # Written out and read again, an answer may become other tokens: the cache goes back to what both have in common.
    num_new = length - cache.rewind_to(prompt["input_ids"])
    output = model.generate(**prompt, cache=cache, max_new_tokens=40, do_sample=False)
    answer = tokenizer.decode(output[0, length:], skip_special_tokens=True)
    print(f"{num_new:,} of {length:,} tokens computed: {answer}\n")
    chat += [{"role": "assistant", "content": answer}, {"role": "user", "content": next_question}]
