"""Stage 2, which chooses the kept tokens that a decode step attends to. A new method is one file and one entry here."""

from rocketkv.selection.base import SelectionMethod
from rocketkv.selection.dense import Dense
from rocketkv.selection.exact import Exact
from rocketkv.selection.hybrid import Hybrid, PublishedHybrid
from rocketkv.selection.lowbit import LowBit
from rocketkv.selection.quest import Quest
from rocketkv.selection.sparq import SparQ

SELECTION_METHODS: dict[str, type[SelectionMethod]] = {
    "dense": Dense,
    "exact": Exact,
    "quest": Quest,
    "sparq": SparQ,
    "hybrid": Hybrid,
    "hybrid_paper": PublishedHybrid,
    "lowbit": LowBit,
}

__all__ = [
    "SELECTION_METHODS",
    "Dense",
    "Exact",
    "Hybrid",
    "LowBit",
    "PublishedHybrid",
    "Quest",
    "SelectionMethod",
    "SparQ",
]
