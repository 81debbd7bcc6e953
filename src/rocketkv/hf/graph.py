"""A whole decode step of a model as one captured graph, which a GPU runs without the host's work for every layer.

A step whose layers must prepare something (grow a buffer, make a plan, build an index) runs as it is, and so does the
first step after anything else has changed, since it may compile. The next one is captured, and those after it replay
the capture until something changes again. The host then only copies the tokens in, counts them in every layer, and
copies the logits out; sampling and stopping stay outside.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rocketkv.attention import LayerCache
from rocketkv.backends import Step
from rocketkv.hf.cache import RocketKVCache
from rocketkv.hf.passes import Pass
from rocketkv.hf.recording import RECORDERS, Recording
from rocketkv.replay import bound_step, count_step, counts, return_to

ModelStep = Callable[[Tensor, Tensor, Pass], Tensor]  # input ids and positions, [B, 1] int64 each, to logits [B, 1, V]


class Warm(NamedTuple):
    """A step that ran with one cache as it is; the same work can be captured, because nothing is left to compile.

    Attributes:
        steps: the layers' bound steps after it.
        is_inference: whether it ran in torch's inference mode, on which compiled code depends.
    """

    steps: list[ReferenceType[Step]]
    is_inference: bool

    def fits(self, steps: Sequence[Step]) -> bool:
        """Return whether the layers have the same bound steps, and the mode is the same."""
        return _are(self.steps, steps) and self.is_inference == torch.is_inference_mode_enabled()


class Captured(NamedTuple):
    """A captured step of a model with one cache.

    Attributes:
        recording: the recorded work.
        input_ids: `[B, 1]` int64, the memory from which the work reads the new tokens.
        position_ids: `[B, 1]` int64, likewise.
        steps: the layers' bound steps, whose memory the work uses.
        weights: the model's weights and buffers, and where they lay.
    """

    recording: Recording
    input_ids: Tensor
    position_ids: Tensor
    steps: list[ReferenceType[Step]]
    weights: list[tuple[Tensor, int]]

    def fits(self, steps: Sequence[Step]) -> bool:
        """Return whether the layers have the same bound steps, and the weights lie where they lay."""
        return _are(self.steps, steps) and all(weight.data_ptr() == address for weight, address in self.weights)

    def replay(self, input_ids: Tensor, position_ids: Tensor) -> None:
        """Run the work with these tokens."""
        self.input_ids.copy_(input_ids)
        self.position_ids.copy_(position_ids)
        self.recording.replay()


class StepGraphs:
    """The captured steps of one model, one for each cache.

    Args:
        model: the model.
        step: the function that takes a decode step of the model.
    """

    def __init__(self, model: PreTrainedModel, step: ModelStep) -> None:
        self._model, self._step = model, step
        self._known: WeakKeyDictionary[RocketKVCache, Warm | Captured] = WeakKeyDictionary()
        self._is_refused = False

    def __call__(self, input_ids: Tensor, position_ids: Tensor, current: Pass, cache: RocketKVCache) -> Tensor:
        """Take a step: replay the graph of the cache, or capture one, or call the function.

        Args:
            input_ids: `[B, 1]` int64, the new tokens.
            position_ids: `[B, 1]` int64.
            current: the announced pass of the step.
            cache: the cache, of which all layers are compressed.

        Returns:
            The logits, `[B, 1, V]`.
        """
        layers = [layer.cache for layer in cache.compressed_layers]
        known, device = self._known.pop(cache, None), input_ids.device.type
        if device not in RECORDERS or self._is_refused or torch.is_autocast_enabled(device):
            return self._step(input_ids, position_ids, current)
        steps = _bound_steps(layers)
        if known is None or len(steps) < len(layers) or not known.fits(steps):
            output = self._step(input_ids, position_ids, current)
            self._known[cache] = Warm([ref(step) for step in _bound_steps(layers)], torch.is_inference_mode_enabled())
            return output
        if isinstance(known, Captured):
            with _undone_if_broken(layers, current):
                known.replay(input_ids, position_ids)
                for layer in layers:
                    count_step(layer)
                current.waits = [False] * len(layers)
        elif (known := self._capture(input_ids, position_ids, current, layers, steps)) is None:
            return self._step(input_ids, position_ids, current)
        self._known[cache] = known
        return known.recording.output.clone()

    def _capture(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        current: Pass,
        layers: Sequence[LayerCache],
        steps: Sequence[Step],
    ) -> Captured | None:
        """Capture a step while it is taken; warn and return None if that cannot be, and nothing was computed.

        Raises:
            torch.OutOfMemoryError: the device has too little memory for the capture.
        """
        weights = [(x, x.data_ptr()) for x in chain(self._model.parameters(), self._model.buffers())]
        with torch.inference_mode(False):  # so that a replay may write to them in any mode
            input_ids, position_ids = input_ids.clone(), position_ids.clone()
        try:
            with _undone_if_broken(layers, current):
                if len({weight.device for weight, _ in weights}) > 1:
                    raise RuntimeError("its weights lie on several devices")
                record = RECORDERS[input_ids.device.type]
                recording = record(lambda: self._step(input_ids, position_ids, current), input_ids.device)
        except RuntimeError as error:
            cause = error.__context__ or error  # the end of a capture that broke off raises an error of its own
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            warnings.warn(
                f"the decode step of {type(self._model).__name__} cannot be captured in a graph and goes on without "
                f"one, only slower ({' '.join(str(cause).split()[:20])}).",
                stacklevel=5,
            )
            self._is_refused = True
            self._known.clear()
            return None
        return Captured(recording, input_ids, position_ids, [ref(step) for step in steps], weights)


def _bound_steps(layers: Sequence[LayerCache]) -> list[Step]:
    """Return the bound steps of those layers that have one."""
    return [step for layer in layers if (step := bound_step(layer)) is not None]


def _are(own: Sequence[ReferenceType[Step]], steps: Sequence[Step]) -> bool:
    return len(own) == len(steps) and all(each() is step for each, step in zip(own, steps, strict=True))


@contextmanager
def _undone_if_broken(layers: Sequence[LayerCache], current: Pass) -> Iterator[None]:
    """Set back what the host counts in these layers and in the pass if the block raises or is interrupted."""
    before, waits = [counts(layer) for layer in layers], list(current.waits)
    try:
        yield
    except BaseException:
        for layer, own in zip(layers, before, strict=True):
            return_to(layer, own)
        current.waits = waits
        raise
