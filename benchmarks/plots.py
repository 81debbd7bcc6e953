"""The pictures of the README and of docs/benchmarks.md, from the results committed in benchmarks/results.

.venv/bin/python benchmarks/plots.py
"""

import json
from pathlib import Path

from rocketkv.bench.plot import save_plot

HERE = Path(__file__).parent
PLOTS = HERE.parent / "docs" / "plots"
MESSAGES = {
    "model-by-length": "With RocketKV a token costs the same, however long the prompt",
    "layer-by-length": "A step's attention does not grow with the context",
    "layer-by-budget": "A step costs what its budget allows",
    "layer-by-batch": "Every row of a batch gains",
}

if __name__ == "__main__":
    for name, message in MESSAGES.items():
        result = json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))
        save_plot(result, PLOTS / f"{name}.svg", message)
