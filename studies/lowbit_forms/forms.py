"""Forms of the index, and the axes along which the study varies them."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

PAGE, PAGE_CHANNELS = 4, 8  # the tokens of a page and the channels read of it, in the coarse level
ALL = math.inf


@dataclass(frozen=True)
class Form:
    """One way to choose tokens.

    Attributes:
        scoring: the estimate of logits: low-bit keys; page bounds, as published; or true logits, which are not counted.
        held: stage 1 keeps this multiple of the paper's number of tokens.
        size: (a, b, c), with which stage 1 keeps a * t**b * length**c tokens instead; None uses `held`.
        share: the fraction of the budget that scoring may take.
        bits: the bits per code; 16 stands for the keys themselves.
        group: the number of tokens that share a step.
        symmetric: True centres codes on zero, without a zero point.
        rotated: the matrix that rotates queries and keys, Hadamard's or the kept keys' principal axes, uncounted.
        centred: True subtracts the mean of the kept keys before quantization.
        channels: the channels that are read: the largest by the sum over heads of |q|, times range or deviation of the
            kept keys, the largest in any head, or those of the prefix's last queries.
        temperature: True divides logits by SparQ's temperature, which follows from the share of |q| that is read.
        heads: the way in which the heads of a group agree on tokens.
        by_value: True multiplies scores by the values' norms, which take 8 bits per token.
        sinks: the number of first tokens that are pinned.
        recents: the number of last tokens that are pinned, as a fraction of top_k.
        coarse: True lets pages, scored along few channels, decide for which half of the tokens low-bit keys are read.
        mass: the fraction of the approximate attention at which attending stops.
        tail: the stand-in for the tokens not attended to: nothing, their weight, or their weight and mean value.
        attended_bits: the bits of keys and values attended to, 16, or 8 after quantization.
    """

    scoring: Literal["lowbit", "pages", "exact"] = "lowbit"
    held: float = 1.0
    size: tuple[float, float, float] | None = None
    share: float = 0.5
    bits: int = 4
    group: int = 64
    symmetric: bool = False
    rotated: Literal["no", "hadamard", "principal"] = "no"
    centred: bool = False
    channels: Literal["sum", "range", "deviation", "max", "static"] = "sum"
    temperature: bool = False
    heads: Literal["mean", "max"] = "mean"
    by_value: bool = False
    sinks: int = 0
    recents: float = 1 / 8
    coarse: bool = False
    mass: float = 1.0
    tail: Literal["none", "weight", "mean"] = "none"
    attended_bits: int = 16


BASE = Form()
ORACLE = Form("exact", held=ALL, recents=0)
PUBLISHED = Form("pages", recents=0)
REFERENCES = {"oracle": ORACLE, "published": PUBLISHED, "base": BASE}
SIZES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, ALL)


def vary(name: str, *values: Any) -> dict[str, Form]:
    """Return forms that differ from the base in one field."""
    return {
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}": replace(BASE, **{name: value})
        for value in values
    }


TAILED: dict[str, dict[str, Any]] = {
    "2 bits": {"bits": 2},
    "3 bits": {"bits": 3},
    "temperature": {"temperature": True},
    "deviation": {"channels": "deviation"},
    "range": {"channels": "range"},
    "deviation, temperature": {"channels": "deviation", "temperature": True},
    "group 32": {"group": 32},
    "share 1/4": {"share": 1 / 4},
    "share 1/3": {"share": 1 / 3},
    "share 2/3": {"share": 2 / 3},
    "heads max": {"heads": "max"},
    "coarse": {"coarse": True},
    "no pins": {"recents": 0.0},
    "held 1.4": {"held": 1.4},
    "held 2": {"held": 2.0},
    "held 2, 2 bits": {"held": 2.0, "bits": 2},
    "held 4, 2 bits": {"held": 4.0, "bits": 2},
    "published": {"scoring": "pages", "recents": 0},
    "8 bits attended": {"attended_bits": 8},
}
AXES: dict[str, dict[str, Form]] = {
    "bounds": {
        "kept, exact top-k": Form("exact", recents=0),
        "published, recents pinned": replace(PUBLISHED, recents=1 / 8),
    },
    "bits": vary("bits", 2, 3, 8, 16),
    "group": vary("group", 32, 128, 256),
    "channels": vary("channels", "range", "deviation", "max", "static"),
    "temperature": {"temperature": replace(BASE, temperature=True)},
    "share": vary("share", 1 / 4, 1 / 3, 2 / 3),
    "size": {
        f"{bits} bits, held={held:g}": replace(BASE, bits=bits, held=held) for bits in (4, 3, 2) for held in SIZES
    },
    "zero": {
        "symmetric": replace(BASE, symmetric=True),
        "symmetric, centred": replace(BASE, symmetric=True, centred=True),
        "centred": replace(BASE, centred=True),
    },
    "rotation": {
        **vary("rotated", "hadamard", "principal"),
        "hadamard, 2 bits": replace(BASE, rotated="hadamard", bits=2),
        "principal, 2 bits": replace(BASE, rotated="principal", bits=2),
    },
    "heads": {"heads=max": replace(BASE, heads="max"), "by value": replace(BASE, by_value=True)},
    "pins": {**vary("recents", 0.0, 1 / 16, 1 / 4), "sinks=4": replace(BASE, sinks=4)},
    "levels": {"coarse": replace(BASE, coarse=True)},
    "stop": vary("mass", 0.95, 0.99),
    "tail": vary("tail", "weight", "mean"),
    "attended": vary("attended_bits", 8),
    "best": {
        "2 bits": replace(BASE, bits=2),
        "2 bits, share 1/4": replace(BASE, bits=2, share=1 / 4),
        "2 bits, share 1/6": replace(BASE, bits=2, share=1 / 6),
        "3 bits, share 1/4": replace(BASE, bits=3, share=1 / 4),
        "4 bits, share 1/4": replace(BASE, share=1 / 4),
        "2 bits, share 1/4, held 2": replace(BASE, bits=2, share=1 / 4, held=2.0),
        "2 bits, share 1/4, held 0.7": replace(BASE, bits=2, share=1 / 4, held=0.7),
        "3 bits, share 1/4, held 0.7": replace(BASE, bits=3, share=1 / 4, held=0.7),
        "3 bits, share 1/4, 5t": replace(BASE, bits=3, share=1 / 4, size=(5.0, 1.0, 0.0)),
        "2 bits, share 1/4, tail": replace(BASE, bits=2, share=1 / 4, tail="mean"),
        "3 bits, share 1/4, tail": replace(BASE, bits=3, share=1 / 4, tail="mean"),
        "4 bits, share 1/3, coarse, tail": replace(BASE, share=1 / 3, coarse=True, tail="mean"),
        "3 bits, share 1/3, tail": replace(BASE, bits=3, share=1 / 3, tail="mean"),
        "3 bits, share 1/3, held 0.7, tail": replace(BASE, bits=3, share=1 / 3, held=0.7, tail="mean"),
        "oracle, tail": replace(ORACLE, tail="mean"),
        "kept, exact top-k, tail": Form("exact", recents=0, tail="mean"),
        "published, tail": replace(PUBLISHED, tail="mean"),
    },
    "mean tail": {f"tail, {name}": replace(BASE, tail="mean", **changes) for name, changes in TAILED.items()},
}
