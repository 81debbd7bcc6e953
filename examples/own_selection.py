"""Decodes with a selection method of one's own, which scores tokens by the first half of their keys' channels.

python examples/own_selection.py [MODEL]
"""

import sys
from pydoc_data.topics import topics  # a long text that every Python has

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rocketkv import RocketKVCache, RocketKVConfig, enable
from rocketkv.budget import Split
from rocketkv.cache import WorkingSet
from rocketkv.selection import SelectionMethod


class HalfTheChannels(SelectionMethod):
    """Scores a token by the first half of its key's channels, which costs a quarter of the token's bytes."""

    def kept_tokens(self, seq_len: int, token_budget: int) -> int:
        """Let stage 1 keep twice the budget, so that scoring costs half of it."""
        return min(seq_len, 2 * token_budget)

    def split(self, num_tokens: int, token_budget: int, head_dim: int) -> Split:
        """Pages of one token, half of the channels, and attention to as many tokens as the rest of the budget pays."""
        return Split(1, head_dim // 2, max(1, token_budget - num_tokens // 4))

    def logits(self, query: Tensor, working: WorkingSet, num_channels: Tensor, scale: float) -> Tensor:
        """Return the dot products over these channels, `[B, Hkv, G, S]`."""
        keys = working.keys_and_values()[0][:, :, : working.max_length]
        half = keys.shape[3] // 2
        return scale * query[..., :half].float() @ keys[..., :half].float().mT

    def scored_bytes(
        self, lengths: Tensor, page_size: Tensor, num_channels: Tensor, head_dim: int, element_size: int
    ) -> Tensor:
        """Count what `logits` reads."""
        return lengths * (head_dim // 2) * element_size


name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name)
model = enable(AutoModelForCausalLM.from_pretrained(name))
chat = [{"role": "user", "content": topics["with"] + "\nWhat does the with statement do?"}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
for label, selection in {"half of the channels": HalfTheChannels(), "low-bit keys, the default": "lowbit"}.items():
    config = RocketKVConfig(token_budget=128, selection=selection, dense_below=0)
    cache = RocketKVCache(model.config, config)
    output = model.generate(**prompt, cache=cache, max_new_tokens=40, do_sample=False)
    print(f"{label}: {tokenizer.decode(output[0, prompt['input_ids'].shape[1] :])}\n{cache.stats().total}\n")
