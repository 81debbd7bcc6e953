"""Every outcome of the study, and tables of the errors; as a command, the tables of a file with results."""

import gzip
import json
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from studies.lowbit_forms.forms import Form
from studies.lowbit_forms.measure import Outcome

DIGITS = 5  # of each figure in a file


@dataclass
class Study:
    """Outcomes by text, length, layer, budget and form.

    Attributes:
        forms: what each name of a form means.
        records: one for each outcome, with its place; the error is None where a form cannot score within the budget.
    """

    forms: dict[str, dict[str, Any]]
    records: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, forms: dict[str, Form]) -> Self:
        """A study without outcomes."""
        return cls({name: asdict(form) for name, form in forms.items()})

    @classmethod
    def read(cls, file: Path) -> Self:
        """A study from its file."""
        return cls(**json.loads(gzip.decompress(file.read_bytes())))

    def write(self, file: Path) -> None:
        """Write all of it to a file."""
        file.write_bytes(gzip.compress(json.dumps({"forms": self.forms, "records": self.records}).encode(), mtime=0))

    def add(self, form: str, outcome: Outcome | None, **place: Any) -> None:
        """Note an outcome."""
        figures = {"error": None} if outcome is None else outcome._asdict()
        rounded = {key: round(x, DIGITS) if isinstance(x, float) else x for key, x in figures.items()}
        self.records.append({**place, "form": form, **rounded})

    def show(self) -> None:
        """Print a table for each text."""
        for text in dict.fromkeys(x["text"] for x in self.records):
            print(f"\n## {text}\n", *self.table(text), sep="\n")

    def table(self, text: str) -> Iterator[str]:
        """A Markdown table of the errors on a text in %, and of what each form adds to the base's.

        The range of the difference is two standard errors of its mean over layers and lengths.
        """
        records = [x for x in self.records if x["text"] == text]
        budgets = sorted({x["budget"] for x in records})
        yield "| form | " + " | ".join(f"t = {budget}" for budget in budgets) + " | all |"
        yield "|---|" + "---|" * (len(budgets) + 1)
        for form in self.forms:
            cells = []
            for some in (*([budget] for budget in budgets), budgets):
                of_form, of_base = (_errors(records, name, some) for name in (form, "base"))
                cells.append(_cell(of_form, of_base))
            yield f"| {form} | " + " | ".join(cells) + " |"


def _errors(records: list[dict[str, Any]], form: str, budgets: list[int]) -> list[float]:
    """A form's errors in %, for each length and layer the mean over budgets; NaN where a budget is too small."""
    places: dict[tuple[int, int], list[float]] = {}
    for x in records:
        if x["form"] == form and x["budget"] in budgets:
            error = math.nan if x["error"] is None else 100 * x["error"]
            places.setdefault((x["length"], x["layer"]), []).append(error)
    return [statistics.fmean(errors) for _, errors in sorted(places.items())]


def _cell(errors: list[float], base: list[float]) -> str:
    """The mean error, and its difference from the base's at the same places."""
    mean = statistics.fmean(errors)
    if math.isnan(mean) or errors == base or len(errors) == 1:
        return f"{mean:.1f}"
    differences = [x - y for x, y in zip(errors, base, strict=True)]
    margin = 2 * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:.1f} ({statistics.fmean(differences):+.2f} ± {margin:.2f})"


if __name__ == "__main__":
    Study.read(Path(sys.argv[1])).show()
