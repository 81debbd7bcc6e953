"""A whole decode step of a model as one captured graph, which a GPU runs without the host's work for every layer.

A step whose layers must prepare something (grow a buffer, make a plan, build an index) runs as it is. The next one is
captured, and those after it replay the capture until a layer must prepare something again. The host then only copies
the tokens in, counts them in every layer, and copies the logits out; sampling and stopping stay outside.
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
        return all(own() is step for own, step in zip(self.steps, steps, strict=True)) and all(
            weight.data_ptr() == address for weight, address in self.weights
        )

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
        self._captured: WeakKeyDictionary[RocketKVCache, Captured] = WeakKeyDictionary()
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
        captured, device = self._captured.pop(cache, None), input_ids.device.type
        if device in RECORDERS and not self._is_refused and not torch.is_autocast_enabled(device):
            steps = [step for layer in layers if (step := bound_step(layer)) is not None]
            if len(steps) < len(layers):
                captured = None  # a layer must prepare its step first
            elif captured is not None and captured.fits(steps):
                with _undone_if_broken(layers, current):
                    captured.replay(input_ids, position_ids)
                    for layer in layers:
                        count_step(layer)
                    current.waits = [False] * len(layers)
            else:
                captured = self._capture(input_ids, position_ids, current, layers, steps)
            if captured is not None:
                self._captured[cache] = captured
                return captured.recording.output.clone()
        return self._step(input_ids, position_ids, current)

    def _capture(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        current: Pass,
        layers: Sequence[LayerCache],
        steps: Sequence[Step],
    ) -> Captured | None:
        """Capture a step while it is taken; warn and return None if that cannot be, and nothing was computed."""
        weights = [(x, x.data_ptr()) for x in chain(self._model.parameters(), self._model.buffers())]
        input_ids, position_ids = input_ids.clone(), position_ids.clone()
        try:
            with _undone_if_broken(layers, current):
                if len({weight.device for weight, _ in weights}) > 1:
                    raise RuntimeError("its weights lie on several devices")
                record = RECORDERS[input_ids.device.type]
                recording = record(lambda: self._step(input_ids, position_ids, current), input_ids.device)
        except RuntimeError as error:
            warnings.warn(
                f"the decode step of {type(self._model).__name__} cannot be captured in a graph and goes on without "
                f"one, only slower ({' '.join(str(error).split()[:20])}).",
                stacklevel=5,
            )
            self._is_refused = True
            return None
        return Captured(recording, input_ids, position_ids, [ref(step) for step in steps], weights)


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
