"""The interface of a selection method, stage 2."""

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

SPREAD_BYTES = 4  # bytes per channel and step that a method reads if it weighs channels by the spread of their keys


class SelectionMethod(ABC):
    """A selection method decides which kept tokens a decode step attends to.

    A method of your own derives from this class, or has all of its methods.

    Attributes:
        scoring: the name by which backends know the scoring that `logits` computes; None if they do not know it, and
            the method then runs in plain torch. A class that defines `logits` or `build_index` does not inherit it.
    """

    scoring: ClassVar[Scoring | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "scoring" not in vars(cls) and ("logits" in vars(cls) or "build_index" in vars(cls)):
            cls.scoring = None

    @classmethod
    def from_config(cls, config: "RocketKVConfig") -> Self:
        """Return the method with the options of this configuration."""
        return cls()

    def kept_tokens(self, seq_len: int, token_budget: int) -> int:
        """Return how many of `seq_len` tokens stage 1 should keep, so that this method fits in `token_budget`."""
        return paper.kept_tokens(seq_len, token_budget)

    @abstractmethod
    def split(self, num_tokens: int, token_budget: int, head_dim: int) -> Split:
        """Split `token_budget` between scoring `num_tokens` kept tokens and attending to the best of them.

        Args:
            num_tokens: the number of tokens to choose from, >= 1.
            token_budget: the KV traffic of one decode step, in tokens with keys and values in 16 bits, >= 1.
            head_dim: the number of channels of a key, D.

        Returns:
            The page size, the number of channels, 1 to D, and the number of tokens to attend to, each >= 1.
        """

    def build_index(self, working: WorkingSet, page_size: Tensor) -> Index | None:
        """Return an index of the kept keys, or None if the method scores without one.

        Args:
            working: the working set; its keys beyond the lengths are undefined.
            page_size: `[B]` int64 on the host, the tokens per page.
        """
        return None

    def logits(self, query: Tensor, working: WorkingSet, num_channels: Tensor, scale: float) -> Tensor | None:
        """Estimate the logit of every token, before a soft cap, of the working set; by default through its index.

        Args:
            query: `[B, Hkv, G, D]` float, the query heads of each KV head.
            working: the working set, with the index that `build_index` returned.
            num_channels: `[B]` int64, the number of channels to read, 1 to D.
            scale: the factor on the dot products.

        Returns:
            `[B, Hkv, G, max_length]` float32, undefined beyond the lengths; None lets the step attend to every token.
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
        """Return the bytes that `logits` reads in each row and head, `[B, Hkv]` int64.

        Args:
            lengths: `[B, Hkv]` int64, the number of tokens in each row.
            page_size: `[B, 1]` int64, the tokens per page.
            num_channels: `[B, 1]` int64, the number of channels to read.
            head_dim: the number of channels of a key, D.
            element_size: the bytes of one element of an incoming key.
        """
