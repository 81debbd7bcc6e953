"""A recording of a step on the CPU that acts like a CUDA graph, so that captured steps can be tested without a GPU.

The tape records what a GPU would do: torch's operations and the steps of the C++ backend, with the tensors that they
read and write. A replay repeats these and runs no Python of the model, so every number of the host stays as it was at
the recording, as in a CUDA graph. Work that would wait for the device fails, as it fails in a capture.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rocketkv.backends.cpp import CppStep
from rocketkv.hf import compiled

WAITING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"}  # operations after which the host knows a result
plain_step = CppStep.__call__


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its classes untyped
    """A `Recording` (`rocketkv.hf.recording`) whose `replay` repeats the operations one by one."""

    def __init__(self, work: Callable[[], Tensor], device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parts: list[Callable[[], None]] = []
        CppStep.__call__ = lambda *token: self.record_step(*token)  # type: ignore[method-assign]
        try:
            with self:
                self.output = work()
        finally:
            CppStep.__call__ = plain_step  # type: ignore[method-assign]

    @torch.inference_mode()  # whose tensors a device may write to in any mode
    def replay(self) -> None:
        for part in self.parts:
            part()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func is torch.ops.rocketkv.attend_layer.default:  # Python that a GPU does not see
            query, key, value, handle, *others = args
            number = int(handle)
            with self:
                return compiled._attend(query, key, value, number, *others)  # type: ignore[arg-type]
        if name in WAITING:
            raise RuntimeError(f"{name} waits for the device")
        result = func(*args, **kwargs)
        if not (func.is_view and shares_memory(result, args)):
            self.parts.append(lambda: copy_results(func(*args, **kwargs), result))
        return result

    def record_step(self, *token: Any) -> Any:
        """Run a step of the C++ backend, and record it; `token` begins with the step."""
        with torch.utils._python_dispatch._disable_current_modes():
            result = plain_step(*token)
            self.parts.append(lambda: copy_results(plain_step(*token), result))
        return result


def shares_memory(result: Any, args: Any) -> bool:
    """Return whether a result is a view; `reshape` and its like may return a copy instead."""
    storages = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, Tensor)}
    return all(x.untyped_storage().data_ptr() in storages for x in tree_leaves(result))


def copy_results(new: Any, recorded: Any) -> None:
    """Write new results to where the recording has put them."""
    for source, target in zip(tree_leaves(new), tree_leaves(recorded), strict=True):
        if isinstance(target, Tensor) and target is not source:
            target.copy_(source)


class Recorder:
    """Makes tapes, and counts them and their replays; in none of them may a layer bind its step anew."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.replays = 0
        self.log: list[str] = []  # the compiled steps and the captures, in order

    def compile(self, function: Any, **options: object) -> Any:
        def logged(*args: Any) -> Any:
            self.log.append("step")
            return function(*args)

        return logged

    def bind(self, original: Any, *args: Any) -> None:
        assert self.log[-2:] != ["capture", "step"], "a layer binds its step in a capture"
        original(*args)

    def __call__(self, work: Any, device: torch.device) -> Tape:
        self.log.append("capture")
        self.tapes.append(Tape(work, device))
        self.log.append("captured")
        original = self.tapes[-1].replay

        def replay() -> None:
            self.replays += 1
            original()

        self.tapes[-1].replay = replay  # type: ignore[method-assign]
        return self.tapes[-1]
