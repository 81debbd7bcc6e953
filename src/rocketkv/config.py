"""What a user may choose: one budget, two stages, and the few knobs of the paper."""

from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, Self

from rocketkv.backends import BACKENDS, Scoring
from rocketkv.budget import Budget, check_count
from rocketkv.errors import ConfigError, UnknownOptionError
from rocketkv.eviction import EVICTION_POLICIES, EvictionPolicy
from rocketkv.formats import FORMATS, Format
from rocketkv.plan import Planner
from rocketkv.selection import SELECTION_METHODS, SelectionMethod

MODES = ("single_turn", "multi_turn")
DEFAULT_SELECTION = "lowbit"
_SELECTION_NAMES = ("kept_tokens", "split", "build_index", "logits", "scored_bytes")


@dataclass(frozen=True, kw_only=True)
class RocketKVConfig:
    """How a cache compresses; frozen, checked when made.

    Attributes:
        token_budget: tokens' worth of KV traffic that one decode step may cost per KV head, >= window_size with
            `peak` and `snapkv`. A method that scores every token reads one channel of each at least, so the step of a
            row that holds very many costs more, and a warning says so: `lowbit` from
            `7 * (token_budget / 4 - 1) * head_dim` tokens on (a third instead of a quarter with 8 bits), `sparq` from
            `token_budget * head_dim` on.
        mode: `single_turn` frees what stage 1 evicts; `multi_turn` keeps every token in an archive and chooses anew
            at each turn.
        archive_on_host: whether the archive of `multi_turn` lies in the host's memory, so that a GPU holds the working
            set alone; each turn's prefill then moves it there and back, layer by layer.
        kv_dtype: how keys and values are stored: `auto`, as they come; or `int8`, in half the memory of 16 bits, so
            that a method that selects attends to nearly twice as many tokens for the same traffic (docs/lowbit.md). A
            first prompt is still attended exactly.
        eviction: stage 1, a name of `EVICTION_POLICIES` or an object with the method of `EvictionPolicy`; `peak` keeps
            what any query of the window looked hard at, `snapkv`, as published, what all of them together looked at.
        selection: stage 2, a name of `SELECTION_METHODS` or an object with the methods of `SelectionMethod`.
        window_size: last prompt tokens that vote in stage 1 and always stay, >= 1.
        kernel_size: width of stage 1's max-pooling over the sequence, odd, >= 1.
        sink_tokens: first tokens of the working set always attended, counted inside `top_k`.
        recent_tokens: last tokens always attended, counted inside `top_k`; None: `top_k // 8` (docs/accuracy.md).
        dense_below: rows with at most this many kept tokens skip selection and attend to all of them; None: twice the
            token budget, below which selecting is not faster (docs/benchmarks.md), or 0 with a `budget` of your own.
            With 0 the budget is strict: a growing answer exceeds it by at most 1/8 until its row is planned again, and
            very long rows exceed it as `token_budget` says. `exact` always reads every key to score it.
        new_tokens: tokens expected to be generated, which the budget then accounts for; 0: unknown. Room for very many
            is made in steps, as they come.
        budget: the split itself instead of the formulas, the same for every row and turn.
        backend: what decodes: `auto`, the fastest that accepts device, dtype and method, or plain torch if none does;
            `reference`, plain torch; or a backend's name, which a cache that it does not accept then refuses. Only
            decoding is affected: prefill work (stage 1's scores, the index) always uses the fastest kernel available.

    Raises:
        ConfigError: an option is out of range or contradicts another.
        UnknownOptionError: an option does not exist.
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
                f"RocketKVConfig({given}) does not say which options these are; write token_budget=..."
            )
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                close = get_close_matches(name, known, 1)
                hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}."
                raise UnknownOptionError(f"{name} is not an option of RocketKVConfig; {hint}")
        if options and "token_budget" not in options:  # a copy is made without any
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
            self._set(name, check_count(name, getattr(self, name), least))
        for name in ("recent_tokens", "dense_below"):
            if getattr(self, name) is not None:
                self._set(name, check_count(name, getattr(self, name), 0))
        _check_choice("mode", self.mode, MODES)
        _check_choice("kv_dtype", self.kv_dtype, tuple(FORMATS))
        if not isinstance(self.archive_on_host, bool):
            raise ConfigError(f"archive_on_host={self.archive_on_host!r} is not a truth value; give True or False.")
        if self.archive_on_host and self.mode != "multi_turn":
            raise ConfigError("archive_on_host=True needs an archive; set mode='multi_turn' or leave it out.")
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
            raise ConfigError("selection='exact' reads whole keys as they come; set kv_dtype='auto' for the oracle.")
        if self.kernel_size % 2 == 0:
            raise ConfigError(
                f"kernel_size={self.kernel_size} is even; a pooling window has a centre, so give an odd one."
            )
        if self.eviction in ("snapkv", "peak") and self.token_budget < self.window_size:
            raise ConfigError(
                f"token_budget={self.token_budget} is smaller than window_size={self.window_size}; "
                "raise token_budget or lower window_size."
            )
        if self.budget is not None:
            if not isinstance(self.budget, Budget):
                raise ConfigError(
                    f"budget={self.budget!r} is no rocketkv.Budget; make one, or leave it to the formulas."
                )
            counts = zip(Budget._fields, self.budget, strict=True)
            self._set("budget", Budget(*(check_count(f"budget.{name}", value, 1) for name, value in counts)))
        pinned = self.sink_tokens + (self.recent_tokens or 0)
        most = self.budget.top_k if self.budget is not None else int(self.token_budget / self.format.least_share)
        if pinned > most:  # the plan checks them against the method's own top_k
            raise ConfigError(
                f"sink_tokens + recent_tokens = {pinned} is more than the {most} tokens that a step may attend to; "
                "pin fewer or raise token_budget."
            )

    def _set(self, name: str, value: object) -> None:
        """Replace an option by the same as a plain number."""
        object.__setattr__(self, name, value)

    @classmethod
    def paper(cls, token_budget: int, **options: Any) -> Self:
        """The method as published; options and errors are those of the class.

        Stage 1 sums the attention of the window, and stage 2 reads page bounds along the channels of the largest |q|.
        No token is pinned, and no row is attended beyond its budget.
        """
        published = {"eviction": "snapkv", "selection": "hybrid_paper", "recent_tokens": 0, "dense_below": 0}
        return cls(**{"token_budget": token_budget, **published, **options})

    @property
    def dense_tokens(self) -> int:
        """Tokens up to which a row is attended in full, beyond what fits in its split."""
        if self.dense_below is not None:
            return self.dense_below
        return 0 if self.budget is not None else 2 * self.token_budget

    def eviction_policy(self) -> EvictionPolicy:
        """The object that does stage 1."""
        if isinstance(self.eviction, str):
            return EVICTION_POLICIES[self.eviction](self)
        return self.eviction

    def selection_method(self) -> SelectionMethod:
        """The object that does stage 2."""
        if not isinstance(self.selection, str):
            return self.selection
        return SELECTION_METHODS[self.selection].from_config(self)

    @property
    def format(self) -> Format:
        """How keys and values are stored."""
        return FORMATS[self.kv_dtype]

    def budget_for(self, seq_len: int, head_dim: int) -> Budget:
        """What stage 1 keeps of a prompt, and what a decode step of stage 2 then reads.

        Args:
            seq_len: prompt tokens, >= 1.
            head_dim: channels of a key, >= 1.

        Raises:
            ConfigError: a number is out of range, or more tokens are pinned than attended.
        """
        return Planner(self, self.selection_method(), check_count("head_dim", head_dim, 1)).budget_for(seq_len)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = get_close_matches(str(value), choices, 1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(choices)}."
        raise ConfigError(f"{name}={value!r} does not exist; {hint}")
