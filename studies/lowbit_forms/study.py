"""The outcomes of the study, and tables of their means."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from studies.lowbit_forms.measure import Outcome


@dataclass
class Study:
    """Outcomes by text, length, layer, budget and form."""

    lengths: list[int]
    budgets: list[int]
    texts: list[str]
    records: list[dict[str, Any]] = field(default_factory=list)

    def add(self, text: str, length: int, layer: int, budget: int, form: str, outcome: Outcome | None) -> None:
        """Note an outcome; None is noted as an error of NaN."""
        outcome = outcome or Outcome(math.nan, math.nan, math.nan, math.nan, 0)
        place = {"text": text, "length": length, "layer": layer, "budget": budget, "form": form}
        self.records.append({**place, **outcome._asdict()})

    def mean(self, name: str, form: str, **places: Any) -> float:
        """Return the mean of a figure over the records of a form at these places."""
        found = [x[name] for x in self.records if x["form"] == form and all(x[k] == v for k, v in places.items())]
        return statistics.fmean(found) if found else math.nan

    def above_oracle(self, form: str, budget: int) -> list[float]:
        """Return, for each text and length, the form's error above the oracle's over the published method's."""
        ratios = []
        for text, length in product(self.texts, self.lengths):
            errors = [
                self.mean("error", x, text=text, length=length, budget=budget) for x in (form, "oracle", "published")
            ]
            ratios.append((errors[0] - errors[1]) / (errors[2] - errors[1]))
        return ratios

    def table(self, forms: Sequence[str]) -> Iterator[str]:
        """Return a Markdown table."""
        yield "| form | " + " | ".join(f"t = {budget}" for budget in self.budgets) + " |"
        yield "|---|" + "---|" * len(self.budgets)
        for form in forms:
            cells = []
            for budget in self.budgets:
                ratios = self.above_oracle(form, budget)
                error, read, attended = (
                    self.mean(name, form, budget=budget) for name in ("error", "read_tokens", "attended")
                )
                cells.append(
                    f"{error:.2%}; {statistics.fmean(ratios):.2f}, {max(ratios):.2f}; {read:.0f}, {attended:.0f}"
                )
            yield f"| {form} | " + " | ".join(cells) + " |"
