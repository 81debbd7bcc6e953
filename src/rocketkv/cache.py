"""The working set, from which decode chooses, and the archive behind it. The file only stores; it knows no model."""

from copy import copy

import torch
from torch import Tensor

from rocketkv.formats import Fields, Format
from rocketkv.index import Index
from rocketkv.ops import on_device, take_tokens
from rocketkv.ragged import Kept, RaggedTokens, align_left


class WorkingSet:
    """The tokens that decode chooses from: the prompt tokens kept by stage 1 and the tokens decoded since.

    In `single_turn` the working set is a compact copy of keys, values and positions. In `multi_turn` the working set
    stores positions only, which point into the archive. With the archive on the host, the working set is a copy again,
    and the archive takes in the decoded tokens when the next turn begins.

    Attributes:
        format: the format in which keys and values are stored.
        tokens: the fields of the format and `positions` (`[B, Hkv, N]` int32), or `positions` alone where they point
            into the archive.
        like: an empty tensor `[B, Hkv, 0, D]` with the shape, dtype and device of incoming keys.
        is_whole: True if the last `keep` left nothing out.
        archive: the fields of every token seen, on the host if so configured; None in `single_turn`.
        num_pending: the number of last tokens of every row that an archive on the host may not have yet.
        index: the selection method's index of the keys; None while nothing is to be selected.
        seen: `[B]` int64, the number of tokens seen by each row, padding left out, on the device.
        head_dim: the number of channels of a key, D.
        key_bytes: the bytes of one incoming key in one KV head.
        token_bytes: the bytes of one token's stored key and value in one KV head.
    """

    def __init__(self, key: Tensor, format: Format, *, archived: bool, on_host: bool = False) -> None:
        """Start without tokens, with the batch, heads, head_dim and dtype of `key` (`[B, Hkv, T, D]`)."""
        self.format = format
        self.like = key[:, :, :0].clone()
        stored = format.store(self.like, self.like)
        positions = {"positions": key.new_empty(*key.shape[:2], 0, dtype=torch.int32)}
        self.tokens = RaggedTokens.empty_like(positions if archived and not on_host else stored | positions)
        self.archive = RaggedTokens.empty_like(stored) if archived else None
        if self.archive is not None and on_host:
            self.archive = self.archive.to(torch.device("cpu"))
        self.num_pending = 0
        self.index: Index | None = None
        self.is_whole = True
        self.set_seen([0] * key.shape[0])
        self.head_dim = key.shape[3]
        self.key_bytes = self.head_dim * key.element_size()
        self.token_bytes = format.token_bytes(self.head_dim, key.element_size())

    @property
    def lengths(self) -> Tensor:
        """The number of tokens in each row's working set, `[B, Hkv]` int64."""
        return self.tokens.lengths

    @property
    def max_length(self) -> int:
        """The largest of the lengths."""
        return self.tokens.max_length

    @property
    def row_seen(self) -> list[int]:
        """The number of tokens seen by each row, padding left out, as numbers on the host."""
        return [num_seen + self.num_pending for num_seen in self._seen_before]

    @property
    def source(self) -> RaggedTokens | None:
        """The archive if `tokens` has positions only, which point into it; None if `tokens` has keys and values."""
        return self.archive if "keys" not in self.tokens.fields else None

    @property
    def room(self) -> int:
        """The number of tokens that every row can still take in before a buffer must grow."""
        rooms = [part.room for part in (self.tokens, self.source) if part is not None]
        if self.index is not None:
            rooms.append(self.index.capacity - self.max_length)
        return min(rooms)

    @property
    def positions(self) -> Tensor:
        """The position of each token in its row, `[B, Hkv, max_length]` int64; undefined beyond the lengths."""
        return self.tokens.views()["positions"].long()

    @property
    def num_bytes(self) -> int:
        """The bytes allocated for keys, values, positions, archive and index, spare capacity included."""
        return sum(part.num_bytes for part in (self.tokens, self.archive, self.index) if part is not None)

    def draft(self) -> "WorkingSet":
        """Return a working set in the same state that can be changed without a change to this one.

        Both share their buffers, and the draft writes beyond the lengths of this working set. An index, however, takes
        in tokens in place, so the caller must drop this working set's index once the draft has appended to the index.
        """
        draft = copy(self)
        draft.tokens, draft.index = self.tokens.draft(), copy(self.index)
        draft.archive = None if self.archive is None else self.archive.draft()
        return draft

    def become(self, draft: "WorkingSet") -> None:
        """Take over the state of a draft of this working set."""
        vars(self).update(vars(draft))

    def append_prompt(self, key: Tensor, value: Tensor, padding: Tensor | None) -> RaggedTokens:
        """Take in a prompt or the next turn.

        Args:
            key: `[B, Hkv, T, D]` float.
            value: like `key`.
            padding: `[B]` int64 on the host, the padded columns at the left of each row; None means no padding.

        Returns:
            The tokens that the turn attends to, as the fields `keys, values, positions`: the archive in `multi_turn`,
            the kept and the new tokens in `single_turn`. A first prompt attends to its keys and values as they come;
            later turns attend to what is stored.
        """
        num_new = key.shape[2]
        counts = torch.full(key.shape[:1], num_new, device="cpu") - (0 if padding is None else padding)
        positions = self._next_positions(num_new, key)
        key, value = align_left(key, padding), align_left(value, padding)
        self._archive_decoded()
        self.set_seen((torch.tensor(self.row_seen, device="cpu") + counts).tolist())
        if self.archive is not None:
            is_first, device = self.archive.max_length == 0, self.archive.lengths.device
            stored = {name: x.to(device) for name, x in self.format.store(key, value).items()}
            self.archive.append(stored, counts)
            if not is_first:
                return self.every_token()
        elif self.tokens.max_length > 0:
            self.tokens.append(self.format.store(key, value) | positions, counts)
            return self._loaded(self.tokens)
        new = {"keys": key, "values": value} | positions
        return RaggedTokens(new, counts[:, None].expand(key.shape[:2]))  # not copied: stage 1 is about to evict most

    def keep(self, tokens: RaggedTokens, kept: Kept | None, new_tokens: int) -> None:
        """Make the working set those `tokens` of a turn that stage 1 has `kept`; None keeps all."""
        if self.source is not None:
            tokens = tokens.with_fields({"positions": tokens.fields["positions"]})
        self.tokens = tokens.keep(kept, new_tokens)
        if self.source is None:
            self.tokens.fields |= self.format.store(self.tokens.fields["keys"], self.tokens.fields["values"])
        self.is_whole = kept is None
        self.index = None

    def set_seen(self, row_seen: list[int]) -> None:
        """Set the number of tokens seen by each row, padding left out."""
        self.seen = on_device(torch.tensor(row_seen, device="cpu"), self.like.device)
        self._seen_before = [num_seen - self.num_pending for num_seen in row_seen]  # before the pending tokens

    def every_token(self) -> RaggedTokens:
        """Return every token seen, as the fields `keys, values, positions`; there must be an archive."""
        assert self.archive is not None
        self._archive_decoded()
        every = torch.arange(self.archive.max_length, dtype=torch.int32, device=self.seen.device)
        fields = {name: x.to(every.device) for name, x in self.archive.views().items()}
        fields["positions"] = every.expand(*self.lengths.shape, -1)
        return self._loaded(RaggedTokens(fields, self.archive.counts))

    def fork(self, format: Format, *, archived: bool, on_host: bool = False) -> "WorkingSet":
        """Return a working set with the same past, a copy of the archive if `archived`, and no tokens until `keep`.

        `format` must be this working set's format, unless this one's is exact.
        """
        assert self.archive is not None
        assert self.format.is_exact or format == self.format
        self._archive_decoded()
        forked = WorkingSet(self.like, format, archived=archived, on_host=on_host)
        forked.set_seen(self.row_seen)
        if forked.archive is not None:
            copied = self.archive.keep(None)
            if format != self.format:
                copied.fields = format.store(*self.format.load(copied.fields, self.like.dtype))
            forked.archive = copied.to(forked.archive.lengths.device)
        return forked

    def mark(self, ranks: Tensor) -> Tensor:
        """Return a mask over positions, `[B, Hkv, N]` bool; N is the number of tokens that the longest row has seen.

        Args:
            ranks: `[B, Hkv, K]` integers, the ranks to mark; -1 marks nothing; the first must be within the lengths.
        """
        ranks = ranks.long()
        ranks = ranks.where(ranks >= 0, ranks[..., :1])
        mask = torch.zeros(*self.lengths.shape, max(self.row_seen), dtype=torch.bool, device=ranks.device)
        return mask.scatter_(2, take_tokens(self.positions, ranks), True)

    def append(self, key: Tensor, value: Tensor) -> None:
        """Add one token per row, `key` and `value` `[B, Hkv, 1, D]`, to the working set, its index and its archive."""
        positions = self._next_positions(1, key)
        self.seen = self.seen + 1
        stored = self.format.store(key, value)
        if self.index is not None:
            self.index.extend(self.format.load(stored, key.dtype)[0], self.lengths)
        if self.source is None:
            self.tokens.append(stored | positions)
        else:
            self.source.append(stored)
            self.tokens.append(positions)
        self.num_pending += 1

    def reserve(self) -> None:
        """Make room for at least one more token in every row; on a GPU all buffers grow together, and seldom."""
        if self.room == 0:
            num_new = 1 if self.like.device.type == "cpu" else self.tokens.growth
            for part in filter(None, (self.tokens, self.source)):
                part.reserve(num_new)
            if self.index is not None:
                self.index.reserve(self.max_length + num_new)

    def count_appended(self) -> None:
        """Advance the host-side lengths by one after a backend has appended a token to the buffers itself."""
        for part in (self.tokens, self.source):
            if part is not None:
                part.max_length += 1
        self.num_pending += 1

    def take_back(self, num_held: int, num_pending: int) -> None:
        """Go back to `max_length` = `num_held`, whether or not a backend's step appended a token before it failed."""
        excess = int(self.lengths.max()) - num_held  # the lengths on the device are right, whatever the host counted
        for part in (self.tokens, self.source):
            if part is not None:
                part.lengths = part.lengths - excess
                part.max_length = int(part.lengths.max())
        self.seen = self.seen - excess
        self.num_pending = num_pending
        self.index = None

    def truncate(self, row_seen: list[int]) -> None:
        """Forget all but the first `row_seen` tokens seen by the rows; no token is kept until `keep`.

        There must be an archive.
        """
        assert self.archive is not None
        self._archive_decoded()
        self.archive.set_lengths(torch.tensor(row_seen, device="cpu")[:, None].expand(self.lengths.shape))
        self.tokens = RaggedTokens.empty_like(self.tokens.fields)
        self.set_seen(row_seen)
        self.index = None

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of the working set, each `[B, Hkv, max_length, D]` in the dtype of incoming keys."""
        if self.source is None:
            return self.format.load(self.tokens.views(), self.like.dtype)
        stored = self.source.views()
        if not self.is_whole:
            slots = self.positions.clamp(0, self.source.max_length - 1)  # positions beyond the lengths are undefined
            stored = {name: take_tokens(x, slots) for name, x in stored.items()}
        return self.format.load(stored, self.like.dtype)

    def locate(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find the keys and values of the chosen tokens.

        Args:
            chosen: `[B, Hkv, K]` int64, ranks of tokens in the working set, within the lengths.

        Returns:
            Keys and values, each `[B, Hkv, S, D]`, of all stored tokens or of the chosen ones only; and the slots
            `[B, Hkv, K]` int64 of the chosen tokens in them.
        """
        slots = chosen if self.source is None else take_tokens(self.tokens.views()["positions"], chosen).long()
        part = self.tokens if self.source is None else self.source
        stored = part.views()
        if not self.format.is_exact:  # only the chosen tokens are worth dequantizing
            slots = slots.clamp(0, part.max_length - 1)
            stored = {name: take_tokens(x, slots) for name, x in stored.items()}
            slots = torch.arange(slots.shape[2], device=slots.device).expand_as(slots)
        return *self.format.load(stored, self.like.dtype), slots

    def select_rows(self, rows: Tensor) -> None:
        """Replace the batch by its rows `rows` (`[B']` int64 on the host); a row may be repeated or left out."""
        row_seen, own = self.row_seen, on_device(rows, self.like.device)
        self.like = self.like.index_select(0, own)
        self.set_seen([row_seen[row] for row in rows.tolist()])
        for part in filter(None, (self.tokens, self.archive)):
            part.select_rows(rows)
        if self.index is not None:
            self.index.select_rows(own)

    def _archive_decoded(self) -> None:
        """Append the pending decoded tokens to an archive on the host."""
        if self.archive is not None and self.source is None and self.num_pending > 0:
            last = torch.arange(-self.num_pending, 0, device=self.lengths.device)
            slots = self.lengths[..., None] + last
            stored = {name: take_tokens(self.tokens.fields[name], slots) for name in self.archive.fields}
            self.archive.append({name: x.to(self.archive.lengths.device) for name, x in stored.items()})
        self._seen_before, self.num_pending = self.row_seen, 0

    def _loaded(self, tokens: RaggedTokens) -> RaggedTokens:
        """Return stored tokens and their positions as the fields `keys, values, positions`."""
        views = tokens.views()
        keys, values = self.format.load(views, self.like.dtype)
        return tokens.with_fields({"keys": keys, "values": values, "positions": views["positions"]})

    def _next_positions(self, num_new: int, key: Tensor) -> Fields:
        """Return the field `positions`, `[B, Hkv, num_new]` int32, of the tokens that come next."""
        positions = self.seen[:, None].int() + torch.arange(num_new, dtype=torch.int32, device=key.device)
        return {"positions": positions[:, None].expand(-1, key.shape[1], -1)}
