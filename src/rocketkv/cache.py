"""Storage only: ragged rows of tokens that grow in steps. Knows neither eviction, selection nor any model."""

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from rocketkv.backends import new_storage
from rocketkv.index import BackedIndex, Index
from rocketkv.ops import quantize_tokens, restore_tokens, stored_bytes, take_tokens

GROWTH = 32  # spare tokens allocated at least, so that decode does not reallocate at every token
EXPECTED = 1024  # tokens expected that room is made for at once, beyond as many as are held


class RaggedTokens:
    """Parallel per-token arrays, left aligned, each (batch row, KV head) with a length of its own.

    Attributes:
        fields: the arrays, each `[B, Hkv, capacity, ...]`; what lies beyond a length is undefined.
        lengths: `[B, Hkv]` int64, tokens in use.
        max_length: the largest length, on the host.
        is_ragged: whether lengths differ; False lets every reader skip masks.
    """

    def __init__(self, fields: Sequence[Tensor], lengths: Tensor, max_length: int, is_ragged: bool) -> None:
        self.fields = list(fields)
        self.lengths = lengths
        self.max_length = max_length
        self.is_ragged = is_ragged

    @classmethod
    def empty_like(cls, tokens: Sequence[Tensor]) -> "RaggedTokens":
        """No tokens yet, in the batch, heads, widths and dtypes of `tokens` (each `[B, Hkv, T, ...]`)."""
        fields = [x.new_empty(*x.shape[:2], 0, *x.shape[3:]) for x in tokens]
        return cls(fields, torch.zeros(fields[0].shape[:2], dtype=torch.int64, device=fields[0].device), 0, False)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated, spare capacity included."""
        return self.lengths.nbytes + sum(x.nbytes for x in self.fields)

    @property
    def room(self) -> int:
        """Tokens that every row can still take in without growing."""
        return self.fields[0].shape[2] - self.max_length

    def draft(self) -> "RaggedTokens":
        """The same tokens, to go on from without a change to these: it shares what lies within the lengths."""
        return RaggedTokens(self.fields, self.lengths, self.max_length, self.is_ragged)

    def reserve(self, num_new: int) -> None:
        """Make room for `num_new` more tokens in every row."""
        if self.room < num_new:
            self._reallocate(self.max_length + num_new + max(GROWTH, self.max_length // 8))

    def views(self) -> list[Tensor]:
        """The arrays without their spare capacity, each `[B, Hkv, max_length, ...]`."""
        return [x[:, :, : self.max_length] for x in self.fields]

    def append(self, *tokens: Tensor, counts: Tensor | None = None) -> None:
        """Add tokens at the end of every row.

        Args:
            tokens: one `[B, Hkv, T, ...]` per field.
            counts: `[B]` int64, how many of the T belong to each row, the first ones; all of them if None.
        """
        num_new = tokens[0].shape[2]
        self.reserve(num_new)
        if not self.is_ragged:
            for field, new in zip(self.fields, tokens, strict=True):
                field[:, :, self.max_length : self.max_length + num_new] = new
        else:
            rows, heads = self.lengths.shape
            device = self.lengths.device
            slots = self.lengths[..., None] + torch.arange(num_new, device=device)  # [B, Hkv, T]
            row = torch.arange(rows, device=device)[:, None, None]
            head = torch.arange(heads, device=device)[:, None]
            for field, new in zip(self.fields, tokens, strict=True):
                field[row, head, slots] = new
        if counts is None:
            self.lengths = self.lengths + num_new
            self.max_length += num_new
        else:
            self.set_lengths(self.lengths + counts[:, None])

    def keep(self, mask: Tensor | None, num_new: int = 0) -> "RaggedTokens":
        """Copy the tokens marked True, in order, with room for `num_new` more, or for the first of very many.

        Args:
            mask: `[B, Hkv, max_length]` bool, False beyond the lengths; None keeps everything.
            num_new: tokens expected to follow.
        """
        if mask is None:
            views, lengths = self.views(), self.lengths.clone()
        else:
            lengths = mask.sum(2)
            slots = (~mask).to(torch.uint8).argsort(dim=2, stable=True)[:, :, : int(lengths.max())]
            views = [take_tokens(x, slots) for x in self.fields]
        kept = RaggedTokens.empty_like(views)
        num_kept = views[0].shape[2]
        kept._reallocate(num_kept + max(GROWTH, min(num_new, num_kept + EXPECTED)))
        kept.append(*views)
        kept.set_lengths(lengths)
        return kept

    def set_lengths(self, lengths: Tensor) -> None:
        """Take over `[B, Hkv]` lengths and what the host knows of them."""
        self.lengths = lengths
        self.max_length = int(lengths.max())
        self.is_ragged = int(lengths.min()) != self.max_length

    def to(self, device: torch.device) -> "RaggedTokens":
        """The same on a device, without a copy if it is there already."""
        with torch.inference_mode(False):  # written to under either mode later
            fields = [x.to(device) for x in self.fields]
        return RaggedTokens(fields, self.lengths.to(device), self.max_length, self.is_ragged)

    def select_rows(self, rows: Tensor) -> None:
        """Replace the batch by its rows `rows` (`[B']` int64), repeated or dropped as they come."""
        rows = rows.to(self.lengths.device)
        self.set_lengths(self.lengths.index_select(0, rows))
        with torch.inference_mode(False):
            self.fields = [x.index_select(0, rows) for x in self.fields]

    def _reallocate(self, capacity: int) -> None:
        grown = []
        for old in self.fields:
            new = new_storage(old, (*old.shape[:2], capacity, *old.shape[3:]))
            new[:, :, : self.max_length] = old[:, :, : self.max_length]
            grown.append(new)
        self.fields = grown  # all or none: `room` asks the first


class WorkingSet:
    """What decode chooses from: the prompt tokens kept by stage 1 and the tokens since.

    Single-turn: a compact copy of keys, values and positions. Multi-turn: positions only, pointing into the archive;
    or, with the archive on the host, a copy again, from which it takes what was decoded when the next turn begins.
    Keys and values are stored as they come or, with `int8`, as `ops/int8.py` says: then three fields, not two.

    Attributes:
        tokens: the fields `keys, values, positions` or, pointing into the archive, `positions` alone (`[B, Hkv, N]`
            int32).
        int8: whether keys and values are stored in 8 bits.
        none: no tokens, `[B, Hkv, 0, D]` in the dtype in which keys and values come.
        is_whole: whether nothing was left out by the last `keep`.
        archive: every token seen, fields `keys, values`, on the host if so asked; None in single-turn.
        num_pending: tokens decoded that an archive on the host does not have yet, the last ones of every row.
        index: what the selection method keeps beside the keys; None where nothing is to be selected.
        seen: `[B]` int64, tokens seen by each row, padding left out.
        head_dim: D.
        key_bytes: bytes of one key in one KV head, as it comes.
        token_bytes: bytes of one token's key and value in one KV head, as stored.
    """

    def __init__(self, key: Tensor, *, archived: bool, on_host: bool = False, int8: bool = False) -> None:
        """Start empty, in the batch, heads, head_dim and dtype of `key` (`[B, Hkv, T, D]`)."""
        self.int8 = int8
        self.none = key[:, :, :0].clone()
        stored = self._stored(self.none, self.none)
        positions = key.new_empty(*key.shape[:2], 0, dtype=torch.int32)
        self.tokens = RaggedTokens.empty_like([positions] if archived and not on_host else [*stored, positions])
        self.archive = RaggedTokens.empty_like(stored) if archived else None
        if self.archive is not None and on_host:
            self.archive = self.archive.to(torch.device("cpu"))
        self.num_pending = 0
        self.index: Index | None = None
        self.is_whole = True
        self.seen = torch.zeros(key.shape[0], dtype=torch.int64, device=key.device)
        self.head_dim = key.shape[3]
        self.key_bytes = self.head_dim * key.element_size()
        self.token_bytes = stored_bytes(self.head_dim) if int8 else 2 * self.key_bytes

    @property
    def lengths(self) -> Tensor:
        """`[B, Hkv]` int64, tokens in each row's working set."""
        return self.tokens.lengths

    @property
    def max_length(self) -> int:
        """The largest of the lengths."""
        return self.tokens.max_length

    @property
    def row_seen(self) -> list[int]:
        """Tokens seen by each row, padding left out, on the host."""
        return [int(n) for n in self.seen.tolist()]

    @property
    def source(self) -> RaggedTokens | None:
        """The archive, if the tokens to choose from lie there; None if they are stored side by side in `tokens`."""
        return self.archive if len(self.tokens.fields) == 1 else None

    @property
    def room(self) -> int:
        """Tokens that every row can still take in without any buffer growing; an index of another kind is not asked."""
        rooms = [part.room for part in (self.tokens, self.source) if part is not None]
        if isinstance(self.index, BackedIndex):
            rooms.append(self.index.capacity - self.max_length)
        return min(rooms)

    @property
    def positions(self) -> Tensor:
        """`[B, Hkv, max_length]` int64, each token's position in its row; undefined beyond the lengths."""
        return self.tokens.views()[-1].long()

    @property
    def num_bytes(self) -> int:
        """Bytes allocated for keys, values, positions, archive and index, spare capacity included."""
        return sum(part.num_bytes for part in (self.tokens, self.archive, self.index) if part is not None)

    def draft(self) -> "WorkingSet":
        """The same state, to go on from without a change to this one, which stays good as long as nothing comes of it.

        Both share their buffers, to which a draft writes beyond this one's lengths; but an index takes in tokens where
        it has others, so this one's is to be dropped once the draft has appended to it.
        """
        draft = copy(self)
        draft.tokens, draft.index = self.tokens.draft(), copy(self.index)
        draft.archive = None if self.archive is None else self.archive.draft()
        return draft

    def append_prompt(self, key: Tensor, value: Tensor, padding: Tensor | None) -> RaggedTokens:
        """Take in a prompt or the next turn.

        Args:
            key: `[B, Hkv, T, D]` float.
            value: like `key`.
            padding: `[B]` int64, padded columns at the left of each row.

        Returns:
            All that the turn may see, fields `keys, values, positions`: the archive, or what is left and what is new. A
            first prompt sees itself as it comes, later turns see what is stored.
        """
        num_new = key.shape[2]
        counts = None if padding is None else num_new - padding
        new = [align_left(key, padding), align_left(value, padding), self._next_positions(num_new, key)]
        self.seen = self.seen + (num_new if counts is None else counts)
        if self.archive is not None:
            self._archive_decoded()
            is_first, device = self.archive.max_length == 0, self.archive.lengths.device
            stored = (x.to(device) for x in self._stored(*new[:2]))
            self.archive.append(*stored, counts=None if counts is None else counts.to(device))
            if not is_first:
                return self.every_token()
        elif self.tokens.max_length > 0:
            self.tokens.append(*self._stored(*new[:2]), new[2], counts=counts)
            return self._restored(self.tokens)
        tokens = RaggedTokens(new, self.lengths + num_new, num_new, False)  # no copy: most of it is about to go
        if padding is not None:
            tokens.set_lengths(tokens.lengths - padding[:, None])
        return tokens

    def keep(self, tokens: RaggedTokens, mask: Tensor | None, new_tokens: int) -> None:
        """Let the working set be the `tokens` seen by a turn where `mask` (`[B, Hkv, S]` bool; None: all) is True."""
        if self.source is not None:
            tokens = RaggedTokens(tokens.fields[2:], tokens.lengths, tokens.max_length, tokens.is_ragged)
        kept = tokens.keep(mask, new_tokens)
        if self.source is None:
            kept.fields = [*self._stored(*kept.fields[:2]), kept.fields[2]]
        self.tokens = kept
        self.is_whole = mask is None
        self.index = None

    def every_token(self) -> RaggedTokens:
        """All that was ever seen, fields `keys, values, positions`; there must be an archive."""
        assert self.archive is not None
        self._archive_decoded()
        every = torch.arange(self.archive.max_length, dtype=torch.int32, device=self.seen.device)
        fields = [*(x.to(every.device) for x in self.archive.views()), every.expand(*self.lengths.shape, -1)]
        lengths = self.archive.lengths.to(every.device)
        return self._restored(RaggedTokens(fields, lengths, self.archive.max_length, self.archive.is_ragged))

    def fork(self, *, archived: bool, on_host: bool = False, int8: bool = False) -> "WorkingSet":
        """The same past, with a copy of the archive if `archived`, and nothing to choose from until `keep`.

        What is stored in 8 bits stays so: `int8` is True if it is here.
        """
        assert self.archive is not None
        assert int8 or not self.int8
        self._archive_decoded()
        forked = WorkingSet(self.none, archived=archived, on_host=on_host, int8=int8)
        forked.seen = self.seen.clone()
        if forked.archive is not None:
            copied = self.archive.keep(None)
            if int8 and not self.int8:
                copied.fields = forked._stored(*copied.fields)
            forked.archive = copied.to(forked.archive.lengths.device)
        return forked

    def mark(self, mask: Tensor, places: Tensor) -> None:
        """Set `mask` (`[B, Hkv, N]` bool) to True at the positions of tokens of the working set, to False elsewhere.

        Args:
            mask: N more than any position.
            places: `[B, Hkv, K]` int64, places in the working set, the first one within the lengths; -1: none.
        """
        places = places.where(places >= 0, places[..., :1])
        mask.zero_().scatter_(2, take_tokens(self.positions, places), True)

    def append(self, key: Tensor, value: Tensor) -> None:
        """Add one token per row to working set, index and archive: `key`, `value` `[B, Hkv, 1, D]`."""
        positions = self._next_positions(1, key)
        self.seen = self.seen + 1
        stored = self._stored(key, value)
        if self.index is not None:
            self.index.extend(self._keys_and_values(stored)[0], self.lengths)
        if self.source is None:
            self.tokens.append(*stored, positions)
        else:
            self.source.append(*stored)
            self.tokens.append(positions)
        self.num_pending += 1

    def reserve(self) -> None:
        """Make room for one more token in every row, and some after it."""
        for part in (self.tokens, self.source):
            if part is not None:
                part.reserve(1)
        if isinstance(self.index, BackedIndex):
            self.index.reserve(self.max_length + 1)

    def count_appended(self) -> None:
        """Note on the host that one token per row was added to the buffers and their lengths by someone else."""
        for part in (self.tokens, self.source):
            if part is not None:
                part.max_length += 1
        self.num_pending += 1

    def take_back(self, num_held: int, num_pending: int) -> None:
        """Forget a token that someone else's step, which broke off, has added or not: `max_length` was `num_held`."""
        excess = int(self.lengths.max()) - num_held  # the buffers tell, whatever was noted on the host
        for part in (self.tokens, self.source):
            if part is not None:
                part.lengths = part.lengths - excess
                part.max_length = int(part.lengths.max())
        self.seen = self.seen - excess
        self.num_pending = num_pending
        self.index = None

    def truncate(self, counts: Tensor) -> None:
        """Forget all but the first `counts` (`[B]` int64) tokens of every row; nothing to choose from until `keep`.

        There must be an archive.
        """
        assert self.archive is not None
        self._archive_decoded()
        lengths = self.archive.lengths
        self.archive.set_lengths(counts.to(lengths.device)[:, None].expand_as(lengths).clone())
        self.tokens = RaggedTokens.empty_like(self.tokens.fields)
        self.seen = counts
        self.index = None

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the working set, each `[B, Hkv, max_length, D]`; a copy if chosen or stored in 8 bits."""
        if self.source is None:
            return self._keys_and_values(self.tokens.views()[:-1])
        stored = self.source.views()
        if not self.is_whole:
            slots = self.positions.clamp(0, self.source.max_length - 1)  # beyond the lengths anything may stand
            stored = [take_tokens(x, slots) for x in stored]
        return self._keys_and_values(stored)

    def locate(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where the chosen tokens lie.

        Args:
            chosen: `[B, Hkv, K]` int64, places in the working set, within the lengths.

        Returns:
            Keys and values, each `[B, Hkv, S, D]`, as stored or those chosen, restored; and the slots `[B, Hkv, K]` of
            the chosen tokens in them.
        """
        slots = chosen if self.source is None else take_tokens(self.tokens.views()[0], chosen).long()
        stored = self.tokens.views()[:-1] if self.source is None else self.source.views()
        if self.int8:
            slots = slots.clamp(0, stored[0].shape[2] - 1)
            stored = [take_tokens(x, slots) for x in stored]
            slots = torch.arange(slots.shape[2], device=slots.device).expand_as(slots)
        return *self._keys_and_values(stored), slots

    def select_rows(self, rows: Tensor) -> None:
        """Replace the batch by its rows `rows` (`[B']` int64), repeated or dropped as they come."""
        self.seen, self.none = (x.index_select(0, rows) for x in (self.seen, self.none))
        for part in (self.tokens, self.archive, self.index):
            if part is not None:
                part.select_rows(rows)

    def _archive_decoded(self) -> None:
        """Let the archive have what was decoded since the last turn, if it does not yet."""
        if self.archive is not None and self.source is None and self.num_pending > 0:
            last = torch.arange(-self.num_pending, 0, device=self.lengths.device)
            slots = self.lengths[..., None] + last
            stored = (take_tokens(x, slots) for x in self.tokens.views()[:-1])
            self.archive.append(*(x.to(self.archive.lengths.device) for x in stored))
        self.num_pending = 0

    def _stored(self, key: Tensor, value: Tensor) -> list[Tensor]:
        """The fields that `key` and `value`, `[B, Hkv, T, D]` each, are stored as."""
        return list(quantize_tokens(key, value)) if self.int8 else [key, value]

    def _keys_and_values(self, stored: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values, `[B, Hkv, T, D]` each, of the fields that they are stored as."""
        if self.int8:
            keys, values, exponents = stored
            return restore_tokens(keys, values, exponents, self.none.dtype)
        keys, values = stored
        return keys, values

    def _restored(self, tokens: RaggedTokens) -> RaggedTokens:
        """Stored tokens with their positions, as the fields `keys, values, positions`."""
        if not self.int8:
            return tokens
        *stored, positions = tokens.views()
        fields = [*self._keys_and_values(stored), positions]
        return RaggedTokens(fields, tokens.lengths, tokens.max_length, tokens.is_ragged)

    def _next_positions(self, num_new: int, key: Tensor) -> Tensor:
        """Positions `[B, Hkv, num_new]` int32 of the tokens that come next."""
        positions = self.seen[:, None].int() + torch.arange(num_new, dtype=torch.int32, device=key.device)
        return positions[:, None].expand(-1, key.shape[1], -1)


def align_left(tokens: Tensor, padding: Tensor | None) -> Tensor:
    """Move each row's tokens to the front, its `padding` (`[B]` int64) columns, undefined now, to the end."""
    if padding is None:
        return tokens
    width = tokens.shape[2]
    columns = (torch.arange(width, device=tokens.device) + padding[:, None]).clamp(max=width - 1)  # [B, T]
    return take_tokens(tokens, columns[:, None].expand(-1, tokens.shape[1], -1))
