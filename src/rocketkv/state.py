"""The state of a layer's cache between calls: how it is read, copied, cut to some rows and taken back."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from rocketkv.budget import check_count
from rocketkv.cache import WorkingSet
from rocketkv.checks import check_config, check_rows
from rocketkv.config import RocketKVConfig
from rocketkv.decode import Decoder
from rocketkv.errors import InputError
from rocketkv.exclusive import exclusive
from rocketkv.ops import LogitTerms
from rocketkv.plan import Planner, SelectionPlan
from rocketkv.stats import LayerStats


class Observed(NamedTuple):
    """The input of stage 1 in a prefill; that of the last one may be kept, so that a fork can run stage 1 later."""

    query: Tensor  # [B, Hq, W, D], the queries, or the last of them
    num_queries: Tensor  # [B] int64, how many of the W are no padding; those are the last ones
    scale: float
    terms: LogitTerms
    is_first: bool  # True if only pieces of the same prompt came before that prefill

    def last(self, num_queries: int) -> Self:
        """Return a copy of the last queries, and how many of them are no padding."""
        query, counts = self.query[:, :, -num_queries:].clone(), self.num_queries.clamp(max=num_queries)
        return self._replace(query=query, num_queries=counts, terms=self.terms.of_last(num_queries))


class LayerState:
    """The state of a `LayerCache`; its arguments and attributes are described there."""

    def __init__(self, config: RocketKVConfig, keep_queries: int = 0) -> None:
        self.config = check_config(config)
        self.keep_queries = check_count("keep_queries", keep_queries, 0)
        self.user: dict[str, int] = {}
        self.trace = False
        self.eviction = config.eviction_policy()
        self.selection = config.selection_method()
        self._decoder = Decoder(config, self.selection)
        self.reset()

    @exclusive
    def reset(self) -> None:
        """Forget every token, so that the next prefill begins a new text."""
        self.working: WorkingSet | None = None
        self.plan: SelectionPlan | None = None
        self.num_seen = 0
        self.just_prefilled = False
        self.num_decoded = 0
        self.last_attended: Tensor | None = None
        self._num_reads = 1  # how many queries the last decoded token had: one, and one of each layer that shares
        self._read_bytes: int | Tensor = 0  # a device tensor after a GPU step; reading it synchronises
        self._observed: Observed | None = None
        self._decoder.forget()

    @property
    def positions(self) -> Tensor:
        """The positions of the kept tokens, `[B, Hkv, N]` int64, ascending.

        Each row counts its own tokens from 0, padding left out. A row or head with fewer than N kept tokens has -1
        after its last one.

        Raises:
            InputError: nothing was prefilled.
        """
        working = self._started()
        beyond = torch.arange(working.max_length, device=working.lengths.device) >= working.lengths[..., None]
        return working.positions.masked_fill(beyond, -1)

    @property
    def num_stored(self) -> Tensor:
        """The number of kept tokens, `[B, Hkv]` int64; the archive of `multi_turn` is not counted.

        Raises:
            InputError: nothing was prefilled.
        """
        return self._started().lengths.clone()

    @property
    def row_seen(self) -> list[int]:
        """The number of tokens seen by each row, padding left out.

        Raises:
            InputError: nothing was prefilled.
        """
        return self._started().row_seen

    @property
    def awaits_prompt(self) -> bool:
        """Whether a prefill must come before the next decode, because the cache was forked or went back."""
        return self.working is not None and self.plan is None

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of incoming keys and values; None before the first prefill."""
        return None if self.working is None else self.working.like.dtype

    @property
    def backend(self) -> str | None:
        """The backend that runs the decode steps, or `reference`; None until the first step after a prefill."""
        return self._decoder.backend

    @property
    def read_bytes(self) -> int:
        """The bytes of index, keys and values that the last decode step had to read, summed over rows and heads."""
        return self._read_bytes if isinstance(self._read_bytes, int) else int(self._read_bytes.sum())

    @property
    def kv_bytes(self) -> int:
        """The bytes allocated for keys, values, positions, archive and index, spare capacity included."""
        return 0 if self.working is None else self.working.num_bytes

    def keys(self) -> Tensor:
        """Return the keys of every token seen, `[B, Hkv, N, D]`, as they are stored; undefined beyond a row's tokens.

        Raises:
            InputError: nothing was prefilled, or this cache is not `multi_turn`.
        """
        working = self._started()
        if working.archive is None:
            raise InputError("a single_turn cache has evicted keys; set mode='multi_turn' to look at all of them.")
        return working.draft().every_token().fields["keys"]

    def stats(self) -> LayerStats:
        """Return what the layer stores and reads, beside what a full cache would."""
        working = self.working
        if working is None:
            return LayerStats()
        full_bytes = 2 * working.key_bytes * working.lengths.shape[1] * sum(working.row_seen)
        return LayerStats(
            num_seen=sum(working.row_seen) / len(working.row_seen),
            num_stored=float(working.lengths.double().mean()),
            kv_bytes=self.kv_bytes,
            read_bytes=self.read_bytes,
            full_kv_bytes=full_bytes,
            full_read_bytes=full_bytes * self._num_reads,
        )

    def end_turn(self) -> None:
        """Let the next prompt be a turn of its own, even if nothing was decoded since the last prompt."""
        self.just_prefilled = False

    def join_pieces(self) -> None:
        """Count all prefills so far as pieces of one prompt, so that a fork compresses them as one.

        The last piece must have as many queries as a fork looks at, its `window_size`.
        """
        if self._observed is not None:
            self._observed = self._observed._replace(is_first=True)

    @exclusive
    def select_rows(self, rows: Tensor) -> None:
        """Replace the batch by its rows `rows`, as beam search does; a row may be repeated or left out.

        Args:
            rows: `[B']` int64 or int32, 0 to B - 1, at least one.

        Raises:
            InputError: nothing was prefilled, or `rows` does not fit.
        """
        working, plan = self._prefilled()
        chosen = check_rows(rows, working.seen.shape[0])
        working = working.draft()
        working.select_rows(torch.tensor(chosen, device="cpu"))
        observed = self._observed
        if observed is not None:
            rows = rows.to(working.seen.device)
            terms = observed.terms.of_rows(rows)
            observed = observed._replace(
                query=observed.query[rows], num_queries=observed.num_queries[rows], terms=terms
            )
        plan = self._planner(working).select_rows(plan, chosen, working.tokens.row_lengths)
        self.working, self.plan, self._observed = working, plan, observed
        self._decoder.forget()

    def check_rewind(self, row_seen: Sequence[int]) -> None:
        """Raise the InputError that `rewind` would raise for these `row_seen`."""
        seen = self._started().row_seen
        if len(row_seen) != len(seen) or not all(0 < left <= num for left, num in zip(row_seen, seen, strict=True)):
            raise InputError(
                f"rows that have seen {seen} tokens cannot go back to {list(row_seen)}; "
                "give each row a number from 1 to the number of tokens that the row has seen."
            )
        if not self.only_decoded_since(row_seen) and self.config.mode != "multi_turn":
            raise InputError(
                f"a single_turn cache goes back over the {self.num_decoded} tokens decoded since its last prompt only, "
                "because tokens of the prompt were evicted; call reset(), or set mode='multi_turn'."
            )

    @exclusive
    def rewind(self, num_seen: int, row_seen: Sequence[int]) -> None:
        """Forget the last tokens, as if the cache had never seen them.

        After forgetting tokens decoded since the last prefill, decode may follow at once. Going back further needs the
        archive of `multi_turn`, and a prefill must follow, in which stage 1 chooses anew from the tokens that stay.

        Args:
            num_seen: the number of columns that stay, left padding included.
            row_seen: the number of tokens of each row that stay, padding left out, 1 to the tokens seen by the row.

        Raises:
            InputError: nothing was prefilled, the numbers do not fit, or tokens of the prompt are to go from a
                `single_turn` cache.
        """
        self.check_rewind(row_seen)
        if num_seen == self.num_seen:
            return
        working = self._started().draft()
        if self.only_decoded_since(row_seen):
            num_dropped = working.row_seen[0] - row_seen[0]
            num_decoded = self.num_decoded - num_dropped
            working.take_back(working.max_length - num_dropped, working.num_pending - num_dropped)
            seen, kept = ([num - num_decoded for num in nums] for nums in (row_seen, working.tokens.row_lengths))
            self.plan = self._planner(working).decoded(seen, kept, num_decoded)
            self.num_decoded = num_decoded
        else:
            working.truncate(list(row_seen))
            self.plan, self.num_decoded, self._observed = None, 0, None
        self.working, self.num_seen = working, num_seen
        self._decoder.forget()
        self.just_prefilled = self.plan is not None and self.num_decoded == 0

    def only_decoded_since(self, row_seen: Sequence[int]) -> bool:
        """Return whether the tokens after the first `row_seen` of each row were decoded since the last prefill."""
        dropped = [seen - left for seen, left in zip(self._started().row_seen, row_seen, strict=True)]
        return self.plan is not None and min(dropped) == max(dropped) <= self.num_decoded

    @exclusive
    def copy(self) -> Self:
        """Return an independent cache in the same state, as `copy.copy`, `copy.deepcopy` and `pickle` do, too."""
        copied = type(self).__new__(type(self))
        copied.__setstate__(self.__getstate__())
        with torch.inference_mode(False):
            copied.working, copied.plan = deepcopy(self.working), deepcopy(self.plan)
        return copied

    def __copy__(self) -> Self:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.copy()

    def __getstate__(self) -> dict[str, Any]:
        own = {"user": {}, "_read_bytes": self.read_bytes, "_decoder": Decoder(self.config, self.selection)}
        return {**vars(self), **own, "prompt": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def _begin_with(self, working: WorkingSet, plan: SelectionPlan, num_seen: int, observed: Observed | None) -> None:
        """Take over the results of a prefill; no statement here can fail."""
        self.working, self.plan, self.num_seen, self._observed = working, plan, num_seen, observed
        self.just_prefilled, self.num_decoded = True, 0
        self._decoder.forget()

    def _planner(self, working: WorkingSet) -> Planner:
        return Planner(self.config, self.selection, working.head_dim, working.like.device)

    def _started(self) -> WorkingSet:
        if self.working is None:
            raise InputError("this cache is empty; call prefill with a prompt first.")
        return self.working

    def _prefilled(self) -> tuple[WorkingSet, SelectionPlan]:
        if self.plan is None:
            raise InputError(
                "nothing was prefilled since this cache was made or forked; call prefill with a prompt first."
            )
        return self._started(), self.plan
