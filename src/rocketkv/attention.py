"""RocketKV on one screen: what happens to one attention layer at prefill and at decode. Start here.

prefill: append -> exact dense attention -> stage 1 keeps the tokens that the last queries looked at -> index them
decode:  append -> stage 2 scores the kept tokens cheaply -> exact attention to the best of them (decode.py)
"""

import torch
from torch import Tensor

from rocketkv import backends
from rocketkv.cache import WorkingSet
from rocketkv.checks import (
    check_config,
    check_kept,
    check_loaded,
    check_padding,
    check_scale,
    check_tokens,
    exclusive,
    kind_of,
)
from rocketkv.config import RocketKVConfig
from rocketkv.errors import InputError
from rocketkv.plan import SelectionPlan
from rocketkv.state import LayerState, Observed


class LayerCache(LayerState):
    """The KV cache of one attention layer and the attention over it, compressed in two stages.

    RocketKV (arXiv:2502.14051), sections "SnapKV with GQA support", "Hybrid Sparse Attention" and "RocketKV-MT". Rows
    of a batch may differ in length; each is treated as it would be alone (with `kv_dtype="int8"`: if the model gives
    it the same keys and values, as it does not where it rounds otherwise in a batch). A call that raises or is
    interrupted leaves the cache as it was. One thread at a time may use a cache; a second is refused.

    Args:
        config: how it compresses.
        keep_queries: last queries of each prefill to keep for `fork`, in `multi_turn` only; 0: none.

    Attributes:
        config, keep_queries: as given.
        eviction: stage 1.
        selection: stage 2.
        working: what decode chooses from, with its index and archive; None before the first prefill.
        plan: how stage 2 spends the budget in each row; None before the first prefill.
        num_seen: columns seen so far, left padding included.
        just_prefilled: whether nothing was decoded since the last prefill.
        num_decoded: tokens decoded since the last prefill.
        trace: whether each decode step notes what it attends to, for diagnosis; False at first.
        last_attended: of a traced step, `[B, Hkv, N]` bool, True at the positions of the tokens that were attended to,
            N the tokens that the longest row has seen; None if the last step was not traced.
        user: empty, or the thread that uses this cache now.

    Raises:
        ConfigError: config is no `RocketKVConfig`, or keep_queries no whole number from 0 on.
    """

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
        seen = tokens.views()
        keys, values = seen["keys"], seen["values"]
        lengths = None if is_first and padding is None else tokens.lengths
        output = backends.prefill_densely(query, keys, values, lengths=lengths, num_queries=num_queries, scale=scale)
        mask = self._evict(working, query, keys, tokens.lengths, num_queries, scale)
        working.keep(tokens, mask, self.config.new_tokens)
        observed = None
        if self.keep_queries and working.archive is not None:
            last = query[:, :, -self.keep_queries :].clone()
            observed = Observed(last, num_queries.clamp(max=self.keep_queries), scale, is_first)
        self._begin_with(working, self._plan(working), self.num_seen + key.shape[2], observed)
        return output

    @exclusive
    def decode(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> Tensor:
        """Attend one new token per row to the best of what is kept, or to all of it where that takes no longer.

        Args:
            query: `[B, Hq, 1, D]` float, after RoPE.
            key: `[B, Hkv, 1, D]` in the dtype of `query`, after RoPE.
            value: like `key`.
            scale: factor on the dot products, > 0; None: 1 / sqrt(D).

        Returns:
            `[B, Hq, 1, D]`.

        Raises:
            InputError: shapes, dtypes, devices or scale do not fit, or nothing was prefilled.
            UnsupportedError: gradients are asked for, or the backend asked for by name does not take this cache.
            ConfigError: a row outgrew its plan, and more tokens are pinned than attended by the next.
        """
        working, plan = self._prefilled()
        kind = kind_of(query, key, value, scale)
        if not self._decoder.has_checked(kind) or torch.is_grad_enabled():
            check_tokens(query, key, value, working)
            if query.shape[2] != 1:
                raise InputError(f"decode takes one token per row, not {query.shape[2]}; use prefill for a prompt.")
        if not self._decoder.is_bound(kind):
            factor = check_scale(scale, query.shape[3])
            plan = self.plan = self._decoder.prepare(working, plan)
            self._decoder.bind(working, plan, kind, query.shape[1], factor)
        output, self._read_bytes, self.last_attended = self._decoder(query, key, value, trace=self.trace)
        plan.steps_left -= 1
        self.num_seen += 1
        self.num_decoded += 1
        self.just_prefilled = False
        return output

    @exclusive
    def load_tokens(self, keys: Tensor, values: Tensor, *, num_seen: int, positions: Tensor | None = None) -> None:
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
            raise InputError("this cache holds tokens already; load them into an empty one, or call reset() first.")
        is_complete = self.config.mode == "multi_turn"
        seen, positions = check_loaded(keys, values, num_seen, positions, is_complete=is_complete)
        working = self._empty(keys)
        tokens = working.append_prompt(keys, values, None)
        tokens.fields["positions"] = positions
        working.keep(tokens, None, self.config.new_tokens)
        working.seen = torch.full_like(working.seen, seen)
        self._begin_with(working, self._plan(working), seen, None)

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
        stored = self.config.format
        if not stored.is_exact and config.format != stored:
            raise InputError(
                f"a cache with kv_dtype={stored.name!r} has rounded what a fork without would need; "
                "set kv_dtype='auto' in it."
            )
        past = self.working.draft()  # an archive on the host first takes what was decoded
        working = past.fork(config.format, archived=config.mode == "multi_turn", on_host=config.archive_on_host)
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
        mask = forked._evict(working, query, tokens.fields["keys"], tokens.lengths, num_queries, scale)
        if mask is not None and working.archive is None and not is_first:
            raise InputError(
                "a single_turn fork would have evicted at an earlier prefill already; fork it after the first one."
            )
        working.keep(tokens, mask, config.new_tokens)
        observed = None if working.archive is None else observed
        forked._begin_with(working, forked._plan(working), self.num_seen, observed)
        return forked

    def _empty(self, key: Tensor) -> WorkingSet:
        """A working set without tokens yet, for keys like `key`."""
        is_archived = self.config.mode == "multi_turn"
        return WorkingSet(key, self.config.format, archived=is_archived, on_host=self.config.archive_on_host)

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
        kept = self._planner(working).keep(working.row_seen)
        num_tokens = torch.tensor(kept, device=keys.device)
        if not bool((lengths > num_tokens[:, None]).any()):
            return None
        mask = self.eviction.keep(
            query, keys, lengths=lengths, num_queries=num_queries, num_tokens=num_tokens, scale=scale
        )
        return None if mask is None else check_kept(mask, self.eviction, keys, lengths)

    def _plan(self, working: WorkingSet) -> SelectionPlan:
        """Plan how decode spends the budget on what stage 1 has left, and make ready for it."""
        return self._decoder.prepare(working, self._planner(working).prefilled(working.row_seen, working.lengths))
