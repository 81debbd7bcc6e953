"""What stage 2 asks of a selection method."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor

from rocketkv import paper
from rocketkv.backends import Scoring
from rocketkv.budget import Split
from rocketkv.cache import WorkingSet
from rocketkv.index import Index

if TYPE_CHECKING:
    from rocketkv.config import RocketKVConfig

SPREAD_BYTES = 4  # of a channel: what a method reads that weighs channels by the spread of their keys


class SelectionMethod(ABC):
    """How one decode step decides which kept tokens to attend to.

    A method of your own derives from this class, or has all of its methods.

    Attributes:
        scoring: what the fused steps of `backends` call that which `logits` computes; None: they do not know it,
            and the method runs in plain torch. It is not inherited by a class that defines `logits` or `build_index`.
    """

    scoring: ClassVar[Scoring | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "scoring" not in vars(cls) and ("logits" in vars(cls) or "build_index" in vars(cls)):
            cls.scoring = None

    @classmethod
    def from_config(cls, config: "RocketKVConfig") -> Self:
        """The method as this configuration asks for it."""
        return cls()

    def kept_tokens(self, seq_len: int, token_budget: int) -> int:
        """How many of `seq_len` tokens stage 1 should keep, so that this method fits in `token_budget`."""
        return paper.kept_tokens(seq_len, token_budget)

    @abstractmethod
    def split(self, num_tokens: int, token_budget: int, head_dim: int) -> Split:
        """Spend `token_budget` on scoring `num_tokens` tokens and attending to the best."""

    def build_index(self, working: WorkingSet, page_size: Tensor) -> Index | None:
        """Index the kept keys, if the method wants more than the keys themselves.

        Args:
            working: keys and lengths; keys beyond the lengths are undefined.
            page_size: `[B]` int64, tokens per page.
        """
        return None

    def logits(self, query: Tensor, working: WorkingSet, num_channels: Tensor, scale: float) -> Tensor | None:
        """Estimate the logit of every token of the working set; without an override, its index does.

        Args:
            query: `[B, Hkv, G, D]` float, the query heads of each KV head.
            working: keys, lengths and the index built by `build_index`.
            num_channels: `[B]` int64, channels to read.
            scale: factor on the dot products.

        Returns:
            `[B, Hkv, G, max_length]` float32, undefined beyond the lengths; None to attend to everything.
        """
        if working.index is None:
            return None
        return working.index.logits(
            query,
            lengths=working.lengths,
            num_tokens=working.max_length,
            num_channels=num_channels,
            scale=scale,
        )

    @abstractmethod
    def scored_bytes(
        self, lengths: Tensor, page_size: Tensor, num_channels: Tensor, head_dim: int, element_size: int
    ) -> Tensor:
        """Bytes that `logits` reads for rows of these `lengths` (`[B, Hkv]`), same shape; sizes are `[B, 1]`."""
