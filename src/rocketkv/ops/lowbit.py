"""Low-bit keys, an index of stage 2: the kept keys in 4 bits, channel by channel.

GROUP consecutive tokens of a channel share a least value and a step; a key is the least value plus a whole number of
steps, 0 to LEVELS. Codes are `[B, Hkv, groups, D, GROUP // 2]` uint8, token i of a group in the low and token
i + GROUP // 2 in the high half of byte i, channel-major so that an unread channel is memory not read; ranges are
`[B, Hkv, groups, D, 2]` in the dtype of the keys.
"""

import torch
from torch import Tensor

from rocketkv.ops.channels import largest_channels

GROUP = 64  # tokens: two bytes of range for each channel weigh as much as 4 bits of them then
LEVELS = 15
_HALF = GROUP // 2


def quantize_groups(keys: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize whole groups of keys, or begun ones.

    Args:
        keys: `[..., GROUP, D]` float.
        counts: `[...]` int64, tokens in each group, the first ones; what lies beyond is undefined.

    Returns:
        Codes `[..., D, GROUP // 2]` uint8, 0 beyond the counts, and ranges `[..., D, 2]` in the dtype of `keys`: the
        least value and the step, both 0 where there are no tokens.

    As in KIVI (arXiv:2402.02750, asymmetric, keys per channel). Reads every key once.
    """
    beyond = (torch.arange(GROUP, device=keys.device) >= counts[..., None])[..., None]  # [..., GROUP, 1]
    empty = (counts == 0)[..., None]
    low = keys.masked_fill(beyond, torch.inf).amin(-2).masked_fill(empty, 0.0)  # [..., D]
    high = keys.masked_fill(beyond, -torch.inf).amax(-2).masked_fill(empty, 0.0)
    step = ((high.float() - low.float()) / LEVELS).to(keys.dtype)
    steps = (keys.float() - low.float()[..., None, :]) / step.float()[..., None, :]  # 0 / 0 where all are alike
    codes = steps.nan_to_num(0.0).round().clamp(0, LEVELS).masked_fill(beyond, 0).to(torch.uint8).transpose(-2, -1)
    return codes[..., :_HALF] | codes[..., _HALF:] << 4, torch.stack([low, step], -1)


def lowbit_logits(
    query: Tensor, codes: Tensor, ranges: Tensor, *, num_tokens: int, num_channels: Tensor, scale: float
) -> Tensor:
    """Approximate the logit of every token by its low-bit key, along the query's largest channels only.

    Args:
        query: `[B, Hkv, G, D]` float, the query heads of each KV head.
        codes: `[B, Hkv, groups, D, GROUP // 2]` uint8.
        ranges: `[B, Hkv, groups, D, 2]` float.
        num_tokens: S, tokens to give a logit to.
        num_channels: `[B]` int64, channels to read, 1 to D.
        scale: factor on the dot products.

    Returns:
        `[B, Hkv, G, S]` float32, undefined beyond a row's length.

    Reads, for each group and KV head, `num_channels` times `GROUP // 2` bytes and two elements of `ranges`.
    """
    query = query.float()
    channels, chosen = largest_channels(query, num_channels)
    rows = channels[:, :, None, :, None].expand(-1, -1, codes.shape[2], -1, -1)
    packed = codes.gather(3, rows.expand(*rows.shape[:4], _HALF))
    bounds = ranges.gather(3, rows.expand(*rows.shape[:4], 2)).float()
    keys = bounds[..., :1] + bounds[..., 1:] * torch.cat([packed & 15, packed >> 4], 4)  # [B, Hkv, groups, R, GROUP]
    logits: Tensor = (chosen[:, :, None] @ keys).transpose(2, 3).flatten(3)  # [B, Hkv, G, groups * GROUP]
    return logits[..., :num_tokens] * scale
