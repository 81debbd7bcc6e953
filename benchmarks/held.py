r"""How many tokens should stage 1 leave to low-bit keys? The `rocketkv` command with low-bit methods that differ in it.

`lowbit_1` leaves what the paper's formula says, `lowbit_1.4` and the others so many times that (docs/lowbit.md):

    .venv/bin/python benchmarks/held.py eval run --dtype bfloat16 --suite niah --budgets 64,128 --lengths 1024,2048 \
        --methods full,rocketkv:selection=lowbit_1,rocketkv:selection=lowbit_1.4 --samples 3 --out build/held
"""

from rocketkv.budget import held_tokens
from rocketkv.cli import main
from rocketkv.selection import SELECTION_METHODS, LowBit

FACTORS = (1.0, 1.4, 2.0, 2.8)


def lowbit_holding(factor: float) -> type[LowBit]:
    """Low-bit keys of `factor` times as many tokens as the paper's formula says."""

    class Holding(LowBit):
        def held_tokens(self, seq_len: int, token_budget: int) -> int:
            return min(seq_len, int(factor * held_tokens(seq_len, token_budget)))

    return Holding


if __name__ == "__main__":
    for factor in FACTORS:
        SELECTION_METHODS[f"lowbit_{factor:g}"] = lowbit_holding(factor)
    main()
