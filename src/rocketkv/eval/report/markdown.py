"""The pieces of Markdown in a report: tables and the figures in them."""

import math
import re
from collections.abc import Iterable, Sequence

from rocketkv.eval.report.statistics import Interval

NO_DATA = "no data"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table with the first `left` columns aligned to the left, the others to the right."""
    lines = [header, ["---"] * left + ["---:"] * (len(header) - left), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape(text: object) -> str:
    """Return a text escaped so that Markdown shows it to the letter, in a table's cell or elsewhere."""
    return re.sub(r"([\\`*\[\]<>|#&]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(str(text).split()))


def span(interval: Interval, sign: str = "") -> str:
    """Return a figure in hundredths, with the ends of its interval."""
    value, low, high = (f"{100 * end:{sign}z.1f}" for end in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]" if interval.known else value


def percent(share: float) -> str:
    """Return a figure in hundredths, without an interval."""
    return NO_DATA if math.isnan(share) else f"{100 * share:.1f} %"


def num_bytes(number: float) -> str:
    """Return a number of bytes in KiB or MiB, with three digits."""
    if math.isnan(number):
        return NO_DATA
    return f"{number / 2**20:.1f} MiB" if number >= 2**20 else f"{number / 2**10:.1f} KiB"


def budget_name(budget: int | None) -> str:
    """Return the name of a budget in tables; the full cache has none."""
    return "" if budget is None else f"{budget:,}"


def span_of_counts(counts: Iterable[int]) -> str:
    """Return counts as "least to most", or as one number if all are equal; missing ones are left out."""
    sizes = sorted({count for count in counts if count})
    return "-".join(f"{size:,}" for size in {sizes[0]: None, sizes[-1]: None})
