"""The pictures of docs/plots, from the records committed in benchmarks/results and benchmarks/accuracy.

.venv/bin/python benchmarks/plots.py
"""

import json
from pathlib import Path

from accuracy_tables import BUDGETS, MIN_SAMPLES, read

from rocketkv.bench.plot import save_plot
from rocketkv.eval.report.plots import draw_budgets, draw_depths
from rocketkv.eval.report.results import FULL_CACHE, Results
from rocketkv.figures import save_figure

HERE = Path(__file__).parent
PLOTS = HERE.parent / "docs" / "plots"
MESSAGES = {
    "model-by-length": "With RocketKV a token costs the same, however long the prompt",
    "layer-by-length": "A step's attention does not grow with the context",
    "layer-by-budget": "A step costs what its budget allows",
    "layer-by-batch": "Every row of a batch gains",
}
BY_BUDGET = ("full", "exact_topk", "rocketkv", "rocketkv_paper", "snapkv", "quest")
BY_DEPTH = ("full", "rocketkv", "rocketkv_paper", "snapkv", "streaming_llm")
DEPTH_BUDGET = 128


def choose(results: Results, methods: tuple[str, ...], budgets: tuple[int, ...]) -> Results:
    """Return the answers of some methods at some budgets, and of the full cache."""
    budgets_of_all = (None, *budgets)
    return Results([r for r in results.records if r["method"] in methods and r["token_budget"] in budgets_of_all])


def draw_speed() -> None:
    """Draw what was measured of speed and memory."""
    for name, message in MESSAGES.items():
        result = json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))
        save_plot(result, PLOTS / f"{name}.svg", message)


def draw_accuracy() -> None:
    """Draw the scores of SmolLM2 against the budget, as a table of docs/accuracy.md has them, and those by depth."""
    results = read("smollm2-niah", "smollm2-ruler")
    cells = [c for c in results.solved_by_full_cache(0.5) if len(results.values(FULL_CACHE, c)) >= MIN_SAMPLES]
    figure = draw_budgets(choose(results.of(cells), BY_BUDGET, BUDGETS))
    figure.suptitle(
        "RocketKV keeps most of the full cache's score at small budgets", x=0.01, ha="left", fontweight="bold"
    )
    save_figure(figure, PLOTS / "accuracy-by-budget.svg")
    figure = draw_depths(choose(read("smollm2-niah"), BY_DEPTH, (DEPTH_BUDGET,)), "passkey_tokens")
    figure.suptitle("RocketKV finds the needle at every depth", x=0.01, ha="left", fontweight="bold")
    save_figure(figure, PLOTS / "needles-by-depth.svg")


if __name__ == "__main__":
    draw_speed()
    draw_accuracy()
