"""The tokens of a cache that stand for images: how many were seen, and how many are kept."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from rocketkv.hf.history import History
from rocketkv.hf.layer import RocketKVLayer
from rocketkv.hf.plain import has_tokens
from rocketkv.stats import CacheStats

_NAMES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")  # in configurations


class Images(NamedTuple):
    """Which tokens of a cache stand for a part of an image or a video.

    Attributes:
        columns: `[B, N]` bool, by column; N is the number of columns seen.
        positions: `[B, N]` bool, by position, False beyond a row's last token.
    """

    columns: Tensor
    positions: Tensor


def find_images(config: PreTrainedConfig, history: History) -> Images | None:
    """Find the tokens that stand for images among those that a cache has seen; None if there are none.

    Args:
        config: the model's configuration, which says as what token ids they come.
        history: the token ids.
    """
    ids = {token for name in _NAMES if isinstance(token := getattr(config, name, None), int)}
    if not ids or history.num_rows is None:
        return None
    columns = torch.isin(history.ids, torch.tensor(sorted(ids), dtype=torch.int32, device=history.ids.device))
    if not bool(columns.any()):
        return None
    if history.mask is None:
        return Images(columns, columns)
    mask = history.mask.to(columns.device)
    columns = columns & mask
    return Images(columns, columns.gather(1, (~mask).to(torch.uint8).argsort(stable=True, dim=1)))


def count_images(stats: CacheStats, layers: Sequence[Any], images: Images | None) -> CacheStats:
    """Return the statistics of the layers of a cache with the numbers of image tokens in them."""
    if images is None:
        return stats
    rows, num_columns = images.columns.shape
    seen, counted = float(images.columns.sum()) / rows, []
    for layer, own in zip(layers, stats.layers, strict=True):
        if isinstance(layer, RocketKVLayer):
            own = replace(own, num_image_seen=seen, num_image_stored=layer.num_kept(images.positions))
        elif has_tokens(layer):
            in_window = images.columns[:, num_columns - int(own.num_stored) :]
            own = replace(own, num_image_seen=seen, num_image_stored=float(in_window.sum()) / rows)
        counted.append(own)
    return CacheStats(counted)
