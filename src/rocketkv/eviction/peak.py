"""SnapKV with a vote of our own: a token and what follows it stay if any query attends to it strongly in any head."""

from dataclasses import dataclass
from typing import ClassVar

from rocketkv.eviction.snapkv import SnapKV


@dataclass(frozen=True)
class Peak(SnapKV):
    """Score a token by the largest attention that one query gives it; pool the scores further forward than back.

    In a sum over the window and the heads of a group, tokens to which every query attends a little outvote a token to
    which one query alone attends, such as one of several values that a question asks for. A question looks most at the
    words that it repeats, and the answer follows them; a pool as wide that reaches as far back as forward cuts off the
    end of a long answer (docs/eviction.md).
    """

    by_peak: ClassVar[bool] = True

    @property
    def reach(self) -> tuple[int, int]:
        """The number of tokens before a token, and after it, that the max-pooling gives that token's score."""
        return self.kernel_size // 4, self.kernel_size - 1 - self.kernel_size // 4
