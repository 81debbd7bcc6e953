"""Helpers for the tests of a cache inside transformers' `generate`."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rocketkv import RocketKVCache, RocketKVConfig
from rocketkv.hf.versions import pass_cache
from tiny import COMPRESSED, COMPRESSED_MT, CONFIGS, generate, prompts

architectures = pytest.mark.parametrize("name", list(CONFIGS))
modes = pytest.mark.parametrize("config", [COMPRESSED, COMPRESSED_MT], ids=["single_turn", "multi_turn"])
names = pytest.mark.parametrize("name", ["llama", "gemma3"])
MORE = prompts(20, seed=7)[0]


def answered(
    model: PreTrainedModel, config: RocketKVConfig, ids: Tensor, **options: Any
) -> tuple[RocketKVCache, Tensor]:
    """Return a cache after one answer, and the text of the conversation."""
    cache = RocketKVCache(model.config, config)
    return cache, generate(model, ids, **pass_cache(cache), **options)


def forward(model: PreTrainedModel, cache: RocketKVCache, ids: Tensor, **options: Any) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids, **pass_cache(cache), **options).logits
    return logits


def live_token_bytes() -> int:
    """Return the bytes of all live four-dimensional tensors with this model's two KV heads."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is Tensor and thing.dim() in (4, 5) and thing.shape[:2] == (1, 2):  # no traced ones
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
