"""Low-bit keys, an index of stage 2: the kept keys in 4 bits, channel by channel.

GROUP consecutive tokens of a channel share a least value and a step; a key is the least value plus a whole number of
steps, 0 to LEVELS. The last group of a row is open until it is full; an open group stores its keys as they come.

- Codes are `[B, Hkv, blocks, D, GROUPS_PER_BLOCK, GROUP // 2]` uint8. The low half of byte i has token i of a group,
  the high half token i + GROUP // 2. Codes are channel-major, so that no memory of unread channels is touched.
- Ranges are `[B, Hkv, blocks, D, GROUPS_PER_BLOCK, 2]`, least value and step, in the dtype of the keys.
- Open keys are `[B, Hkv, D, GROUP]`, channel-major too.
- The spread is `[B, Hkv, D]` float32, by which channels are chosen. It is the sum of the steps of a row's whole
  groups, added up in order; in a row without a whole group it is the range of the keys.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rocketkv.ops.channels import add_runs, largest_channels
from rocketkv.ops.gather import take_tokens

GROUP = 64  # tokens per group; with keys in 16 bits the shared range adds half a bit to the 4 bits of each
GROUPS_PER_BLOCK = 16  # one cache line has a channel's ranges of a block in 16 bits; csrc/kernels.h has both numbers
LEVELS = 15
_HALF = GROUP // 2
_BLOCK = GROUPS_PER_BLOCK * GROUP


class LowBitKeys(NamedTuple):
    """The tensors of the index."""

    codes: Tensor
    ranges: Tensor
    open_keys: Tensor
    spread: Tensor


def quantize_groups(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize whole groups of keys, `[..., GROUP, D]` float.

    Returns:
        Codes `[..., D, GROUP // 2]` uint8 and ranges `[..., D, 2]` in the dtype of `keys`.

    Source: KIVI (arXiv:2402.02750), whose quantization of keys is asymmetric and per channel. Reads every key once.
    """
    low, high = keys.amin(-2), keys.amax(-2)  # [..., D]
    step = ((high.float() - low.float()) / LEVELS).to(keys.dtype)
    steps = (keys.float() - low.float()[..., None, :]) / step.float()[..., None, :]  # 0 / 0 where all are alike
    codes = steps.nan_to_num(0.0).round().clamp(0, LEVELS).to(torch.uint8).transpose(-2, -1)
    return codes[..., :_HALF] | codes[..., _HALF:] << 4, torch.stack([low, step], -1)


def build_lowbit(index: LowBitKeys, keys: Tensor, lengths: Tensor) -> None:
    """Let an empty index take in all keys, in place.

    Args:
        index: the index, with room for S tokens.
        keys: `[B, Hkv, S, D]` in the dtype of the index's ranges.
        lengths: `[B, Hkv]` int64; keys at slots beyond are undefined, and so are their codes in the index.

    Reads `B * Hkv * S * D` elements.
    """
    batch, num_kv_heads, num_tokens, head_dim = keys.shape
    index.spread.zero_()
    for start in range(0, num_tokens // GROUP * GROUP, _BLOCK):
        whole = keys[:, :, start : start + _BLOCK]
        num_groups = whole.shape[2] // GROUP
        groups = whole[:, :, : num_groups * GROUP].reshape(batch, num_kv_heads, num_groups, GROUP, head_dim)
        codes, ranges = quantize_groups(groups)
        for stored, new in zip(index[:2], (codes, ranges), strict=True):
            stored[:, :, start // _BLOCK, :, :num_groups] = new.transpose(2, 3)
        ends = torch.arange(start + GROUP, start + num_groups * GROUP + 1, GROUP, device=keys.device)
        add_runs(index.spread, ranges[..., 1], ends <= lengths[..., None])
    slots = (lengths // GROUP * GROUP)[..., None] + torch.arange(GROUP, device=keys.device)
    index.open_keys[:] = take_tokens(keys, slots.clamp(max=num_tokens - 1)).transpose(2, 3)
    _spread_open_keys(index, lengths)


def append_lowbit(index: LowBitKeys, key: Tensor, slots: Tensor) -> None:
    """Add one key to the open group of every row, in place; quantize full groups, and update the spread.

    Args:
        index: the index, with room for one more token per row.
        key: `[B, Hkv, 1, D]` in the dtype of the index's ranges.
        slots: `[B, Hkv]` int64, the slots of the keys in their rows.
    """
    place = slots % GROUP
    where = place[..., None, None].expand(-1, -1, key.shape[3], 1)
    index.open_keys.scatter_(3, where, key.transpose(2, 3))
    row, head = (place == GROUP - 1).nonzero(as_tuple=True)
    block, group = slots[row, head] // _BLOCK, slots[row, head] // GROUP % GROUPS_PER_BLOCK
    codes, ranges = quantize_groups(index.open_keys[row, head].transpose(1, 2))
    for stored, new in zip(index[:2], (codes, ranges), strict=True):
        stored[row, head, block, :, group] = new
    earlier = index.spread[row, head].where(
        slots[row, head, None] >= GROUP, 0.0
    )  # the first group's step replaces the range
    index.spread[row, head] = earlier + ranges[..., 1].float()
    _spread_open_keys(index, slots + 1)


def _spread_open_keys(index: LowBitKeys, lengths: Tensor) -> None:
    """Set the spread to the range of all keys in those rows of `lengths` (`[B, Hkv]` int64) with no whole group."""
    beyond = torch.arange(GROUP, device=lengths.device) >= lengths[..., None, None]  # [B, Hkv, 1, GROUP]
    high = index.open_keys.masked_fill(beyond, -torch.inf).amax(3).float()
    low = index.open_keys.masked_fill(beyond, torch.inf).amin(3).float()
    index.spread[:] = (high - low).clamp_min(0.0).where(lengths[..., None] < GROUP, index.spread)


def lowbit_logits(
    query: Tensor, index: LowBitKeys, *, lengths: Tensor, num_tokens: int, num_channels: Tensor, scale: float
) -> Tensor:
    """Approximate the logit of every token by its low-bit key, along the channels largest by |q| times the spread.

    Args:
        query: `[B, Hkv, G, D]` float, the query heads of each KV head.
        index: the index of the keys, with the spread from before the newest key.
        lengths: `[B, Hkv]` int64, the number of tokens in each row.
        num_tokens: S, the number of tokens to give a logit to.
        num_channels: `[B]` int64, the number of channels to read, 1 to D.
        scale: the factor on the dot products.

    Returns:
        `[B, Hkv, G, S]` float32, undefined beyond a row's length.

    The dot product of a query and a key is that of the query and the least values, plus that of the codes and the
    weights. The weights are the steps times the query, rounded to bfloat16 if the keys are bfloat16.

    Reads, for each of the `num_channels` channels, `GROUP // 2` bytes and two elements per whole group and one element
    per token of the open group; and the spread, `D` float32 numbers.
    """
    channels, chosen = largest_channels(query.float(), num_channels, index.spread)  # [B, Hkv, R], [B, Hkv, G, R]
    num_blocks, num_read = index.codes.shape[2], channels.shape[2]
    rows = channels[:, :, None, :, None, None].expand(-1, -1, num_blocks, -1, GROUPS_PER_BLOCK, -1)
    packed = index.codes.gather(3, rows.expand(*rows.shape[:5], _HALF))
    ranges = index.ranges.gather(3, rows.expand(*rows.shape[:5], 2)).float()
    codes = torch.cat([packed & 15, packed >> 4], 5).float()  # [B, Hkv, blocks, R, GROUPS_PER_BLOCK, GROUP]
    offsets = torch.einsum("bhgr,bhkrs->bhgks", chosen, ranges[..., 0])
    weights = torch.einsum("bhgr,bhkrs->bhkgrs", chosen, ranges[..., 1])
    if index.ranges.dtype == torch.bfloat16:
        weights = weights.bfloat16().float()
    logits = (torch.einsum("bhkgrs,bhkrsi->bhgksi", weights, codes) + offsets[..., None]).flatten(3)
    open_keys = index.open_keys.gather(2, channels[..., None].expand(-1, -1, num_read, GROUP)).float()
    slots = (lengths // GROUP * GROUP)[..., None] + torch.arange(GROUP, device=query.device)
    logits = torch.nn.functional.pad(logits, (0, GROUP))  # the open group may begin where the last block ends
    logits.scatter_(3, slots[:, :, None].expand(-1, -1, query.shape[2], -1), chosen @ open_keys)
    return logits[..., :num_tokens] * scale
