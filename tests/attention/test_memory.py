"""A 32K prompt must prefill within the memory of dense SDPA; child processes measure their peak memory."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

PREFILL = """
import re, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from rocketkv import RocketKVCache, RocketKVConfig, enable
from rocketkv.hf.versions import pass_cache

def memory_kib(which):
    return int(re.search(which + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
config = LlamaConfig(
    vocab_size=64, hidden_size=192, intermediate_size=512, num_hidden_layers=2, num_attention_heads=3,
    num_key_value_heads=1, max_position_embeddings=40000,
)
model = AutoModelForCausalLM.from_config(config).eval()
ids = torch.randint(64, (1, 32768))
if sys.argv[1] == "dense":
    cache = DynamicCache(config=config)
else:
    cache = RocketKVCache(enable(model).config, RocketKVConfig(dense_below=0, token_budget=256))
with torch.inference_mode():
    model(input_ids=ids[:, :64], logits_to_keep=1)
    before = memory_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    model(input_ids=ids, **pass_cache(cache), logits_to_keep=1)
print(memory_kib("VmHWM") - before)
"""


def peak_mib(kind: str) -> float:
    command = [sys.executable, "-c", PREFILL, kind]
    # freed blocks go back to the system at once, so that the peak is one of live memory and not of malloc's habits
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(result.stdout) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_a_32k_prompt_prefills_within_the_memory_of_dense_sdpa(report: Callable[[str], None]) -> None:
    dense, ours = peak_mib("dense"), peak_mib("rocketkv")
    report(f"peak of a 32K prefill: dense {dense:.0f} MiB, RocketKV {ours:.0f} MiB")
    assert ours <= dense
