"""Traces of a model's attention, and the decode steps that the study takes from them."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rocketkv.errors import InputError
from rocketkv.eviction import Peak, SnapKV
from rocketkv.hf.models import load

NEW_TOKENS = 256  # tokens of the text after the prefix
WINDOW = 32  # last queries of the prefix, which vote in stage 1
KERNEL = 63  # the width of stage 1's max-pooling, in tokens


class Trace(NamedTuple):
    """Holds what a layer was given: queries `[Hq, T, D]`, keys and values `[Hkv, T, D]`, bfloat16; logits' scale."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float


class Held(NamedTuple):
    """The tokens of a case that stage 1 kept, and all tokens since."""

    prompt_tokens: int
    keys: Tensor  # [Hkv, M, D]
    values: Tensor  # [Hkv, M, D]
    logits: Tensor  # [P, Hkv, G, M], exact
    lengths: Tensor  # [P] int64, tokens that each step has, itself included


class Case:
    """Some decode steps of one layer after one prefix."""

    def __init__(self, trace: Trace, length: int, steps: int) -> None:
        """Take `steps` evenly spread of the NEW_TOKENS steps after the first `length` tokens."""
        query, key, value = (x[:, : length + NEW_TOKENS].float() for x in trace[:3])
        self.length = length
        self.keys, self.values = key, value
        self.ages = torch.linspace(1, NEW_TOKENS, steps).long()  # [P], tokens since the prefix, the step's own included
        grouped = query.reshape(key.shape[0], -1, *query.shape[1:])  # [Hkv, G, T, D]
        self.query = grouped[:, :, length - 1 + self.ages].permute(2, 0, 1, 3).contiguous()  # [P, Hkv, G, D]
        self.window = query[None, :, length - WINDOW : length]  # [1, Hq, W, D]
        self.scale = trace.scale
        logits = dot(self.query, key) * self.scale
        beyond = torch.arange(key.shape[1]) >= (length + self.ages)[:, None]
        self.logits = logits.masked_fill(beyond[:, None, None], -torch.inf)
        self.full = mix(self.logits.softmax(-1), value)
        self._held: dict[tuple[int, bool], Held] = {}

    def hold(self, num_tokens: int, *, by_peak: bool) -> Held:
        """Let stage 1 keep `num_tokens` of the prefix, by the peak or by the sum of their attention."""
        which = (num_tokens, by_peak)
        if which not in self._held:
            self._held[which] = self._keep(num_tokens, Peak if by_peak else SnapKV)
        return self._held[which]

    def _keep(self, num_tokens: int, eviction: type[SnapKV]) -> Held:
        if num_tokens >= self.length:
            return Held(self.length, self.keys, self.values, self.logits, self.length + self.ages)
        prefix = self.keys[None, :, : self.length]
        stays = eviction(WINDOW, KERNEL).keep(
            self.window,
            prefix,
            lengths=torch.full(prefix.shape[:2], self.length),
            num_queries=torch.tensor([WINDOW]),
            num_tokens=torch.tensor([num_tokens]),
            scale=self.scale,
        )
        assert stays is not None
        kept = stays[0].nonzero()[:, 1].reshape(prefix.shape[1], num_tokens)
        new = torch.arange(self.length, self.keys.shape[1]).expand(kept.shape[0], -1)
        places = torch.cat([kept, new], 1)  # [Hkv, M]
        rows = places[..., None].expand(-1, -1, self.keys.shape[2])
        logits = self.logits.gather(3, places[None, :, None].expand(*self.logits.shape[:3], -1))
        return Held(num_tokens, self.keys.gather(1, rows), self.values.gather(1, rows), logits, num_tokens + self.ages)


def dot(query: Tensor, keys: Tensor) -> Tensor:
    """Multiply `[P, Hkv, G, D]` with `[Hkv, M, D]`; return `[P, Hkv, G, M]`."""
    steps, heads, group, _ = query.shape
    products = query.transpose(0, 1).flatten(1, 2) @ keys.transpose(1, 2)
    result: Tensor = products.reshape(heads, steps, group, -1).transpose(0, 1)
    return result


def mix(weights: Tensor, values: Tensor) -> Tensor:
    """Sum `[Hkv, M, D]` with weights `[P, Hkv, G, M]`; return `[P, Hkv, G, D]`."""
    return dot(weights, values.transpose(1, 2))


@torch.inference_mode()
def capture(name: str, text: Path, num_tokens: int, num_layers: int, cache: Path) -> list[Trace]:
    """What some layers are given on `num_tokens` tokens from the middle of a text, kept in `cache`.

    The layers are spread evenly over those that attend to every token; layers with a sliding window are left out.

    Raises:
        InputError: the text is too short, or the model cannot be loaded or has too few such layers.
    """
    file = cache / f"{Path(name).name}-{text.stem}-{num_tokens}-{num_layers}.pt"
    if file.is_file():
        return [Trace(*layer) for layer in torch.load(file)]
    model, tokenizer = load(name, "float32")
    first = tokenizer("").input_ids  # a token that the model knows texts to begin with, or none
    token_ids = tokenizer(text.read_text(), add_special_tokens=False, verbose=False).input_ids
    start = (len(token_ids) - num_tokens) // 2
    if start < 0:
        raise InputError(f"{text} has {len(token_ids)} tokens, not {num_tokens}; give a longer text.")
    layers = [i for i, layer in enumerate(DynamicCache(config=model.config).layers) if not layer.is_sliding]
    if num_layers > len(layers):
        raise InputError(
            f"--layers {num_layers} is more than the {len(layers)} layers of {name} that attend to every token; "
            "give fewer."
        )
    wanted = {layers[round(x)] for x in torch.linspace(0, len(layers) - 1, num_layers).tolist()}
    traces: list[Trace] = []

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scaling: float, **rest: Any
    ) -> tuple[Tensor, None]:
        if module.layer_idx in wanted:
            traces.append(Trace(query[0].bfloat16(), key[0].bfloat16(), value[0].bfloat16(), scaling))
        output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **rest)
        return output

    AttentionInterface.register("forms", attend)
    AttentionMaskInterface.register("forms", sdpa_mask)
    model.set_attn_implementation("forms")
    model.get_decoder()(torch.tensor([(first + token_ids[start : start + num_tokens])[:num_tokens]]), use_cache=False)
    cache.mkdir(parents=True, exist_ok=True)
    torch.save([tuple(layer) for layer in traces], file)
    return traces
