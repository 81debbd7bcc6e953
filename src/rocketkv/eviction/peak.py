"""SnapKV with another vote, ours: a token stays if any query of the window, in any head, looked hard at it."""

from dataclasses import dataclass
from typing import ClassVar

from rocketkv.eviction.snapkv import SnapKV


@dataclass(frozen=True)
class Peak(SnapKV):
    """Score a token by the largest attention that one query gave it; the rest is SnapKV's.

    In a sum over the window and the heads of a group, tokens that every query looks at a little outvote a token that
    one query looks at alone, such as one of several values that a question asks for (docs/lowbit.md).
    """

    by_peak: ClassVar[bool] = True
