"""RocketKV on one screen: what happens to one attention layer at prefill and at decode. Start here.

prefill: append -> exact dense attention -> stage 1 keeps the tokens that the last queries looked at -> index them
decode:  append -> stage 2 scores the kept tokens cheaply -> exact attention to the best of them

`decode` works in one of two ways: as a fused step, one call of a backend (backends), or as the reference, the same
in plain torch, which any selection method, device and dtype can take and to which every backend is held.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rocketkv import ops
from rocketkv.backends import FusedStep, LayerTensors, Scoring, find_backend
from rocketkv.budget import check_count
from rocketkv.cache import WorkingSet
from rocketkv.checks import (
    check_adopted,
    check_attended,
    check_config,
    check_kept,
    check_logits,
    check_padding,
    check_rows,
    check_scale,
    check_tokens,
    exclusive,
    kind_of,
)
from rocketkv.config import RocketKVConfig
from rocketkv.errors import InputError, UnsupportedError
from rocketkv.index import LowBitIndex, PageIndex
from rocketkv.plan import (
    SelectionPlan,
    plan_decoded,
    plan_eviction,
    plan_outgrown,
    plan_prefilled,
    select_plan_rows,
)


class _Observed(NamedTuple):
    """What stage 1 looks at, kept of the last prefill so that a fork can run it later."""

    query: Tensor  # [B, Hq, W, D], the last queries
    num_queries: Tensor  # [B] int64, how many of them are real, the last ones
    scale: float
    is_first: bool  # whether nothing came before that prefill but pieces of the same prompt


class LayerCache:
    """The KV cache of one attention layer and the attention over it, compressed in two stages.

    RocketKV (arXiv:2502.14051), sections "SnapKV with GQA support", "Hybrid Sparse Attention" and "RocketKV-MT". Rows
    of a batch may differ in length; each is treated as it would be alone. With `kv_dtype="int8"` that holds for equal
    keys and values: what a model rounds otherwise in a batch may be stored with other codes, a whole step apart.

    A call that raises leaves the cache as it was, an interrupted one too, and can be made again. One thread at a time
    may use a cache; a second is refused. Other threads may use other caches, copies of this one too.

    Args:
        config: how it compresses.
        keep_queries: last queries of each prefill to keep for `fork`, in `multi_turn` only; 0: none.

    Attributes:
        config: how it compresses.
        keep_queries: as given.
        eviction: stage 1.
        selection: stage 2.
        working: what decode chooses from, with its index and archive; None before the first prefill.
        plan: how stage 2 spends the budget in each row; None before the first prefill.
        num_seen: columns seen so far, left padding included.
        just_prefilled: whether nothing was decoded since the last prefill.
        num_decoded: tokens decoded since the last prefill.
        user: empty, or the thread that uses this cache now.

    Raises:
        ConfigError: config is no `RocketKVConfig`, or keep_queries no whole number from 0 on.
    """

    def __init__(self, config: RocketKVConfig, keep_queries: int = 0) -> None:
        self.config = check_config(config)
        self.keep_queries = check_count("keep_queries", keep_queries, 0)
        self.user: dict[str, int] = {}
        self.eviction = config.eviction_policy()
        self.selection = config.selection_method()
        self.reset()

    @exclusive
    def reset(self) -> None:
        """Forget everything."""
        self.working: WorkingSet | None = None
        self.plan: SelectionPlan | None = None
        self.num_seen = 0
        self.just_prefilled = False
        self.num_decoded = 0
        self._read_bytes: int | Tensor = 0  # of a fused step perhaps numbers on the device: asking for them waits
        self._observed: _Observed | None = None
        self._fused: FusedStep | None = None  # over the buffers as they are; None: to be bound, or there is no backend
        self._fused_room = 0  # steps until a buffer has to grow or the plan to change
        self._fused_kind: tuple[object, ...] | None = None  # of tensors and scale, checked, that it was made for

    @exclusive
    def prefill(
        self, query: Tensor, key: Tensor, value: Tensor, *, padding: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Attend a prompt, or the next turn of a conversation, exactly; then compress what decode will read.

        In `multi_turn` a later turn attends to the archive of all tokens and the working set is chosen anew from it; in
        `single_turn` it attends to what is left and evicts again.

        Args:
            query: `[B, Hq, T, D]` float, after RoPE.
            key: `[B, Hkv, T, D]` in the dtype of `query`, after RoPE; Hkv divides Hq.
            value: like `key`.
            padding: `[B]` integers, padded columns at the left of each row, 0 to T - 1; None: no padding.
            scale: factor on the dot products, > 0; None: 1 / sqrt(D).

        Returns:
            `[B, Hq, T, D]`, zero in padded columns.

        Raises:
            InputError: shapes, dtypes, devices, padding or scale do not fit, or a policy of your own answers amiss.
            UnsupportedError: gradients are asked for.
            ConfigError: more tokens are pinned than attended.
        """
        check_tokens(query, key, value, self.working)
        padding = check_padding(padding, key)
        scale = check_scale(scale, query.shape[3])
        num_queries = torch.full((key.shape[0],), key.shape[2], device=key.device)
        num_queries = num_queries if padding is None else num_queries - padding
        is_first = self.working is None
        working = self._empty(key) if self.working is None else self.working.draft()  # until nothing can fail any more

        tokens = working.append_prompt(key, value, padding)
        keys, values, _ = tokens.views()
        lengths = None if is_first and padding is None else tokens.lengths
        output = ops.prefill_densely(query, keys, values, lengths=lengths, num_queries=num_queries, scale=scale)
        mask = self._evict(working, query, keys, tokens.lengths, num_queries, scale)
        working.keep(tokens, mask, self.config.new_tokens)
        observed = None
        if self.keep_queries and working.archive is not None:
            last = query[:, :, -self.keep_queries :].clone()
            observed = _Observed(last, num_queries.clamp(max=self.keep_queries), scale, is_first)
        self._begin_with(working, self._plan(working), self.num_seen + key.shape[2], observed)
        return output

    @exclusive
    def adopt(self, keys: Tensor, values: Tensor, *, num_seen: int, positions: Tensor | None = None) -> None:
        """Begin with tokens that were computed, and chosen, elsewhere: all of them stay, as after a prefill.

        Args:
            keys: `[B, Hkv, N, D]` float, after RoPE; what stage 1 would have kept.
            values: like `keys`.
            num_seen: tokens that each row has seen, those left out by stage 1 included, N to 2**30.
            positions: `[N]` or `[B, Hkv, N]` int64 or int32, ascending, less than num_seen, where the tokens stood in
                their text; None: 0 to N - 1.

        Raises:
            InputError: this cache is not empty, tensors do not fit, num_seen is smaller than N, or larger in a
                `multi_turn` cache, whose archive has all tokens.
            UnsupportedError: gradients are asked for.
            ConfigError: more tokens are pinned than attended.
        """
        if self.working is not None:
            raise InputError("this cache holds tokens already; adopt into an empty one, or call reset() first.")
        is_complete = self.config.mode == "multi_turn"
        seen, positions = check_adopted(keys, values, num_seen, positions, is_complete=is_complete)
        working = self._empty(keys)
        tokens = working.append_prompt(keys, values, None)
        tokens.fields[-1] = positions
        working.keep(tokens, None, self.config.new_tokens)
        working.seen = torch.full_like(working.seen, seen)
        self._begin_with(working, self._plan(working), seen, None)

    @exclusive
    def decode(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        attended: Tensor | None = None,
    ) -> Tensor:
        """Attend one new token per row to the best of what is held, or to all of it where that takes no longer.

        Args:
            query: `[B, Hq, 1, D]` float, after RoPE.
            key: `[B, Hkv, 1, D]` in the dtype of `query`, after RoPE.
            value: like `key`.
            scale: factor on the dot products, > 0; None: 1 / sqrt(D).
            attended: `[B, Hkv, N]` bool on the device of the cache, N more than any row has seen; set to True at the
                positions of the tokens that were attended to, to False elsewhere. None: not asked for.

        Returns:
            `[B, Hq, 1, D]`.

        Raises:
            InputError: shapes, dtypes, devices, scale or `attended` do not fit, or nothing was prefilled.
            UnsupportedError: gradients are asked for, or the backend asked for by name does not take this cache.
            ConfigError: a row outgrew its plan, and more tokens are pinned than attended by the next.
        """
        working, plan = self._prefilled()
        kind = kind_of(query, key, value, scale)
        if kind != self._fused_kind or torch.is_grad_enabled():
            check_tokens(query, key, value, working)
            if query.shape[2] != 1:
                raise InputError(f"decode takes one token per row, not {query.shape[2]}; use prefill for a prompt.")
        if attended is not None:
            check_attended(attended, working)
        if kind != self._fused_kind or self._fused_room == 0:
            factor = check_scale(scale, query.shape[3])
            self._fused_kind = None
            plan = self.plan = self._prepare(working, plan)
            self._fused = self._bind(working, plan, query.shape[1], factor)
            self._fused_room = min(working.room, plan.steps_left)
            if working.max_length < plan.dense_length:
                self._fused_room = min(self._fused_room, plan.dense_length - working.max_length)
            self._fused_kind = kind
        if self._fused is None:
            self._fused_room = 0  # the next step, too, is prepared anew
            self.working, output, self._read_bytes = self._decode_by_reference(
                query, key, value, working, plan, scale, attended
            )
        else:
            output, self._read_bytes = self._decode_fused(self._fused, query, key, value, working, attended)
            self._fused_room -= 1
        plan.steps_left -= 1
        self.num_seen += 1
        self.num_decoded += 1
        self.just_prefilled = False
        return output

    def _decode_fused(
        self, step: FusedStep, query: Tensor, key: Tensor, value: Tensor, working: WorkingSet, attended: Tensor | None
    ) -> tuple[Tensor, int | Tensor]:
        """The decode step of a backend: the output and the bytes read. If it breaks off, nothing was decoded."""
        num_held, num_pending = working.max_length, working.num_pending
        try:
            places = None if attended is None else torch.full_like(working.tokens.fields[-1], -1)
            output, read_bytes = step(query, key, value, places)
            working.count_appended()
            if attended is not None and places is not None:
                working.mark(attended, places.long())
        except BaseException:
            self._fused_kind = None
            working.take_back(num_held, num_pending)
            raise
        return output, read_bytes

    def _decode_by_reference(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        before: WorkingSet,
        plan: SelectionPlan,
        scale: float | None,
        attended: Tensor | None,
    ) -> tuple[WorkingSet, Tensor, int]:
        """The decode step in plain torch: the next working set, the output and the bytes read."""
        scale = check_scale(scale, query.shape[3])
        working = before.draft()
        before.index = None  # should this break off, it may have tokens that are no more
        working.append(key, value)
        lengths = working.lengths
        logits = None
        if working.max_length > plan.dense_length:
            grouped = query.reshape(*key.shape[:2], -1, key.shape[3])  # [B, Hkv, G, D]
            logits = self.selection.logits(grouped, working, plan.num_channels, scale)
        if logits is None:
            keys, values = working.keys_and_values()
            ragged = lengths if working.tokens.is_ragged else None
            if attended is not None:
                working.mark(attended, _first(lengths, working.max_length))
            output = ops.decode_densely(query, keys, values, lengths=ragged, scale=scale)
            return working, output, int(lengths.sum()) * working.token_bytes
        logits = check_logits(logits, self.selection, grouped, working.max_length)
        counts = lengths.where(lengths <= plan.dense_lengths[:, None], plan.top_k[:, None])
        chosen = ops.choose_tokens(
            ops.score_tokens(logits, lengths),
            lengths=lengths,
            top_k=counts.amax(1),
            sinks=plan.sinks,
            recents=plan.recents,
        )
        if attended is not None:
            working.mark(attended, chosen.where(_first(counts.minimum(lengths), chosen.shape[2]) >= 0, -1))
        keys, values, slots = working.locate(chosen)
        output = ops.decode_sparsely(query, keys, values, slots=slots, counts=counts, scale=scale)
        return working, output, self._count_read_bytes(working, plan)

    @property
    def positions(self) -> Tensor:
        """Original positions of the tokens that decode chooses from, `[B, Hkv, N]` int64, ascending.

        Each row counts its own tokens from 0, padding left out. Where a row or head holds fewer than N: -1.

        Raises:
            InputError: nothing was prefilled.
        """
        working = self._started()
        beyond = torch.arange(working.max_length, device=working.lengths.device) >= working.lengths[..., None]
        return working.positions.masked_fill(beyond, -1)

    @property
    def num_stored(self) -> Tensor:
        """Tokens that decode chooses from, `[B, Hkv]` int64; the archive of `multi_turn` is not counted.

        Raises:
            InputError: nothing was prefilled.
        """
        return self._started().lengths.clone()

    @property
    def row_seen(self) -> list[int]:
        """Tokens seen by each row, padding left out.

        Raises:
            InputError: nothing was prefilled.
        """
        return self._started().row_seen

    @property
    def awaits_prompt(self) -> bool:
        """Whether a prefill must come before anything is decoded, as the cache was forked or went back."""
        return self.working is not None and self.plan is None

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype in which keys and values come; None before the first prefill."""
        return None if self.working is None else self.working.none.dtype

    @property
    def read_bytes(self) -> int:
        """Bytes of index, keys and values that the last decode step had to read, all rows and heads."""
        return self._read_bytes if isinstance(self._read_bytes, int) else int(self._read_bytes.sum())

    @property
    def kv_bytes(self) -> int:
        """Bytes held: keys, values, positions, archive and index, spare capacity included."""
        return 0 if self.working is None else self.working.num_bytes

    @exclusive
    def select_rows(self, rows: Tensor) -> None:
        """Replace the batch by its rows `rows` (`[B']` int64), repeated or dropped as they come: beam search.

        Raises:
            InputError: nothing was prefilled, or rows are no numbers from 0 to B - 1, at least one.
        """
        working, plan = self._prefilled()
        chosen = check_rows(rows, working.seen.shape[0])
        rows = rows.to(working.seen.device)
        working = working.draft()
        working.select_rows(rows)
        observed = self._observed
        if observed is not None:
            observed = observed._replace(query=observed.query[rows], num_queries=observed.num_queries[rows])
        plan = select_plan_rows(self.config, plan, chosen, working.lengths)
        self.working, self.plan, self._observed, self._fused_kind = working, plan, observed, None

    def check_rewind(self, row_seen: Sequence[int]) -> None:
        """Refuse what `rewind` cannot do."""
        seen = self._started().row_seen
        if len(row_seen) != len(seen) or not all(0 < left <= num for left, num in zip(row_seen, seen, strict=True)):
            raise InputError(f"rows that have seen {seen} tokens cannot go back to {list(row_seen)}; give 1 to those.")
        if not self.only_decoded_since(row_seen) and self.config.mode != "multi_turn":
            raise InputError(
                f"a single_turn cache goes back over the {self.num_decoded} tokens decoded since its last prompt only, "
                "as it has evicted tokens of the prompt; call reset(), or set mode='multi_turn'."
            )

    @exclusive
    def rewind(self, num_seen: int, row_seen: Sequence[int]) -> None:
        """Forget the last tokens, as if they had never come.

        Tokens decoded since the last prefill go without a trace, and decode may follow at once. Going back further
        takes the archive of `multi_turn`; then a prefill must follow, which chooses anew from what is left.

        Args:
            num_seen: columns that stay, left padding included.
            row_seen: tokens of each row that stay, padding left out, 1 to those it has seen.

        Raises:
            InputError: the numbers do not fit, or tokens of the prompt are to go from a `single_turn` cache.
        """
        self.check_rewind(row_seen)
        if num_seen == self.num_seen:
            return
        working = self._started().draft()
        if self.only_decoded_since(row_seen):
            num_dropped = working.row_seen[0] - row_seen[0]
            num_decoded = self.num_decoded - num_dropped
            working.take_back(working.max_length - num_dropped, max(working.num_pending - num_dropped, 0))
            self.plan = plan_decoded(
                self.config,
                self.selection,
                seen=[num - num_decoded for num in row_seen],
                held=working.lengths - num_decoded,
                num_decoded=num_decoded,
                head_dim=working.head_dim,
            )
            self.num_decoded = num_decoded
        else:
            working.truncate(torch.tensor(row_seen, device=working.seen.device))
            self.plan, self.num_decoded, self._observed = None, 0, None
        self.working, self.num_seen, self._fused_kind = working, num_seen, None
        self.just_prefilled = self.plan is not None and self.num_decoded == 0

    def only_decoded_since(self, row_seen: Sequence[int]) -> bool:
        """Whether the tokens after the first `row_seen` of each row were decoded since the last prefill."""
        dropped = [seen - left for seen, left in zip(self._started().row_seen, row_seen, strict=True)]
        return self.plan is not None and min(dropped) == max(dropped) <= self.num_decoded

    @exclusive
    def copy(self) -> "LayerCache":
        """An independent cache in the same state; so are what `copy.copy`, `copy.deepcopy` and `pickle` make."""
        copied = type(self).__new__(type(self))
        copied.__setstate__(self.__getstate__())
        with torch.inference_mode(False):
            copied.working, copied.plan = deepcopy(self.working), deepcopy(self.plan)
        return copied

    def __copy__(self) -> "LayerCache":
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerCache":
        return self.copy()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "user": {}, "_read_bytes": self.read_bytes, "_fused": None, "_fused_kind": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def join_pieces(self) -> None:
        """Count all prefills so far as pieces of one prompt, so that a fork compresses them as one.

        The last piece must have as many queries as a fork looks at, its `window_size`.
        """
        if self._observed is not None:
            self._observed = self._observed._replace(is_first=True)

    @exclusive
    def fork(self, config: RocketKVConfig) -> "LayerCache":
        """A cache with the same past that compresses as `config` says; this one stays as it is.

        Right after a prefill whose last queries were kept (`keep_queries`), the fork has run stage 1 with them and is
        ready to decode: it is, to the bit, a cache that took in all of the past itself, the last prefill as one of its
        own. Without them it starts from its next prefill on, as the next turn of what it has seen. If this cache stores
        8 bits, the past is what it has stored.

        Raises:
            ConfigError: config is no `RocketKVConfig`, or pins more tokens than it attends to.
            InputError: this cache is not `multi_turn`, so that there is no archive; too few queries were kept for
                `config`; a `single_turn` fork has none, or would have evicted at an earlier prefill; or this cache
                stores 8 bits and `config` does not.
        """
        check_config(config)
        if self.config.mode != "multi_turn":
            raise InputError("a single_turn cache has evicted what a fork would need; set mode='multi_turn' in it.")
        forked = LayerCache(config, self.keep_queries)
        if self.working is None:
            return forked
        observed = self._observed if self.just_prefilled else None
        int8 = config.kv_dtype == "int8"
        if self.working.int8 and not int8:
            raise InputError(
                "a cache with kv_dtype='int8' has rounded what a fork without would need; set kv_dtype='auto' in it."
            )
        past = self.working.draft()  # an archive on the host first takes what was decoded
        working = past.fork(archived=config.mode == "multi_turn", on_host=config.archive_on_host, int8=int8)
        if observed is None and working.archive is None:
            raise InputError(
                "a single_turn fork needs the last queries of a prefill; make the cache with keep_queries and fork it "
                "before anything is decoded."
            )
        if observed is None:
            forked.working, forked.num_seen = working, self.num_seen
            return forked
        if config.window_size > self.keep_queries:
            raise InputError(
                f"window_size={config.window_size} is more than the keep_queries={self.keep_queries} of the cache; "
                "make it with as many."
            )
        query, num_queries, scale, is_first = observed
        sees_stored = working.archive is not None and not is_first  # as a later turn of its own would
        tokens = (working if sees_stored else past).every_token()
        mask = forked._evict(working, query, tokens.fields[0], tokens.lengths, num_queries, scale)
        if mask is not None and working.archive is None and not is_first:
            raise InputError(
                "a single_turn fork would have evicted at an earlier prefill already; fork it after the first one."
            )
        working.keep(tokens, mask, config.new_tokens)
        observed = None if working.archive is None else observed
        forked._begin_with(working, forked._plan(working), self.num_seen, observed)
        return forked

    def _begin_with(self, working: WorkingSet, plan: SelectionPlan, num_seen: int, observed: _Observed | None) -> None:
        """Take over what a prefill has made: nothing of this can fail."""
        self.working, self.plan, self.num_seen, self._observed = working, plan, num_seen, observed
        self.just_prefilled, self.num_decoded, self._fused_kind = True, 0, None

    def _empty(self, key: Tensor) -> WorkingSet:
        """A working set without tokens yet, for keys like `key`."""
        return WorkingSet(
            key,
            archived=self.config.mode == "multi_turn",
            on_host=self.config.archive_on_host,
            int8=self.config.kv_dtype == "int8",
        )

    def _evict(
        self,
        working: WorkingSet,
        query: Tensor,
        keys: Tensor,
        lengths: Tensor,
        num_queries: Tensor,
        scale: float,
    ) -> Tensor | None:
        """Stage 1: mark what stays, `[B, Hkv, S]` bool; None if every row may keep all it has."""
        kept = plan_eviction(self.config, self.selection, working.row_seen)
        num_tokens = torch.tensor(kept, device=keys.device)
        if not bool((lengths > num_tokens[:, None]).any()):
            return None
        mask = self.eviction.keep(
            query, keys, lengths=lengths, num_queries=num_queries, num_tokens=num_tokens, scale=scale
        )
        return None if mask is None else check_kept(mask, self.eviction, keys, lengths)

    def _plan(self, working: WorkingSet) -> SelectionPlan:
        """Plan how decode spends the budget on what stage 1 has left, and make ready for it."""
        plan = plan_prefilled(
            self.config, self.selection, seen=working.row_seen, held=working.lengths, head_dim=working.head_dim
        )
        return self._prepare(working, plan)

    def _prepare(self, working: WorkingSet, plan: SelectionPlan) -> SelectionPlan:
        """Make everything ready for one more token: the plan, room, and the index once there is anything to select."""
        if plan.steps_left == 0:
            plan = plan_outgrown(self.config, self.selection, plan, held=working.lengths, head_dim=working.head_dim)
            working.index = None
        working.reserve()
        if working.max_length < plan.dense_length:
            working.index = None  # rows went that selected: a step that attends to all does not extend it
        if working.index is None and working.max_length >= plan.dense_length:
            working.index = self.selection.build_index(working, plan.page_size)
            working.reserve()
        return plan

    def _bind(self, working: WorkingSet, plan: SelectionPlan, num_heads: int, scale: float) -> FusedStep | None:
        """The decode step as one call of a backend; None if it is left to the reference."""
        keys, values, *rest = (working.source or working.tokens).fields
        index = working.index
        scoring = getattr(self.selection, "scoring", None)
        if working.max_length < plan.dense_length and self.config.backend == "auto":
            scoring = Scoring.DENSE  # all is attended, the new token included, whatever the method
        backend, reasons = find_backend(self.config.backend, working.none, scoring, self.config.kv_dtype)
        if backend is None and self.config.backend not in ("auto", "reference"):
            raise UnsupportedError(
                f"backend={self.config.backend!r} does not take this cache ({'; '.join(reasons)}); set backend='auto'."
            )
        if backend is None or scoring is None:
            return None
        return backend.bind(
            LayerTensors(
                keys=keys,
                values=values,
                exponents=rest[0] if working.int8 else None,
                dtype=working.none.dtype,
                positions=working.tokens.fields[-1],
                lengths=working.lengths,
                archive_lengths=None if working.source is None else working.source.lengths,
                seen=working.seen,
                scoring=scoring,
                pages=index.stored if isinstance(index, PageIndex) else None,
                lowbit=index.stored if isinstance(index, LowBitIndex) else None,
                num_channels=plan.num_channels,
                top_k=plan.top_k,
                dense_lengths=plan.dense_lengths,
                sinks=plan.sinks,
                recents=plan.recents,
                num_heads=num_heads,
                scale=scale,
            )
        )

    def _count_read_bytes(self, working: WorkingSet, plan: SelectionPlan) -> int:
        """Bytes of a selecting step; a row that is attended in full needs no scores."""
        lengths, none = working.lengths, working.none
        selects = lengths > plan.dense_lengths[:, None]
        scored = self.selection.scored_bytes(
            lengths, plan.page_size[:, None], plan.num_channels[:, None], none.shape[3], none.element_size()
        )
        attended = plan.top_k[:, None].where(selects, lengths) * working.token_bytes
        return int((scored.where(selects, 0) + attended).sum())

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


def _first(counts: Tensor, width: int) -> Tensor:
    """Places 0, 1, ... up to `counts` (`[B, Hkv]` int64), `[B, Hkv, width]` int64; -1 in the columns beyond."""
    places = torch.arange(width, device=counts.device).expand(*counts.shape, width)
    return places.where(places < counts[..., None], -1)
