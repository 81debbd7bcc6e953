"""A picture of what a cache keeps, for a terminal: the text as one line."""

from typing import TYPE_CHECKING

from rich.text import Text

from rocketkv.commands.terminal import out

if TYPE_CHECKING:
    from torch import Tensor

    from rocketkv.hf import RocketKVCache

_MARKS = " \u2591\u2592\u2593\u2588"  # from empty to full; a font draws them, not a colour
_ASCII_MARKS = " .+#@"


def kept_line(cache: "RocketKVCache") -> Text:
    """Draw the text that a cache has seen, a mark for as many tokens as fit it to the terminal, with its legend.

    Tokens that stand for images are marked in a second line, if there are any.
    """
    import torch

    from rocketkv.hf.modality import find_images

    shares = kept_shares(cache)
    num_tokens = len(shares)
    size = -(-num_tokens // max(1, out.width - 2))  # tokens of a mark
    marks = _ASCII_MARKS if out.options.ascii_only else _MARKS
    line = "".join(marks[_level(float(part.mean()), len(marks))] for part in torch.split(shares, size))
    legend = (
        f"The text from its beginning to its end, {size} tokens a mark: the darker, the more of the heads in all "
        f"layers keep them ({float(shares.mean()):.0%} on average)."
    )
    images = find_images(cache.model_config, cache.history)
    if images is None:
        return Text(f"|{line}|\n{legend}")
    is_image = images.positions[0, :num_tokens].cpu()
    below = "".join("^" if part.any() else " " for part in torch.split(is_image, size))
    kept, of_text = (float(shares[: len(is_image)][where].mean()) for where in (is_image, ~is_image))
    return Text(
        f"|{line}|\n {below}\n{legend}\nMarks over ^ have tokens of images: {kept:.0%} of the heads keep such a token, "
        f"and {of_text:.0%} keep one of the text."
    )


def kept_shares(cache: "RocketKVCache") -> "Tensor":
    """Return the share of the KV heads of all compressed layers that keep each token of the first row.

    Returns:
        `[N]` float32, 0 to 1, by position; N is the number of tokens that the row has seen.
    """
    import torch

    kept = []
    for layer in cache.compressed_layers:
        working = layer.cache.working
        assert working is not None
        slots = torch.arange(working.max_length, device=working.lengths.device)
        kept.append(working.mark(slots.where(slots < working.lengths[..., None], -1))[0, :, : working.row_seen[0]])
    return torch.cat(kept).float().mean(0).cpu()


def _level(share: float, num_levels: int) -> int:
    """Return the mark of a share: only a share of 0 is drawn empty, and only one of 1 full."""
    return 0 if share == 0 else min(num_levels - 1, 1 + int(share * (num_levels - 1)))
