"""Images whose tokens attend to each other in both directions, as in Gemma 3: what is told of them before a pass.

Such a model makes the mask of a prompt from its token types. The mask says how far ahead of itself each token of the
prompt sees; generated tokens see no token ahead, and a prompt of text alone is causal.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rocketkv.errors import InputError, UnsupportedError
from rocketkv.hf.padding import Padding
from rocketkv.hf.support import joins_images

_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


class Noted(NamedTuple):
    """What a model was given, noted for its decoder, which may get others.

    Attributes:
        ids: `[B, T]` integers, the new tokens; None if the model got embeddings.
        mask: the attention mask.
        has_joined_images: whether new tokens are of images, and the model lets these attend to each other.
    """

    ids: Tensor | None = None
    mask: Any = None
    has_joined_images: bool = False


def note(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], seen: int) -> tuple[Noted, Any]:
    """Return what is noted for the decoder, and the keyword arguments, in which types of text alone give way to None.

    Args:
        model: the model that is called.
        args: its arguments by position; the first one is `input_ids`.
        kwargs: its arguments by name.
        seen: the number of columns that the cache has seen.

    Raises:
        InputError: images came in a later turn, and the types of the tokens before them did not.
    """
    ids = kwargs.get("input_ids", args[0] if args else None)
    noted = Noted(ids, kwargs.get("attention_mask"))
    given = {name: types for name in _TOKEN_TYPES if isinstance(types := kwargs.get(name), Tensor)}
    if not given or not joins_images(type(model).__module__):
        return noted, kwargs
    num_new = (kwargs["inputs_embeds"] if ids is None else ids).shape[1]
    for name, types in given.items():
        if num_new == 1 or not bool(types[:, -num_new:].any()):
            kwargs = {**kwargs, name: None}
        elif types.shape[1] != seen + num_new:
            raise InputError(
                f"{name} has {types.shape[1]} columns, but the cache has seen {seen} and {num_new} with an image are "
                "new; give the types of the whole text (generate of transformers before 5.24 cannot: call "
                "cache.reset() and give the whole text at once)."
            )
        else:
            noted = noted._replace(has_joined_images=True)
    return noted, kwargs


def read_ahead(mask: Any, padding: Padding, num_new: int) -> Tensor | None:
    """Read from transformers' own mask how many later tokens each new one attends to.

    Args:
        mask: `[B, 1, T, seen + T]`, bool, or float and negative where a token is hidden; or a dict of masks, of which
            that of full attention counts, where None stands for a causal one.
        padding: the padding among the T new columns.
        num_new: T.

    Returns:
        `[B, T]` int64, the columns in the order of `padding`; None if attention is causal.

    Raises:
        UnsupportedError: the mask is another, or a token sees others than all up to some later one.
    """
    if isinstance(mask, dict) and (mask := mask.get("full_attention", ...)) is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise UnsupportedError("a model whose images attend to themselves made no mask for them; give text alone.")
    sees = (mask if mask.dtype == torch.bool else mask >= 0)[:, 0]  # [B, T, seen + T]
    is_real = torch.ones_like(sees[:, 0]) if padding.mask is None else padding.mask.to(sees.device)  # [B, seen + T]
    is_new = is_real[:, -num_new:]
    rank = is_real.cumsum(1)  # [B, seen + T], from 1
    ahead = (sees[:, :, -num_new:].triu(1)).sum(2).masked_fill(~is_new, 0)  # [B, T]
    expected = (rank[:, None] <= (rank[:, -num_new:] + ahead)[..., None]) & is_real[:, None]
    if bool(((sees != expected) & is_new[..., None]).any()):
        raise UnsupportedError(
            "tokens of an image attend to later ones beyond text that they do not see; give one image at a time, or "
            "use transformers' own DynamicCache."
        )
    if not bool(ahead.any()):
        return None
    return ahead if padding.order is None else ahead.gather(1, padding.order.to(ahead.device))
