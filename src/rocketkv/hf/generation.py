"""Methods of a model that stand before its own: `generate`, and the one behind `generate_batch`."""

from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from rocketkv.hf.history import UNKNOWN
from rocketkv.hf.hooks import Given, given, passed_cache
from rocketkv.hf.interface import NAMES


@wraps(GenerationMixin.generate)
def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Generate as the model's class does, after a check that a compressed cache among the arguments fits the text."""
    plain = type(self).generate
    cache = passed_cache(kwargs)
    if cache is None:
        return plain(self, *args, **kwargs)
    ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    mask, embeddings = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
    if embeddings is not None:
        ids = torch.full(embeddings.shape[:2], UNKNOWN, device=embeddings.device)
    # As transformers reads it: a mask that is longer than the text says that the text is only what is new.
    if isinstance(ids, Tensor) and ids.dim() == 2 and (mask is None or mask.shape[-1] == ids.shape[1]):
        cache.check_continued(ids)
    token = given.set(Given(self, self.get_decoder(), cache))
    positioned = keeper_of_offsets(self)
    if positioned is not None and cache.history.num_columns > 0:
        positioned.rope_deltas = cache.history.offsets  # another conversation may have left its own there
    try:
        return plain(self, *args, **kwargs)
    finally:
        given.reset(token)
        if positioned is not None:
            cache.history.offsets = positioned.rope_deltas


def keeper_of_offsets(model: Any) -> Any:
    """Return the part of a model that keeps how far images have moved positions (M-RoPE); None if none does."""
    return next((part for part in (model, getattr(model, "model", None)) if hasattr(part, "rope_deltas")), None)


@wraps(GenerationMixin.init_continuous_batching)
def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Begin `generate_batch` as the model's class does, with transformers' attention until its manager stops."""
    own = self.config._attn_implementation
    self.set_attn_implementation(next((plain for plain, name in NAMES.items() if name == own), own))
    try:
        manager = type(self).init_continuous_batching(self, *args, **kwargs)
    except BaseException:
        self.set_attn_implementation(own)
        raise
    manager._original_attn_impl = own  # the manager returns to this implementation when it stops
    return manager


METHODS = (generate, init_continuous_batching)
