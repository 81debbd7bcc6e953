"""How far a long forward pass has come, told layer by layer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

OnLayer = Callable[[int, int], None]


@contextmanager
def prefill_progress(model: PreTrainedModel, on_layer: OnLayer | None) -> Iterator[None]:
    """Report each decoder layer of the first forward pass, where the decoder keeps its layers in `layers`."""
    layers = getattr(model.get_decoder(), "layers", None)
    if on_layer is None or layers is None:
        yield
        return
    handles: list[torch.utils.hooks.RemovableHandle] = []

    def report(index: int) -> None:
        on_layer(index + 1, len(layers))
        handles[index].remove()

    handles += [
        layer.register_forward_hook(lambda *_, index=index: report(index)) for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
