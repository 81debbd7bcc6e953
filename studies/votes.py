r"""How should stage 1 score tokens, and how far should its pool reach? The `rocketkv` command with more policies.

Each policy is a name for `eviction=` (`POLICIES` below), and needs its number of queries as `window_size`, 32 or 128.
The scores `p32`, `sum32` and so on are pooled as published, over 31 tokens to both sides; `sum32a47b15` and so on are
pooled as by default, over 47 tokens after and 15 before a token. `a23b23` and so on are further pools of the peak:

    .venv/bin/python studies/votes.py eval run --model gemma3-270m --dtype bfloat16 --budgets 128,256 \
        --methods exact_topk,rocketkv:eviction=p32,rocketkv:eviction=quota4:window_size=128 \
        --suite fidelity --lengths 4096 --samples 4 --data build/eval/novels --out build/votes
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, pad

from rocketkv import RocketKVConfig
from rocketkv.attention import LayerCache
from rocketkv.cache import WorkingSet
from rocketkv.cli import main
from rocketkv.eviction import EVICTION_POLICIES
from rocketkv.ops import NO_TERMS, LogitTerms, topk_mask
from rocketkv.ragged import Kept, RaggedTokens
from rocketkv.state import Observed

SHORT = 32  # the queries that vote by default, and the last tokens, which always stay
LONG = 128
PAGE = 64  # tokens

Votes = Callable[[Tensor], Tensor]  # from the weights `[Hkv, G, W, S]` of the last W queries to scores `[Hkv, S]`


def peak(weights: Tensor) -> Tensor:
    """The default: the largest weight that any query of any head gives."""
    return weights.amax((1, 2))


def total(weights: Tensor) -> Tensor:
    """The published score: the sum over queries and heads."""
    return weights.sum((1, 2))


def fading(factor: Callable[[Tensor], Tensor]) -> Votes:
    """Return the peak, in which a query counts by a factor that depends on the number of queries after it."""

    def score(weights: Tensor) -> Tensor:
        later = torch.arange(weights.shape[2] - 1, -1, -1)
        return peak(weights * factor(later)[:, None])

    return score


def two_votes(share: float) -> Votes:
    """Return the peak, in which queries before the last `SHORT` count by `share`."""
    return fading(lambda later: torch.where(later < SHORT, 1.0, share))


@dataclass(frozen=True)
class Policy:
    """Keeps the last `SHORT` tokens and the best before them, by the votes of the last queries.

    Attributes:
        votes: the score.
        window: the number of queries that vote.
        back: the number of tokens before a token that the pool gives the token's score.
        forward: the number of tokens after it.
        by_value: scores are multiplied by the norms of the values.
        floor: this part of the tokens is spread evenly over pages of `PAGE` tokens, the best of each page.
        quota: this part of the tokens goes by the peak of all queries of the window.
    """

    votes: Votes
    window: int = SHORT
    back: int = 31
    forward: int = 31
    by_value: bool = False
    floor: Fraction = Fraction(0)
    quota: Fraction = Fraction(0)

    def of_config(self, config: RocketKVConfig) -> "Policy":
        """Return the policy, whatever the configuration; its window must fit in the configuration's."""
        assert config.window_size >= self.window, "give the policy's window as window_size"
        return self

    def keep(
        self,
        query: Tensor,
        keys: Tensor,
        *,
        lengths: Tensor,
        num_queries: Tensor,
        num_tokens: Tensor,
        scale: float,
        terms: LogitTerms = NO_TERMS,
    ) -> Tensor:
        """Mark the tokens to keep of one text; see `EvictionPolicy.keep`."""
        assert query.shape[0] == 1, "the study takes one text at a time"
        assert terms.are_none, "the study has no sinks and no soft cap"
        num_kv_heads, seq_len, head_dim = keys.shape[1:]
        last = query[0, :, -self.window :].float().reshape(num_kv_heads, -1, self.window, head_dim)
        logits = last @ keys[0, :, None].float().transpose(2, 3) * scale
        slots = torch.arange(seq_len)
        weights = logits.masked_fill(slots > slots[-self.window :, None], -torch.inf).softmax(3)
        scores = self.votes(weights)[None]
        if self.by_value:
            scores = scores * VALUES[-1].float().norm(dim=3)
        before, number = seq_len - SHORT, num_tokens - SHORT
        best = self._pooled(scores, before)
        if self.floor:
            best[..., :before] += 2 * _best_of_pages(best[..., :before], self.floor * int(number))
        candidates = lengths - SHORT
        if self.quota:
            first = topk_mask(best, candidates=candidates, num_tokens=number - int(int(number) * self.quota))
            best = torch.where(first, torch.inf, self._pooled(peak(weights)[None], before))
        return topk_mask(best, candidates=candidates, num_tokens=number) | (slots >= before)

    def _pooled(self, scores: Tensor, before: int) -> Tensor:
        """Pool the scores of the tokens before the window."""
        padded = pad(scores[..., :before], (self.forward, self.back + SHORT))
        return max_pool1d(padded, self.forward + 1 + self.back, stride=1)


def _best_of_pages(scores: Tensor, number: Fraction) -> Tensor:
    """Mark about `number` of the tokens, as many in every page; `[1, Hkv, S]` bool."""
    num_pages = math.ceil(scores.shape[2] / PAGE)
    padded = pad(scores, (0, num_pages * PAGE - scores.shape[2]), value=-1.0)
    pages = padded.reshape(*scores.shape[:2], num_pages, PAGE)
    each = pages.topk(max(1, int(number / num_pages)), dim=3).indices
    return torch.zeros_like(pages, dtype=torch.bool).scatter(3, each, value=True).flatten(2)[..., : scores.shape[2]]


def half_life(queries: int) -> Policy:
    """Return the peak of `LONG` queries, in which so many queries earlier counts half."""
    return Policy(fading(lambda later: 0.5 ** (later / queries)), LONG)


SCORES = {
    "p32": Policy(peak),
    "p128": Policy(peak, LONG),
    "sum32": Policy(total),
    "headsum": Policy(lambda weights: weights.amax(2).sum(1)),
    "headmax": Policy(lambda weights: weights.sum(2).amax(1)),
    "two2": Policy(two_votes(1 / 2), LONG),
    "two4": Policy(two_votes(1 / 4), LONG),
    "two8": Policy(two_votes(1 / 8), LONG),
    "decay32": half_life(32),
    "decay16": half_life(16),
    "decay8": half_life(8),
    "linear": Policy(fading(lambda later: 1 - later / LONG), LONG),
    "value": Policy(peak, by_value=True),
    "valuesum": Policy(total, by_value=True),
    "floor8": Policy(peak, floor=Fraction(1, 8)),
    "floor4": Policy(peak, floor=Fraction(1, 4)),
    "quota8": Policy(two_votes(0), LONG, quota=Fraction(1, 8)),
    "quota4": Policy(two_votes(0), LONG, quota=Fraction(1, 4)),
    "quota2": Policy(two_votes(0), LONG, quota=Fraction(1, 2)),
}
POLICIES = {
    **SCORES,
    **{f"{name}a47b15": replace(score, back=15, forward=47) for name, score in SCORES.items()},
    **{
        f"a{forward}b{back}": Policy(peak, back=back, forward=forward)
        for forward, back in ((23, 23), (47, 47), (63, 63), (47, 15), (55, 7), (63, 15), (63, 31), (79, 15), (95, 31))
    },
}

VALUES: list[Tensor] = []  # `[1, Hkv, S, D]`, of the layer in which stage 1 runs
evict = LayerCache._evict


def evict_with_values(
    self: LayerCache, working: WorkingSet, prompt: Observed, keys: Tensor, tokens: RaggedTokens
) -> Kept | None:
    """Run stage 1, and note the values for it, because a policy is given none."""
    VALUES[:] = [tokens.views()["values"]]
    return evict(self, working, prompt, keys, tokens)


if __name__ == "__main__":
    LayerCache._evict = evict_with_values  # type: ignore[method-assign]
    for name, policy in POLICIES.items():
        EVICTION_POLICIES[name] = policy.of_config
    main()
