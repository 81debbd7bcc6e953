r"""Runs the `rocketkv` command with low-bit methods that differ in how many tokens stage 1 keeps.

`lowbit_1` keeps as many tokens as the paper's formula, `lowbit_1.4` 1.4 times as many, and so on (docs/lowbit.md); in
`lowbit_2_0.33` scoring takes a third of the budget, not a quarter:

    .venv/bin/python studies/held.py eval run --dtype bfloat16 --suite niah --budgets 64,128 --lengths 1024,2048 \
        --methods full,rocketkv:selection=lowbit_1,rocketkv:selection=lowbit_1.4 --samples 3 --out build/held
"""

from itertools import product

from rocketkv import RocketKVConfig
from rocketkv.cli import main
from rocketkv.selection import SELECTION_METHODS, LowBit

FACTORS = (1.0, 1.4, 2.0, 2.8)
SHARES = (0.25, 0.33, 0.5)


def lowbit_keeping(factor: float, share: float) -> type[LowBit]:
    """Return low-bit selection that keeps `factor` times the paper's tokens and spends `share` on scoring."""

    class Keeping(LowBit):
        @classmethod
        def from_config(cls, config: RocketKVConfig) -> "Keeping":
            return cls(factor, share)

    return Keeping


if __name__ == "__main__":
    for factor, share in product(FACTORS, SHARES):
        name = f"lowbit_{factor:g}" + (f"_{share:g}" if share != SHARES[0] else "")
        SELECTION_METHODS[name] = lowbit_keeping(factor, share)
    main()
