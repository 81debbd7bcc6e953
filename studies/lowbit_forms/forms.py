"""Forms of the index, and the axes along which the study varies them."""

from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Form:
    """One way to choose tokens; as it stands, that of `selection="lowbit"` and `eviction="peak"`.

    Attributes:
        scoring: what estimates logits: low-bit keys; page bounds; or the logits themselves, not counted.
        by_peak: stage 1 goes by the largest attention that one query gives a token, not by the sum.
        held: stage 1 keeps this many times what the paper's formula says; None: everything.
        share: of the budget, what scoring may take.
        bits: per code; 16: the keys themselves.
        group: tokens that share a step.
        symmetric: codes around zero, no zero point.
        rotated: queries and keys are multiplied by a Hadamard matrix, which is not counted.
        centred: the mean of the kept keys is taken off before quantization.
        heads_of_channel: how the sizes of a channel's |q| in the heads of a group, times the spread, become one: their
            sum, the largest, the sum of squares, or the sum once each head is divided by the norm of its q
            ("unit q") or of its |q| times the spread ("unit"); "static": the mean over the prefix's last queries.
        spread: of a channel's keys in whole groups: none, as published, the mean of the groups' ranges, the range or
            deviation of all of them, the root of the mean variance within groups, or the mean distance of two keys
            that follow each other.
        heads: how the heads of a group agree on tokens.
        by_value: scores are multiplied by the values' norms, 8 bits per token.
        sinks: first tokens pinned.
        recents: last tokens pinned, as a part of top_k.
        tail: the mean value of the tokens that are not attended to stands for them, with their weight.
    """

    scoring: Literal["lowbit", "pages", "exact"] = "lowbit"
    by_peak: bool = True
    held: float | None = 1.4
    share: float = 1 / 4
    bits: int = 4
    group: int = 64
    symmetric: bool = False
    rotated: bool = False
    centred: bool = False
    heads_of_channel: Literal["sum", "max", "squares", "unit q", "unit", "static"] = "sum"
    spread: Literal["none", "step", "range", "deviation", "within", "neighbours"] = "step"
    heads: Literal["mean", "max"] = "mean"
    by_value: bool = False
    sinks: int = 0
    recents: float = 1 / 8
    tail: bool = False


BASE = Form()
KEPT = Form("exact", recents=0)
PUBLISHED = Form("pages", by_peak=False, held=1.0, spread="none", recents=0)
REFERENCES = {"oracle": replace(KEPT, held=None), "published": PUBLISHED, "base": BASE}


def vary(name: str, *values: Any) -> dict[str, Form]:
    """Return forms that differ from the base in one field."""
    return {
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}": replace(BASE, **{name: value})
        for value in values
    }


AXES: dict[str, dict[str, Form]] = {
    "channels": {
        **vary("spread", "none", "range", "deviation", "within", "neighbours"),
        **vary("heads_of_channel", "max", "squares", "unit q", "unit", "static"),
        **{
            f"deviation, {heads}": replace(BASE, spread="deviation", heads_of_channel=heads)
            for heads in ("squares", "unit q", "unit")
        },
    },
    "heads": {"heads=max": replace(BASE, heads="max"), "by value": replace(BASE, by_value=True)},
    "share": vary("share", 1 / 6, 1 / 3, 1 / 2, 2 / 3),
    "pins": {**vary("recents", 0.0, 1 / 16, 1 / 4), "sinks=4": replace(BASE, sinks=4)},
    "bounds": {
        "kept, exact top-k": KEPT,
        "published, recents pinned": replace(PUBLISHED, recents=1 / 8),
        "pages with our spread, peak": replace(PUBLISHED, by_peak=True, spread="step", recents=1 / 8),
    },
    "bits": {
        **vary("bits", 2, 3, 8, 16),
        "2 bits, share 1/6": replace(BASE, bits=2, share=1 / 6),
    },
    "group": vary("group", 32, 128, 256),
    "kept": {"stage 1 by the sum": replace(BASE, by_peak=False), **vary("held", 1.0, 2.0, 2.8)},
    "zero": {
        "symmetric": replace(BASE, symmetric=True),
        "symmetric, centred": replace(BASE, symmetric=True, centred=True),
        "centred": replace(BASE, centred=True),
    },
    "rotation": {"hadamard": replace(BASE, rotated=True)},
    "tail": {"tail": replace(BASE, tail=True), "tail, 3 bits": replace(BASE, tail=True, bits=3)},
}
