"""How far a cache goes back to a text, told from what it has seen; of a saved one, from the header of its file."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

from torch import Tensor

from rocketkv.hf.history import History
from rocketkv.hf.states import is_state


def columns_left(
    history: History, ids: Tensor, window_size: int, only_decoded_since: Callable[[Sequence[int]], bool]
) -> int:
    """Return how many columns stay where a cache goes back to the text `ids`; 0 where it must begin anew.

    Args:
        history: what the cache has seen, of as many rows as `ids`.
        ids: `[B, L]` integers.
        window_size: the last tokens of a prompt, which stage 1 looks at.
        only_decoded_since: tells whether what follows the first so many tokens of each row was decoded since the last
            prompt, so that the cache goes back without a new prompt.
    """
    keep = min(history.num_common(ids), ids.shape[1] - 1)
    counts = history.num_tokens(keep)
    if keep < history.num_columns and min(counts) > 0 and not only_decoded_since(counts):
        keep = max(0, min(keep, ids.shape[1] - window_size))
        counts = history.num_tokens(keep)
    return keep if min(counts) > 0 else 0


class SavedPast(NamedTuple):
    """What a saved cache has seen and how far it goes back, as the header of its file tells.

    Attributes:
        history: the token ids.
        num_decoded: the tokens decoded since the last prompt; -1 if a prompt must come next.
        keeps_prompts: whether tokens of a prompt can go, because an archive has them all.
        has_dropped: whether a sliding window has left tokens behind, or states have them all in one, so that no token
            can go.
    """

    history: History
    num_decoded: int
    keeps_prompts: bool
    has_dropped: bool

    @classmethod
    def read(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Return what the record and the tensors of `SavedCache.parts` tell, of which only ids and mask are read."""
        history, mask = History(), tensors.get("mask")
        history.append(tensors["ids"], None if mask is None else mask.clone())
        compressed = [facts for facts in record["layers"] if isinstance(facts, dict)]
        return cls(
            history,
            min(-1 if facts["plan"] is None else int(facts["num_decoded"]) for facts in compressed),
            all(facts["archive"] is not None for facts in compressed),
            any(
                tensors[f"{i}.keys"].shape[2] < num_seen
                for i, num_seen in enumerate(record["layers"])
                if isinstance(num_seen, int)
            )
            or any(is_state(name) for name in tensors),
        )

    def columns_left(self, ids: Tensor, window_size: int) -> int:
        """Return how many columns of the cache stay where it goes back to a text; 0 where it cannot, or none would."""
        keep = columns_left(self.history, ids, window_size, self._only_decoded_since)
        if keep == self.history.num_columns:
            return keep
        goes_back = self.keeps_prompts or self._only_decoded_since(self.history.num_tokens(keep))
        return keep if goes_back and not self.has_dropped else 0

    def _only_decoded_since(self, counts: Sequence[int]) -> bool:
        seen = self.history.num_tokens(self.history.num_columns)
        dropped = [num - left for num, left in zip(seen, counts, strict=True)]
        return min(dropped) == max(dropped) <= self.num_decoded
