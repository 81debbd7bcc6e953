"""RocketKV on one screen: what happens to one attention layer at prefill and at decode. Start here.

prefill: append -> exact dense attention -> stage 1 keeps the tokens that the last queries looked at -> index them
decode:  append -> stage 2 scores the kept tokens cheaply -> exact attention to the best of them
"""

from copy import deepcopy

import torch
from torch import Tensor

from rocketkv import ops
from rocketkv.cache import WorkingSet
from rocketkv.config import RocketKVConfig
from rocketkv.errors import InputError, UnsupportedError
from rocketkv.plan import plan_outgrown, plan_prefilled, select_plan_rows, tokens_to_keep


class LayerCache:
    """The KV cache of one attention layer and the attention over it, compressed in two stages.

    RocketKV (arXiv:2502.14051), sections "SnapKV with GQA support", "Hybrid Sparse Attention" and "RocketKV-MT". Rows
    of a batch may differ in length; each is treated as it would be alone.

    Attributes:
        config: how it compresses.
        working: what decode chooses from, with its index and archive; None before the first prefill.
        num_seen: columns seen so far, left padding included.
        read_bytes: bytes of index, keys and values that the last decode step had to read, all rows and heads.
    """

    def __init__(self, config: RocketKVConfig) -> None:
        self.config = config
        self.eviction = config.eviction_policy()
        self.selection = config.selection_method()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.working: WorkingSet | None = None
        self.num_seen = 0
        self.read_bytes = 0

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
            scale: factor on the dot products; None: 1 / sqrt(D).

        Returns:
            `[B, Hq, T, D]`, zero in padded columns.

        Raises:
            InputError: shapes, dtypes or padding do not fit.
            UnsupportedError: gradients are asked for.
        """
        padding = self._check(query, key, value, padding)
        scale = query.shape[3] ** -0.5 if scale is None else scale
        num_queries = query.shape[2] - (key.new_zeros(key.shape[0], dtype=torch.int64) if padding is None else padding)
        if self.working is None:
            self.working = WorkingSet(key, archived=self.config.mode == "multi_turn")
        working = self.working
        tokens = working.append_prompt(key, value, padding)
        self.num_seen += query.shape[2]

        keys, values, _ = tokens.views()
        is_first = padding is None and self.num_seen == query.shape[2]
        output = ops.dense_attention(
            query, keys, values, lengths=None if is_first else tokens.lengths, num_queries=num_queries, scale=scale
        )
        kept = torch.tensor(tokens_to_keep(self.config, self.selection, working.row_seen), device=key.device)
        mask = None
        if bool((tokens.lengths > kept[:, None]).any()):
            mask = self.eviction.keep(
                query, keys, lengths=tokens.lengths, num_queries=num_queries, num_tokens=kept, scale=scale
            )
        working.keep(tokens, mask, self.config.new_tokens)
        self.plan = plan_prefilled(
            self.config, self.selection, seen=working.row_seen, held=working.lengths, head_dim=key.shape[3]
        )
        self._index_if_needed(working)
        return output

    def decode(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> Tensor:
        """Attend one new token per row to the best of what is held, or to all of it where that fits in the budget.

        Args:
            query: `[B, Hq, 1, D]` float, after RoPE.
            key: `[B, Hkv, 1, D]` in the dtype of `query`, after RoPE.
            value: like `key`.
            scale: factor on the dot products; None: 1 / sqrt(D).

        Returns:
            `[B, Hq, 1, D]`.

        Raises:
            InputError: shapes or dtypes do not fit, or nothing was prefilled.
            UnsupportedError: gradients are asked for.
        """
        working = self._prefilled()
        self._check(query, key, value, None)
        if query.shape[2] != 1:
            raise InputError(f"decode takes one token per row, not {query.shape[2]}; use prefill for a prompt.")
        scale = query.shape[3] ** -0.5 if scale is None else scale
        working.append(key, value)
        self.num_seen += 1
        self.plan.steps_left -= 1
        if self.plan.steps_left < 0:
            self.plan = plan_outgrown(
                self.config, self.selection, self.plan, held=working.lengths, head_dim=key.shape[3]
            )
            working.index = None
        self._index_if_needed(working)

        plan, lengths = self.plan, working.lengths
        logits = None
        if working.max_length > plan.dense_length:
            grouped = query.reshape(*key.shape[:2], -1, key.shape[3])  # [B, Hkv, G, D]
            logits = self.selection.logits(grouped, working, plan.num_channels, scale)
        if logits is None:
            keys, values = working.keys_and_values()
            self._count_read(attended=lengths, scored=None, key=key)
            is_ragged = working.tokens.is_ragged
            return ops.dense_decode(query, keys, values, lengths=lengths if is_ragged else None, scale=scale)
        scores = ops.token_probabilities(logits, lengths)
        chosen = ops.best_tokens(scores, lengths=lengths, top_k=plan.top_k, sinks=plan.sinks, recents=plan.recents)
        counts = lengths.minimum(plan.top_k[:, None])
        self._count_read(attended=counts, scored=lengths, key=key)
        keys, values, slots = working.storage(chosen)
        return ops.sparse_attention(query, keys, values, slots=slots, counts=counts, scale=scale)

    @property
    def positions(self) -> Tensor:
        """Original positions of the tokens that decode chooses from, `[B, Hkv, N]` int64, ascending.

        Each row counts its own tokens from 0, padding left out. Where a row or head holds fewer than N: -1.
        """
        working = self._prefilled()
        beyond = torch.arange(working.max_length, device=working.lengths.device) >= working.lengths[..., None]
        return working.positions.masked_fill(beyond, -1)

    @property
    def num_stored(self) -> Tensor:
        """Tokens that decode chooses from, `[B, Hkv]` int64; the archive of `multi_turn` is not counted."""
        return self._prefilled().lengths

    @property
    def row_seen(self) -> list[int]:
        """Tokens seen by each row, padding left out."""
        return self._prefilled().row_seen

    @property
    def kv_bytes(self) -> int:
        """Bytes held: keys, values, positions, archive and index, spare capacity included."""
        return 0 if self.working is None else self.working.num_bytes

    def select_rows(self, rows: Tensor) -> None:
        """Replace the batch by its rows `rows` (`[B']` int64), repeated or dropped as they come: beam search."""
        working = self._prefilled()
        working.select_rows(rows)
        self.plan = select_plan_rows(self.config, self.plan, rows.tolist(), working.lengths)

    def fork(self, config: RocketKVConfig) -> "LayerCache":
        """A cache with a copy of this archive that compresses as `config` says from its next prefill on.

        Raises:
            InputError: one of the two is not `multi_turn`, so that there is no archive.
        """
        if self.config.mode != "multi_turn" or config.mode != "multi_turn":
            raise InputError(
                "only a multi_turn cache can be forked, and only into another; set mode='multi_turn' in both."
            )
        forked = LayerCache(config)
        forked.working = deepcopy(self.working)
        forked.plan = deepcopy(self.plan)
        forked.num_seen = self.num_seen
        return forked

    def _index_if_needed(self, working: WorkingSet) -> None:
        """Build the index of the selection method as soon as there is anything to select."""
        if working.index is None and working.max_length > self.plan.dense_length:
            working.index = self.selection.build_index(working, self.plan.page_size)

    def _count_read(self, attended: Tensor, scored: Tensor | None, key: Tensor) -> None:
        """Count what a step reads for `attended` and `scored` tokens (`[B, Hkv]` int64)."""
        elements = 2 * attended * key.shape[3]
        if scored is not None:
            plan = self.plan
            elements = elements + self.selection.scored_elements(
                scored, plan.page_size[:, None], plan.num_channels[:, None], key.shape[3]
            )
        self.read_bytes = int(elements.sum()) * key.element_size()

    def _prefilled(self) -> WorkingSet:
        if self.working is None:
            raise InputError("this cache is empty; call prefill with the prompt before anything else.")
        return self.working

    def _check(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> Tensor | None:
        """Refuse tensors that do not fit together or with what is held; return padding as `[B]` int64, None if zero."""
        shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
        if query.dim() != 4 or key.dim() != 4 or query.shape[0::2] != key.shape[0::2] or query.shape[3] != key.shape[3]:
            raise InputError(f"{shapes} do not fit; give [B, Hq, T, D] and twice [B, Hkv, T, D].")
        if key.shape != value.shape:
            raise InputError(f"{shapes}: key and value differ; attention with other value widths is not supported.")
        if query.shape[1] % key.shape[1] or 0 in key.shape:
            raise InputError(f"{shapes}: Hq must be a multiple of Hkv and nothing may be empty.")
        if not query.dtype.is_floating_point or not query.dtype == key.dtype == value.dtype:
            raise InputError(
                f"query {query.dtype}, key {key.dtype} and value {value.dtype} differ; give one floating-point dtype."
            )
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            raise UnsupportedError("a compressed cache has no gradients; run under torch.inference_mode().")
        if self.working is not None:
            held = self.working
            expected = (len(held.row_seen), held.lengths.shape[1])
            if expected != tuple(key.shape[:2]):
                raise InputError(
                    f"{shapes}: the cache holds batch {expected[0]} and {expected[1]} KV heads; "
                    "continue with the same batch or call reset()."
                )
        if padding is None:
            return None
        padding = torch.as_tensor(padding, dtype=torch.int64, device=key.device)
        if padding.shape != key.shape[:1] or bool((padding < 0).any() or (padding >= key.shape[2]).any()):
            raise InputError(
                f"padding={padding.tolist()} does not fit; give one number per row, "
                f"{key.shape[0]} in all, from 0 to {key.shape[2] - 1}."
            )
        return padding if bool(padding.any()) else None
