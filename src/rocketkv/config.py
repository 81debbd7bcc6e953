"""The options that a user may set: one budget, two stages, and the few parameters of the paper."""

from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, Self

import torch

from rocketkv.backends import BACKENDS, Scoring
from rocketkv.budget import Budget, check_count
from rocketkv.errors import ConfigError, UnknownOptionError
from rocketkv.eviction import EVICTION_POLICIES, EvictionPolicy
from rocketkv.formats import FORMATS, Format
from rocketkv.plan import Planner
from rocketkv.selection import SELECTION_METHODS, SelectionMethod

MODES = ("single_turn", "multi_turn")
DEFAULT_SELECTION = "lowbit"
MOST_TOKENS = 10**12  # a larger number is a mistake, and might not fit in a tensor of integers
_SELECTION_NAMES = ("kept_tokens", "split", "build_index", "logits", "scored_bytes")


@dataclass(frozen=True, kw_only=True)
class RocketKVConfig:
    """The options of the compression; the object is frozen, and its options are checked when it is made.

    Attributes:
        token_budget: the KV traffic that one decode step may cost per KV head, in tokens, >= 1, and >= window_size
            with `peak` and `snapkv`. A method that scores every token reads at least one channel of each, so the step
            of a very long row exceeds the budget, with a warning: `lowbit` from
            `7 * (token_budget / 4 - 1) * head_dim` kept tokens on (a third instead of a quarter with 8 bits), `sparq`
            from `token_budget * head_dim` on.
        mode: `single_turn` frees the tokens that stage 1 evicts; `multi_turn` keeps every token in an archive, from
            which each turn chooses anew.
        archive_on_host: True puts the archive of `multi_turn` into the host's memory, so that a GPU stores the working
            set alone; each turn's prefill then moves the archive to the GPU and back, layer by layer.
        kv_dtype: the format of stored keys and values: `auto` stores them as they come; `int8` stores them in half the
            memory of 16 bits, so that a step with low-bit keys attends to about 1.7 times as many tokens for the same
            traffic (docs/lowbit.md). A first prompt is attended exactly in both cases.
        eviction: stage 1, a name of `EVICTION_POLICIES` or an object with the method of `EvictionPolicy`. `peak` keeps
            the tokens that any query of the window attends to strongly; `snapkv`, the published policy, keeps those
            that all queries of the window together attend to.
        selection: stage 2, a name of `SELECTION_METHODS` or an object with the methods of `SelectionMethod`.
        window_size: the number of last prompt tokens that vote in stage 1 and always stay, >= 1.
        kernel_size: the width, in tokens, of stage 1's max-pooling over the sequence, odd, >= 1. `snapkv` gives a
            token's score to as many tokens before it as after it, `peak` to `kernel_size // 4` before it and the rest
            after it.
        sink_tokens: the number of first kept tokens that every step attends to, >= 0, counted inside `top_k`.
        recent_tokens: the number of last tokens that every step attends to, >= 0, counted inside `top_k`; None means
            `top_k // 8` (docs/accuracy.md).
        dense_below: rows with at most this many kept tokens, >= 0, skip selection and attend to all of them. None means
            twice the token budget, below which selecting is not faster (docs/benchmarks.md), or 0 with a `budget` of
            your own. With 0 the budget is strict: a growing answer exceeds it by at most 1/8 until its row is planned
            again, and very long rows exceed it as described at `token_budget`. `exact` always reads every key.
        new_tokens: the number of tokens expected to be generated, >= 0, which the budget then includes; 0 if it is not
            known. The cache makes room for a large number in steps.
        budget: an explicit budget for every row and turn, in place of the formulas; None uses the formulas.
        backend: `auto` decodes with the fastest backend that accepts device, dtype and method, or in plain torch if
            there is none; `reference` decodes in plain torch; the name of a backend decodes with it or raises an error.
            Only decoding is affected: prefill work (stage 1's scores, the index) uses the fastest kernel available.

    Raises:
        ConfigError: an option is out of range or contradicts another.
        UnknownOptionError: an option does not exist or has no name, or `token_budget` is missing.
    """

    token_budget: int
    mode: Literal["single_turn", "multi_turn"] = "single_turn"
    archive_on_host: bool = False
    kv_dtype: str = "auto"
    eviction: str | EvictionPolicy = "peak"
    selection: str | SelectionMethod = DEFAULT_SELECTION
    window_size: int = 32
    kernel_size: int = 63
    sink_tokens: int = 0
    recent_tokens: int | None = None
    dense_below: int | None = None
    new_tokens: int = 0
    budget: Budget | None = None
    backend: str = "auto"

    def __new__(cls, *unnamed: object, **options: Any) -> Self:
        """Refuse unknown options by name before the fields are set."""
        if unnamed:
            given = ", ".join(map(repr, unnamed))
            raise UnknownOptionError(
                f"RocketKVConfig({given}) does not name its options; write RocketKVConfig(token_budget=...)."
            )
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                close = get_close_matches(name, known, 1)
                hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}."
                raise UnknownOptionError(f"{name} is not an option of RocketKVConfig; {hint}")
        if options and "token_budget" not in options:  # copy and pickle call this method without options
            raise UnknownOptionError(f"token_budget is missing beside {', '.join(options)}; give token_budget=...")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check every option and how they fit together."""
        for name, least in (
            ("token_budget", 1),
            ("window_size", 1),
            ("kernel_size", 1),
            ("sink_tokens", 0),
            ("new_tokens", 0),
        ):
            self._set_count(name, least)
        for name in ("recent_tokens", "dense_below"):
            if getattr(self, name) is not None:
                self._set_count(name, 0)
        _check_choice("mode", self.mode, MODES)
        _check_choice("kv_dtype", self.kv_dtype, tuple(FORMATS))
        if not isinstance(self.archive_on_host, bool):
            raise ConfigError(f"archive_on_host={self.archive_on_host!r} is not a truth value; give True or False.")
        if self.archive_on_host and self.mode != "multi_turn":
            raise ConfigError("archive_on_host=True needs an archive; set mode='multi_turn' or archive_on_host=False.")
        _check_choice("backend", self.backend, ("auto", "reference", *(backend.NAME for backend in BACKENDS)))
        for name in ("eviction", "selection"):
            if isinstance(given := getattr(self, name), type):
                raise ConfigError(f"{name}={given.__name__} is a class; give a name, or an object of that class.")
        if isinstance(self.eviction, str):
            _check_choice("eviction", self.eviction, tuple(EVICTION_POLICIES))
        elif not callable(getattr(self.eviction, "keep", None)):
            raise ConfigError(
                f"eviction={self.eviction!r} has no method keep; give a name ({', '.join(EVICTION_POLICIES)}) "
                "or an object like rocketkv.eviction.EvictionPolicy."
            )
        if isinstance(self.selection, str):
            _check_choice("selection", self.selection, tuple(SELECTION_METHODS))
        elif missing := [n for n in _SELECTION_NAMES if not callable(getattr(self.selection, n, None))]:
            raise ConfigError(
                f"selection={self.selection!r} lacks {', '.join(missing)}; give a name "
                f"({', '.join(SELECTION_METHODS)}) or derive from rocketkv.selection.SelectionMethod."
            )
        if not self.format.is_exact and getattr(self.selection_method(), "scoring", None) == Scoring.EXACT:
            raise ConfigError("selection='exact' cannot read keys in 8 bits; set kv_dtype='auto' or another selection.")
        if self.kernel_size % 2 == 0:
            raise ConfigError(f"kernel_size={self.kernel_size} is even; give an odd number.")
        if self.eviction in ("snapkv", "peak") and self.token_budget < self.window_size:
            raise ConfigError(
                f"token_budget={self.token_budget} is smaller than window_size={self.window_size}; "
                "raise token_budget or lower window_size."
            )
        if self.budget is not None:
            if not isinstance(self.budget, Budget):
                raise ConfigError(
                    f"budget={self.budget!r} is no rocketkv.Budget; give one, or None to use the formulas."
                )
            counts = zip(Budget._fields, self.budget, strict=True)
            self._set("budget", Budget(*(check_count(f"budget.{name}", value, 1) for name, value in counts)))
        pinned = self.sink_tokens + (self.recent_tokens or 0)
        most = self.budget.top_k if self.budget is not None else int(self.token_budget / self.format.least_share)
        if pinned > most:  # the plan later checks the pinned tokens against the method's own top_k
            raise ConfigError(
                f"sink_tokens + recent_tokens = {pinned} is more than the {most} tokens that a step may attend to; "
                "pin fewer or raise token_budget."
            )

    def _set_count(self, name: str, least: int) -> None:
        """Set an option to the same number as a plain int, checked to be one that tensors of integers can hold."""
        count = check_count(name, getattr(self, name), least)
        if count > MOST_TOKENS:
            raise ConfigError(f"{name}={count} is too large; give at most {MOST_TOKENS}.")
        self._set(name, count)

    def _set(self, name: str, value: object) -> None:
        """Set an option to the same value as a plain int or tuple."""
        object.__setattr__(self, name, value)

    @classmethod
    def paper(cls, token_budget: int, **options: Any) -> Self:
        """Return the options of the method as published (arXiv:2502.14051).

        Stage 1 sums the attention of the window, and stage 2 reads page bounds along the channels of the largest |q|.
        No token is pinned, and `dense_below` is 0.

        Args:
            token_budget: the KV traffic of one decode step, as described at the class.
            options: further options of the class, which replace the published ones.

        Raises:
            ConfigError, UnknownOptionError: as the class raises them.
        """
        published = {"eviction": "snapkv", "selection": "hybrid_paper", "recent_tokens": 0, "dense_below": 0}
        return cls(**{"token_budget": token_budget, **published, **options})

    @property
    def dense_tokens(self) -> int:
        """The value of `dense_below`, or its default: rows with at most so many kept tokens are attended in full."""
        if self.dense_below is not None:
            return self.dense_below
        return 0 if self.budget is not None else 2 * self.token_budget

    def eviction_policy(self) -> EvictionPolicy:
        """Return the eviction policy, the object that does stage 1."""
        if isinstance(self.eviction, str):
            return EVICTION_POLICIES[self.eviction](self)
        return self.eviction

    def selection_method(self) -> SelectionMethod:
        """Return the selection method, the object that does stage 2."""
        if not isinstance(self.selection, str):
            return self.selection
        return SELECTION_METHODS[self.selection].from_config(self)

    @property
    def format(self) -> Format:
        """The format in which keys and values are stored."""
        return FORMATS[self.kv_dtype]

    def budget_for(self, seq_len: int, head_dim: int) -> Budget:
        """Return how many tokens of a prompt stage 1 keeps, and what a decode step of stage 2 then reads.

        Args:
            seq_len: the number of prompt tokens, >= 1.
            head_dim: the number of channels of a key, >= 1.

        Returns:
            The budget of a row of this length.

        Raises:
            ConfigError: a number is out of range, an explicit budget does not fit head_dim, or more tokens are pinned
                than a step attends to.
        """
        head_dim = check_count("head_dim", head_dim, 1)
        return Planner(self, self.selection_method(), head_dim, torch.device("cpu")).budget_for(seq_len)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = get_close_matches(str(value), choices, 1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(choices)}."
        raise ConfigError(f"{name}={value!r} does not exist; {hint}")
