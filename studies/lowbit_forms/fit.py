"""The fit of stage 1's size to the study's outcomes."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product

from rocketkv.paper import kept_tokens
from studies.lowbit_forms.forms import SIZES
from studies.lowbit_forms.study import Study


def fit_size(study: Study, bits: int) -> Iterator[str]:
    """Fit stage 1's size for low-bit keys of so many bits to the axis "size", and say how it does elsewhere."""
    places = list(product(study.texts, study.lengths, study.budgets))
    curves: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
    for text, length, budget in places:
        points = {}
        for held in SIZES:
            form = f"{bits} bits, held={held:g}"
            where = {"text": text, "length": length, "budget": budget}
            error = study.mean("error", form, **where)
            if not math.isnan(error):
                points[study.mean("held", form, **where)] = error
        curves[text, length, budget] = sorted(points.items())

    def error_at(place: tuple[str, int, int], count: float) -> float:
        """Return the error at this size, interpolated between the sizes that were measured."""
        points = curves[place]
        count = min(max(count, points[0][0]), points[-1][0])
        for (x, y), (z, w) in pairwise(points):
            if x <= count <= z:
                part = math.log(count / x) / math.log(z / x)
                return y + part * (w - y)
        return points[-1][1]

    def loss(places: Sequence[tuple[str, int, int]], size: Callable[[int, int], float]) -> float:
        """Return the mean of the error over the least error of any size."""
        return statistics.fmean(error_at(x, size(x[1], x[2])) / min(y for _, y in curves[x]) for x in places) - 1

    train = [x for x in places if x[0] == study.texts[0] and x[1] != max(study.lengths)] or places
    rest = [x for x in places if x not in train]
    shapes = [(a / 8, b / 20) for a in range(2, 65) for b in range(21)]
    factor, power = min(shapes, key=lambda x: loss(train, lambda s, t: x[0] * t ** x[1] * s ** (1 - x[1])))
    yield f"Best sizes for {bits} bits, by text: error at it, and at the paper's size."
    yield ""
    yield "| length | " + " | ".join(f"t = {budget}" for budget in study.budgets) + " |"
    yield "|---|" + "---|" * len(study.budgets)
    for text, length in product(study.texts, study.lengths):
        cells = []
        for budget in study.budgets:
            count, error = min(curves[text, length, budget], key=lambda x: x[1])
            paper = kept_tokens(length, budget)
            cells.append(f"{count:.0f}: {error:.2%}; {paper}: {error_at((text, length, budget), paper):.2%}")
        yield f"| {text}, {length:,} | " + " | ".join(cells) + " |"
    yield ""
    formulas: dict[str, Callable[[int, int], float]] = {
        "the paper's": kept_tokens,
        f"{factor:g} t^{power:g} S^{1 - power:g}": lambda s, t: factor * t**power * s ** (1 - power),
    }
    for name, size in formulas.items():
        yield f"N = {name}: {loss(train, size):.1%} above the best size's error where fitted" + (
            f", {loss(rest, size):.1%} elsewhere" if rest else ""
        )
