"""RocketKV on one screen: what happens to one attention layer at prefill and at decode. Start here.

prefill: append -> exact dense attention -> stage 1 keeps the tokens that the last queries looked at -> index them
decode:  append -> stage 2 scores the kept tokens cheaply -> exact attention to the best of them (decode.py)
"""

import torch
from torch import Tensor

from rocketkv import backends
from rocketkv.cache import WorkingSet
from rocketkv.checks import check_config, check_kept, check_loaded, check_padding, check_terms, check_tokens, kind_of
from rocketkv.config import RocketKVConfig
from rocketkv.errors import InputError
from rocketkv.exclusive import exclusive
from rocketkv.ops import NO_TERMS, LogitTerms, on_device
from rocketkv.plan import SelectionPlan
from rocketkv.ragged import Kept, RaggedTokens
from rocketkv.shared import Prompt, SharedReads
from rocketkv.state import Observed


class LayerCache(SharedReads):
    """The KV cache of one attention layer and the attention over it, compressed in two stages.

    Source: RocketKV (arXiv:2502.14051), "SnapKV with GQA support", "Hybrid Sparse Attention" and "RocketKV-MT". Rows of
    a batch may differ in length, and the cache treats each row as if the row were alone. (With `kv_dtype="int8"` that
    needs a model that gives the row the same keys and values alone and in the batch, without rounding differently.)
    A call that raises or is interrupted leaves the cache as it was. A second thread that calls meanwhile is refused.

    Args:
        config: the options of the compression.
        keep_queries: the number of last queries of each prefill to keep for `fork`, in `multi_turn` only; 0 keeps none.

    Attributes:
        config, keep_queries: the arguments.
        eviction: the eviction policy, stage 1.
        selection: the selection method, stage 2.
        working: the working set with its index and archive; None before the first prefill.
        plan: the plan that says how stage 2 spends the budget in each row; None before the first prefill.
        num_seen: the number of columns seen so far, left padding included.
        just_prefilled: True if nothing was decoded since the last prefill.
        num_decoded: the number of tokens decoded since the last prefill.
        trace: True lets each decode step record what it attends to, for diagnosis; the default is False.
        last_attended: `[B, Hkv, N]` bool, True at the positions that the last step attended to, where N is the number
            of tokens that the longest row has seen; None if the last step was not traced.
        user: the thread that is using this cache, or an empty dict.

    Raises:
        ConfigError: config is not a `RocketKVConfig`, or keep_queries is not a whole number >= 0.
    """

    @exclusive
    def prefill(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        padding: Tensor | None = None,
        scale: float | None = None,
        terms: LogitTerms = NO_TERMS,
    ) -> Tensor:
        """Attend a prompt, or the next turn of a conversation, exactly; then compress what decode will read.

        In `multi_turn` a later turn attends to the archive, and stage 1 chooses the working set anew from the archive;
        in `single_turn` a later turn attends to the kept tokens, and stage 1 evicts again.

        Args:
            query: `[B, Hq, T, D]` float, after RoPE.
            key: `[B, Hkv, T, D]` in the dtype of `query`, after RoPE; Hkv divides Hq.
            value: like `key`.
            padding: `[B]` integers, 0 to T - 1, the padded columns at the left of each row; None means no padding.
            scale: the factor on the dot products, > 0; None means 1 / sqrt(D).
            terms: the attention sinks and the soft cap of the logits, if the model has them.

        Returns:
            `[B, Hq, T, D]` in the dtype of `query`, zero in padded columns.

        Raises:
            InputError: shapes, dtypes, devices, padding, scale or terms do not fit, or an eviction policy of your own
                returns a mask that does not fit.
            UnsupportedError: an argument requires gradients.
            ConfigError: more tokens are pinned than a step attends to, or the budget does not fit the head_dim.
        """
        check_tokens(query, key, value, self.working)
        padding = check_padding(padding, key)
        scale, terms = check_terms(scale, terms, query)
        num_queries = torch.full((key.shape[0],), key.shape[2], device=key.device)
        num_queries = num_queries if padding is None else num_queries - on_device(padding, key.device)
        is_first = self.working is None
        working = self._empty(key) if self.working is None else self.working.draft()  # until nothing can fail any more

        tokens = working.append_prompt(key, value, padding)
        keys, values = (tokens.views()[name] for name in ("keys", "values"))
        lengths = None if is_first and padding is None else tokens.counts
        output = backends.prefill_densely(
            query, keys, values, lengths=lengths, num_queries=num_queries, scale=scale, terms=terms
        )
        prompt = Observed(query, num_queries, scale, terms, is_first)
        working.keep(tokens, self._evict(working, prompt, keys, tokens), self.config.new_tokens)
        keeps = self.keep_queries > 0 and working.archive is not None
        observed = prompt.last(self.keep_queries) if keeps else None
        self._begin_with(working, self._plan(working), self.num_seen + key.shape[2], observed)
        self.prompt = Prompt(keys, values, tokens.counts, num_queries) if self.keeps_prompt else None
        return output

    @exclusive
    def decode(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, terms: LogitTerms = NO_TERMS
    ) -> Tensor:
        """Attend one new token per row to the best kept tokens, or to all of them where that takes no longer.

        Args:
            query: `[B, Hq, 1, D]` float, after RoPE.
            key: `[B, Hkv, 1, D]` in the dtype of `query`, after RoPE.
            value: like `key`.
            scale: the factor on the dot products, > 0; None means 1 / sqrt(D).
            terms: the attention sinks and the soft cap; sinks that change in place while a text is decoded may be read
                late, so give other sinks as another tensor.

        Returns:
            `[B, Hq, 1, D]` in the dtype of `query`.

        Raises:
            InputError: shapes, dtypes, devices, scale or terms do not fit, or nothing was prefilled.
            UnsupportedError: an argument requires gradients, or the backend named in `config` declines this cache.
            ConfigError: a row outgrew its plan, and the next plan pins more tokens than a step attends to.
        """
        working, plan = self._prefilled()
        kind = kind_of(query, key, value, scale, terms)
        if not self._decoder.has_checked(kind) or torch.is_grad_enabled():
            check_tokens(query, key, value, working)
            if query.shape[2] != 1:
                raise InputError(f"decode takes one token per row, not {query.shape[2]}; use prefill for a prompt.")
        if not self._decoder.is_bound(kind):
            factor, checked = check_terms(scale, terms, query)
            plan = self.plan = self._decoder.prepare(working, plan)
            self._decoder.bind(working, plan, kind, query.shape[1], factor, checked, terms.sink_logits)
        output, self._read_bytes, self.last_attended = self._decoder(query, key, value, trace=self.trace)
        plan.steps_left -= 1  # no call stands between these counts, so that an interrupt cannot part them
        self.num_seen += 1
        self.num_decoded += 1
        self.just_prefilled, self._num_reads = False, 1
        return output

    @exclusive
    def load_tokens(self, keys: Tensor, values: Tensor, *, num_seen: int, positions: Tensor | None = None) -> None:
        """Begin with tokens that were computed, and chosen, elsewhere; the cache keeps all of them, as after a prefill.

        Args:
            keys: `[B, Hkv, N, D]` float, after RoPE; the keys that stage 1 would have kept.
            values: like `keys`.
            num_seen: the number of tokens that each row has seen, N to 2**30, evicted tokens included.
            positions: `[N]` or `[B, Hkv, N]` int64 or int32, ascending, 0 to num_seen - 1, the tokens' positions in
                their row; None means 0 to N - 1.

        Raises:
            InputError: this cache is not empty, tensors do not fit, num_seen is smaller than N, or num_seen is larger
                than N in a `multi_turn` cache, whose archive has all tokens.
            UnsupportedError: an argument requires gradients.
            ConfigError: more tokens are pinned than a step attends to, or the budget does not fit the head_dim.
        """
        if self.working is not None:
            raise InputError("this cache has tokens already; load the new ones into an empty cache or call reset().")
        is_complete = self.config.mode == "multi_turn"
        seen, positions = check_loaded(keys, values, num_seen, positions, is_complete=is_complete)
        working = self._empty(keys)
        tokens = working.append_prompt(keys, values, None)
        tokens.fields["positions"] = positions
        working.keep(tokens, None, self.config.new_tokens)
        working.set_seen([seen] * keys.shape[0])
        self._begin_with(working, self._plan(working), seen, None)

    @exclusive
    def fork(self, config: RocketKVConfig) -> "LayerCache":
        """Return a cache with the same past that compresses as `config` says; this cache stays as it is.

        Right after a prefill whose last queries were kept (`keep_queries`), the fork runs stage 1 with them and is
        ready to decode; the fork then equals, to the bit, a cache that has seen the whole past itself. Without kept
        queries the fork needs a prefill first, the next turn of what it has seen. If this cache stores 8 bits, the
        fork begins with the stored, rounded keys and values.

        Raises:
            ConfigError: config is not a `RocketKVConfig`, or pins more tokens than a step attends to.
            InputError: this cache is not `multi_turn`; it kept fewer queries than `config` needs; a `single_turn` fork
                would have evicted at an earlier prefill; or this cache stores 8 bits and `config` does not.
        """
        check_config(config)
        if self.config.mode != "multi_turn":
            raise InputError("a single_turn cache cannot be forked: tokens were evicted; set mode='multi_turn' in it.")
        forked = LayerCache(config, self.keep_queries)
        if self.working is None:
            return forked
        observed = self._observed if self.just_prefilled else None
        stored = self.config.format
        if not stored.is_exact and config.format != stored:
            raise InputError(
                f"a cache with kv_dtype={stored.name!r} has rounded its keys and values, so a fork with "
                f"kv_dtype={config.kv_dtype!r} would differ; set kv_dtype='auto' in this cache."
            )
        past = self.working.draft()  # a draft, because an archive on the host first takes in the decoded tokens
        working = past.fork(config.format, archived=config.mode == "multi_turn", on_host=config.archive_on_host)
        if observed is None and working.archive is None:
            raise InputError(
                "a single_turn fork needs the last queries of a prefill; make this cache with keep_queries and fork "
                "the cache before anything is decoded."
            )
        if observed is None:
            forked.working, forked.num_seen = working, self.num_seen
            return forked
        if config.window_size > self.keep_queries:
            raise InputError(
                f"window_size={config.window_size} is more than the keep_queries={self.keep_queries} of this cache; "
                f"make the cache with keep_queries={config.window_size}, or lower window_size."
            )
        sees_stored = working.archive is not None and not observed.is_first  # as a later turn sees it
        tokens = (working if sees_stored else past).every_token()
        kept = forked._evict(working, observed, tokens.fields["keys"], tokens)
        if kept is not None and working.archive is None and not observed.is_first:
            raise InputError(
                "a single_turn fork would have evicted at an earlier prefill already; fork after the first prefill."
            )
        working.keep(tokens, kept, config.new_tokens)
        observed = None if working.archive is None else observed
        forked._begin_with(working, forked._plan(working), self.num_seen, observed)
        return forked

    def _empty(self, key: Tensor) -> WorkingSet:
        """Return a working set without tokens, for keys like `key`."""
        is_archived = self.config.mode == "multi_turn"
        return WorkingSet(key, self.config.format, archived=is_archived, on_host=self.config.archive_on_host)

    def _evict(self, working: WorkingSet, prompt: Observed, keys: Tensor, tokens: RaggedTokens) -> Kept | None:
        """Run stage 1: return the tokens that stay; None if every row may keep all of its tokens."""
        most = torch.tensor(self._planner(working).keep(working.row_seen), device="cpu")
        if not bool((tokens.counts > most[:, None]).any()):
            return None
        query, num_queries, scale, terms, _ = prompt
        lengths, num_tokens = tokens.lengths, on_device(most, keys.device)
        mask = self.eviction.keep(
            query, keys, lengths=lengths, num_queries=num_queries, num_tokens=num_tokens, scale=scale, terms=terms
        )
        return None if mask is None else check_kept(mask, self.eviction, keys, tokens, most)

    def _plan(self, working: WorkingSet) -> SelectionPlan:
        """Plan how decode spends the budget on the kept tokens, and prepare the room and index that decode needs."""
        planner = self._planner(working)
        return self._decoder.prepare(working, planner.prefilled(working.row_seen, working.tokens.row_lengths))
