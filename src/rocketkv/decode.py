"""One decode step of a layer: append -> score the kept tokens cheaply -> choose the best -> attend to those exactly.

`ReferenceStep` is the step in plain torch: it runs with every selection method, format, device and dtype, and every
backend is compared with it. A backend's step does the same in one call (`backends`). `Decoder` decides which of them
decodes and for how many tokens the decision holds: until a buffer must grow or the plan must change, only the step
itself runs.
"""

import torch
from torch import Tensor

from rocketkv import ops
from rocketkv.backends import LayerTensors, ReadingStep, Scoring, Spec, Step, find_backend
from rocketkv.cache import WorkingSet
from rocketkv.checks import check_logits
from rocketkv.config import RocketKVConfig
from rocketkv.errors import InputError, UnsupportedError
from rocketkv.index import LowBitIndex, PageIndex
from rocketkv.ops import NO_TERMS, LogitTerms
from rocketkv.plan import Planner, SelectionPlan
from rocketkv.selection import SelectionMethod


class ReferenceStep:
    """The decode step in plain torch; see `backends.Step`. A call that raises leaves the working set as it was."""

    def __init__(
        self,
        working: WorkingSet,
        plan: SelectionPlan,
        selection: SelectionMethod,
        scale: float,
        terms: LogitTerms = NO_TERMS,
    ) -> None:
        self._working, self._plan, self._selection = working, plan, selection
        self._scale, self._terms = scale, terms

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, ranks: Tensor | None = None) -> tuple[Tensor, int]:
        """Append one token per row and attend; see `Step`."""
        working = self._working.draft()
        self._working.index = None  # if the step fails, the index may have a token that the working set has not
        working.append(key, value)
        output, read_bytes = self._attend(query, working, ranks)
        self._working.become(working)
        return output, read_bytes

    def read_again(self, query: Tensor) -> tuple[Tensor, int]:
        """Attend another query and append nothing; see `ReadingStep`."""
        return self._attend(query, self._working, None)

    def _attend(self, query: Tensor, working: WorkingSet, ranks: Tensor | None) -> tuple[Tensor, int]:
        """Attend one token per row to the tokens of a working set; see `Step`."""
        plan, lengths, logits = self._plan, working.lengths, None
        if working.max_length > plan.dense_length:
            grouped = query.reshape(*lengths.shape, -1, query.shape[3])  # [B, Hkv, G, D]
            logits = self._selection.logits(grouped, working, plan.num_channels, self._scale)
        if logits is None:
            counts, chosen = lengths, torch.arange(working.max_length, device=lengths.device).expand(*lengths.shape, -1)
            keys, values = working.keys_and_values()
            ragged = lengths if working.tokens.is_ragged else None
            output = ops.decode_densely(query, keys, values, lengths=ragged, scale=self._scale, terms=self._terms)
            read_bytes = int(lengths.sum()) * working.token_bytes
        else:
            logits = check_logits(logits, self._selection, grouped, working.max_length)
            counts = lengths.where(lengths <= plan.dense_lengths[:, None], plan.top_k[:, None])
            scores = ops.score_tokens(logits, lengths, self._terms)
            pins = {"sinks": plan.sinks, "recents": plan.recents}
            chosen = ops.choose_tokens(scores, lengths=lengths, top_k=counts.amax(1), **pins)
            keys, values, slots = working.locate(chosen)
            output = ops.decode_sparsely(
                query, keys, values, slots=slots, counts=counts, scale=self._scale, terms=self._terms
            )
            read_bytes = self._count_read_bytes(working)
        if ranks is not None:
            is_chosen = torch.arange(chosen.shape[2], device=chosen.device) < counts.minimum(lengths)[..., None]
            ranks.fill_(-1)
            ranks[..., : chosen.shape[2]] = chosen.where(is_chosen, -1)
        return output, read_bytes

    def _count_read_bytes(self, working: WorkingSet) -> int:
        """Return the bytes that the step reads; a row that is attended in full needs no scores."""
        plan, lengths = self._plan, working.lengths
        selects = lengths > plan.dense_lengths[:, None]
        sizes = (plan.page_size.to(lengths.device)[:, None], plan.num_channels[:, None])
        scored = self._selection.scored_bytes(lengths, *sizes, working.head_dim, working.like.element_size())
        attended = plan.top_k[:, None].where(selects, lengths) * working.token_bytes
        return int((scored.where(selects, 0) + attended).sum())


class Decoder:
    """Runs the decode steps of one layer, by the backend that the configuration asks for or by the reference."""

    def __init__(self, config: RocketKVConfig, selection: SelectionMethod) -> None:
        self._config, self._selection = config, selection
        self.forget()

    def forget(self) -> None:
        """Drop the bound step, because buffers or the plan have changed; the next decode binds a new one."""
        self._step: Step | None = None
        self._working: WorkingSet | None = None
        self._kind: tuple[object, ...] | None = None  # `kind_of` the checked arguments that the step was bound for
        self._sinks: Tensor | None = None  # as they were given, by whose memory the kind knows them
        self._steps_left = 0
        self._reader: ReadingStep | None = None  # reads again what the bound step has left
        self._reads: tuple[object, ...] = ()  # what a query must be like to be read again: its shape, scale and terms
        self.backend: str | None = None  # the name of the bound backend, or "reference"; None if no step is bound

    def has_checked(self, kind: tuple[object, ...]) -> bool:
        """Return whether the step was bound for arguments of this kind, which were checked then."""
        return kind == self._kind

    def is_bound(self, kind: tuple[object, ...]) -> bool:
        """Return whether the bound step can run again for arguments of this kind."""
        return kind == self._kind and self._steps_left > 0

    @property
    def bound_step(self) -> Step | None:
        """A backend's step that can run again; None if there is none, or if the reference is bound."""
        return self._step if self._steps_left > 0 and self.backend != "reference" else None

    def count_step(self) -> None:
        """Count a run of the bound step that took place without a call of this object."""
        assert self._working is not None
        self._working.count_appended()
        self._steps_left -= 1

    def prepare(self, working: WorkingSet, plan: SelectionPlan) -> SelectionPlan:
        """Prepare the next token: return its plan, make room, and build the index once there is anything to select.

        Raises:
            ConfigError: a row outgrew its plan, and the next plan pins more tokens than a step attends to.
        """
        self.forget()
        if plan.steps_left == 0:
            planner = Planner(self._config, self._selection, working.head_dim, working.like.device)
            plan = planner.outgrown(plan, working.tokens.row_lengths)
            working.index = None
        working.reserve()
        if working.max_length < plan.dense_length:
            working.index = None  # the rows that selected were removed; a dense step does not extend the index
        if working.index is None and working.max_length >= plan.dense_length:
            working.index = self._selection.build_index(working, plan.page_size)
            working.reserve()
        return plan

    def bind(
        self,
        working: WorkingSet,
        plan: SelectionPlan,
        kind: tuple[object, ...],
        num_heads: int,
        scale: float,
        terms: LogitTerms,
        given_sinks: Tensor | None,
    ) -> None:
        """Bind the next steps to a working set that `prepare` has made ready.

        Args:
            working: the working set.
            plan: the plan that `prepare` returned.
            kind: `kind_of` the arguments of the steps.
            num_heads: the number of query heads.
            scale: the factor on the dot products.
            terms: the sinks, as float32, and the soft cap.
            given_sinks: the sinks as they were given with the step.

        Raises:
            UnsupportedError: the backend named in the configuration declines this cache.
        """
        scoring: Scoring | None = getattr(self._selection, "scoring", None)
        is_dense = working.max_length < plan.dense_length
        if is_dense and self._config.backend == "auto":
            scoring = Scoring.DENSE  # the step attends to all tokens, the new one included, with any method
        spec = Spec.of(working.like, self._config.kv_dtype, terms)
        backend, reasons = find_backend(self._config.backend, spec, scoring)
        if backend is None and self._config.backend not in ("auto", "reference"):
            raise UnsupportedError(
                f"backend={self._config.backend!r} declines this cache ({'; '.join(reasons)}); set backend='auto'."
            )
        reader: ReadingStep = ReferenceStep(working, plan, self._selection, scale, terms)
        if backend is None or scoring is None:
            self._step, self.backend = reader, "reference"
        else:
            step = backend.bind(_tensors(working, plan, scoring, num_heads, scale, terms))
            reader = step if isinstance(step, ReadingStep) else reader
            self._step, self.backend = _BackendStep(step, working), backend.NAME
        self._reader, self._reads = reader, (num_heads, scale, terms.softcap, terms.sink_logits)
        self._working, self._kind, self._sinks = working, kind, given_sinks
        self._steps_left = min(working.room, plan.steps_left)
        if is_dense:
            self._steps_left = min(self._steps_left, plan.dense_length - working.max_length)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, trace: bool
    ) -> tuple[Tensor, int | Tensor, Tensor | None]:
        """Run the bound step; if the step raises or is interrupted, the working set is as it was before.

        Returns:
            The output and the bytes read, as `Step` returns them; and the mask of attended positions, as
            `WorkingSet.mark` returns it, or None without `trace`.
        """
        step, working = self._step, self._working
        assert step is not None
        assert working is not None
        before = working.max_length, working.num_pending
        try:
            ranks = torch.full_like(working.tokens.fields["positions"], -1) if trace else None
            output, read_bytes = step(query, key, value, ranks)
            attended = None if ranks is None else working.mark(ranks)
        except BaseException:
            self.forget()
            working.take_back(*before)
            raise
        self._steps_left -= 1
        return output, read_bytes, attended

    def read_again(self, query: Tensor, scale: float, terms: LogitTerms) -> tuple[Tensor, int]:
        """Attend another query, `[B, Hq, 1, D]`, to what the last step left, and append nothing; see `ReadingStep`.

        Raises:
            InputError: no step ran since buffers or plan changed, or the query is of another kind than the step's.
        """
        if self._reader is None or query.shape[2] != 1:
            raise InputError("only a query of one token, right after a decode step, can read what the step has left.")
        if self._reads != (query.shape[1], scale, terms.softcap, None):
            raise InputError(
                "a query that reads again must have the heads, scale and soft cap of the step, and no sinks."
            )
        return self._reader.read_again(query)


class _BackendStep:
    """A backend's step, which appends to the buffers itself, and after it the update of the host-side lengths."""

    def __init__(self, step: Step, working: WorkingSet) -> None:
        self._step, self._working = step, working

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, ranks: Tensor | None = None
    ) -> tuple[Tensor, int | Tensor]:
        output = self._step(query, key, value, ranks)
        self._working.count_appended()
        return output


def _tensors(
    working: WorkingSet, plan: SelectionPlan, scoring: Scoring, num_heads: int, scale: float, terms: LogitTerms
) -> LayerTensors:
    """Return a working set and its plan as the tensors that backends take."""
    stored = (working.source or working.tokens).fields
    index = working.index
    return LayerTensors(
        keys=stored["keys"],
        values=stored["values"],
        exponents=stored.get("exponents"),
        dtype=working.like.dtype,
        positions=working.tokens.fields["positions"],
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
        terms=terms,
    )
