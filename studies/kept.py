r"""How many tokens should stage 1 leave to low-bit keys? The `rocketkv` command with low-bit methods that differ in it.

`lowbit_8t` leaves eight times the token budget, and `lowbit_1.4P` 1.4 times what the paper's formula says
(docs/lowbit.md); a quarter of the budget scores, in `lowbit_12t_third` a third, as with keys in 8 bits:

    .venv/bin/python studies/kept.py eval run --model gemma3-270m --budgets 128,256,512 --suite fidelity \
        --methods full,rocketkv:selection=lowbit_1.4P,rocketkv:selection=lowbit_8t --lengths 2048,4096,8192 \
        --samples 1 --data build/eval/novels --out build/kept
"""

from fractions import Fraction

from rocketkv import RocketKVConfig
from rocketkv.cli import main
from rocketkv.paper import kept_tokens
from rocketkv.selection import SELECTION_METHODS, LowBit

MULTIPLES = (8, 10, 12, 16)  # of the token budget
FACTORS = (1.0, 1.4, 2.0, 2.8)  # of the paper's number
SHARES = {"": Fraction(1, 4), "_third": Fraction(1, 3), "_half": Fraction(1, 2)}


def lowbit_keeping(share: Fraction, *, multiple: int = 0, factor: float = 0.0) -> type[LowBit]:
    """Return low-bit keys of `multiple` times the budget's tokens and `factor` times the paper's number of tokens."""

    class Keeping(LowBit):
        @classmethod
        def from_config(cls, config: RocketKVConfig) -> "Keeping":
            return cls(scoring_share=float(share))

        def kept_tokens(self, seq_len: int, token_budget: int) -> int:
            wanted = multiple * token_budget + factor * kept_tokens(seq_len, token_budget)
            return min(seq_len, int(wanted))

    return Keeping


if __name__ == "__main__":
    for suffix, share in SHARES.items():
        for multiple in MULTIPLES:
            SELECTION_METHODS[f"lowbit_{multiple}t{suffix}"] = lowbit_keeping(share, multiple=multiple)
        for factor in FACTORS:
            SELECTION_METHODS[f"lowbit_{factor:g}P{suffix}"] = lowbit_keeping(share, factor=factor)
    main()
