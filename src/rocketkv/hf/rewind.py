"""Taking a cache back to the beginning that a text shares with the tokens seen."""

from typing import TYPE_CHECKING

from torch import Tensor

from rocketkv.errors import InputError, UnsupportedError
from rocketkv.hf.past import columns_left
from rocketkv.hf.plain import first_columns
from rocketkv.hf.states import has_states

if TYPE_CHECKING:
    from rocketkv.hf.cache import RocketKVCache


def rewind_to(cache: "RocketKVCache", ids: Tensor) -> int:
    """Forget all that does not belong to the text `ids`; see `RocketKVCache.rewind_to`, of which this is the work.

    Args:
        cache: the cache to take back; a call that raises leaves it as it was.
        ids: `[B, L]` integers.

    Returns:
        The number of columns that stay; 0 if the cache was reset.

    Raises:
        InputError: `ids` do not fit the cache's rows, or tokens of a prompt are to go from a `single_turn` cache.
        UnsupportedError: a layer keeps recurrent states, its sliding window has dropped tokens that would be needed, or
            images have moved positions.
    """
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or 0 in ids.shape:
        raise InputError("rewind_to takes the ids of a text, a tensor of integers [B, L]; give those for generate.")
    rows = cache.history.num_rows
    if rows not in (None, ids.shape[0]):
        raise InputError(f"the cache has {rows} rows, not {ids.shape[0]}; give as many.")
    if rows is None:
        cache.reset()
        return 0
    layers = cache.compressed_layers
    keep = columns_left(
        cache.history,
        ids,
        cache.config.window_size,
        lambda counts: all(layer.only_decoded_since(counts) for layer in layers),
    )
    if keep == 0:
        cache.reset()
        return 0
    counts = cache.history.num_tokens(keep)
    plain = cache.plain_layers_before_pass()
    num_dropped = cache.history.num_columns - keep
    offsets = cache.history.offsets
    if num_dropped > 0 and offsets is not None and bool(offsets.any()):
        raise UnsupportedError(
            "images have moved the positions of this text, so the cache cannot go back to an earlier token; "
            "call cache.reset() and give the whole text with its images."
        )
    for i, layer in enumerate(cache.layers):
        if has_states(layer) and (num_dropped > 0 or cache._pass is not None):
            raise UnsupportedError(
                f"layer {i} keeps recurrent states, which have all tokens in them, so the cache cannot go back to an "
                "earlier token; call cache.reset() and give the whole text."
            )
    for i, layer in plain.items():
        if num_dropped > 0 and layer.keys.shape[2] < layer.get_seq_length():
            raise UnsupportedError(
                f"layer {i} has a sliding window and has dropped what came before it, so the cache cannot go back "
                "to an earlier token; call cache.reset() and give the whole text."
            )
    for compressed in layers:
        compressed.check_rewind(counts)
    for compressed in layers:
        compressed.rewind(keep, counts)
    for i, layer in plain.items():
        cache.layers[i] = first_columns(layer, keep)
    cache.history.truncate(keep)
    return keep
