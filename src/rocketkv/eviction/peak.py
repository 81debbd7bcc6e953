"""SnapKV with a vote of our own: a token stays if any query of the window attends to it strongly in any head."""

from dataclasses import dataclass
from typing import ClassVar

from rocketkv.eviction.snapkv import SnapKV


@dataclass(frozen=True)
class Peak(SnapKV):
    """Score a token by the largest attention that one query gives it; all else is as in SnapKV.

    In a sum over the window and the heads of a group, tokens to which every query attends a little outvote a token to
    which one query alone attends, such as one of several values that a question asks for (docs/lowbit.md).
    """

    by_peak: ClassVar[bool] = True
