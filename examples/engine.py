"""Runs a decoder in plain torch, with random weights and without transformers, whose layers attend by `LayerCache`.

python examples/engine.py
"""

import torch
from torch import Tensor, nn

from rocketkv import LayerCache, RocketKVConfig

VOCABULARY, WIDTH, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 512, 256, 8, 2, 32, 4


def rotate(x: Tensor, first: int) -> Tensor:
    """Turn `[B, H, T, D]` by its positions, which begin at `first` (RoPE)."""
    positions = torch.arange(first, first + x.shape[2])
    angles = positions[:, None] / 10_000 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos())
    return torch.stack(turned, -1).flatten(-2)


class Layer(nn.Module):
    """One layer of the engine: projections, attention through the cache, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)

    def forward(self, x: Tensor, cache: LayerCache) -> Tensor:
        """Attend `[B, T, WIDTH]`: a prompt at once, or one token to what the cache chooses."""
        heads = self.qkv(nn.functional.rms_norm(x, (WIDTH,))).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        query, key, value = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        query, key = rotate(query, cache.num_seen), rotate(key, cache.num_seen)
        attend = cache.prefill if x.shape[1] > 1 else cache.decode
        return x + self.out(attend(query, key, value).transpose(1, 2).flatten(2))


@torch.inference_mode()
def main() -> None:
    """Read a prompt of 2,000 tokens, decode 20, and say what the caches hold."""
    torch.manual_seed(0)
    embedding, layers = nn.Embedding(VOCABULARY, WIDTH), [Layer() for _ in range(LAYERS)]
    caches = [LayerCache(RocketKVConfig(token_budget=64)) for _ in layers]
    token_ids = torch.randint(VOCABULARY, (1, 2000))
    for _ in range(20):
        x = embedding(token_ids)
        for layer, cache in zip(layers, caches, strict=True):
            x = layer(x, cache)
        token_ids = (x[:, -1:] @ embedding.weight.T).argmax(-1)
    stats = caches[0].stats()
    print(
        f"each layer saw {stats.num_seen:,.0f} tokens, keeps {stats.num_stored:,.0f}, read {stats.read_bytes:,} bytes"
    )


main()
