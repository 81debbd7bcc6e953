"""The switch that lets a model of transformers use a `RocketKVCache`. Only this file hangs anything into a model.

The way of a call: `enable` hangs a hook before the forward pass of the model and one before its decoder's (`hooks.py`).
The first notes what the model was given: token ids and their mask. The second announces the pass to the cache and hands
the `Pass` down as a keyword argument. The decoder passes that on to the attention function that `enable` registered
(`interface.py`); that function lets the layer attend. The model's own `generate` stands behind ours (`generation.py`),
which looks at the conversation before anything is computed. Nothing is global but what a running `generate` was given:
a model without a `RocketKVCache` among its arguments computes exactly what it computed before.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as once
from functools import partial
from types import MethodType
from typing import Any

from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from rocketkv.errors import UnsupportedError
from rocketkv.hf.generation import METHODS
from rocketkv.hf.hooks import after_forward, before_forward, before_model
from rocketkv.hf.interface import NAMES, register
from rocketkv.hf.support import check_model, plain_implementation
from rocketkv.hf.versions import dependency


@dataclass
class _Enabled:
    """The mark of an enabled model, in its attribute `_rocketkv`.

    Attributes:
        own_hook: the hook before the forward pass of the model, not its decoder's.
        undo: the functions that `disable` calls, the last one first.
    """

    own_hook: RemovableHandle
    undo: list[Callable[[], Any]]


def enable(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model use a `RocketKVCache`; with any other cache, or none, the model computes what it did before.

    The first call with a version of transformers that is not among the tested ones warns.

    Args:
        model: a decoder of transformers. Prompts of its compressed layers run through our own attention, whatever
            attention implementation the model was loaded with. All other layers run as before with `sdpa` and `eager`,
            and with `sdpa` in place of any other one (`eager`, if the model has no `sdpa`) until `disable`.

    Returns:
        The same model.

    Raises:
        InputError: this is no model of transformers.
        UnsupportedError: the architecture is not supported; the message names it and says why.
    """
    if hasattr(model, "_rocketkv"):
        return model
    decoder = check_model(model)
    name = type(model).__name__
    implementation = model.config._attn_implementation
    if implementation in NAMES.values():
        raise UnsupportedError(
            f"{name} shares its configuration with a model that is enabled already; load or configure it on its own."
        )
    plain = implementation if implementation in NAMES else plain_implementation(type(decoder))
    former = {"": implementation}
    for part in model.config.sub_configs:
        if (config := getattr(model.config, part, None)) is not None:
            former[part] = config._attn_implementation
    _warn_if_untested()
    register()
    model.set_attn_implementation(NAMES[plain])
    own_hook = model.register_forward_pre_hook(before_model, with_kwargs=True)
    decoder_hooks = [
        decoder.register_forward_pre_hook(before_forward, with_kwargs=True),
        decoder.register_forward_hook(after_forward, with_kwargs=True),
    ]
    model._rocketkv = _Enabled(own_hook, [partial(model.set_attn_implementation, former)])
    for hook in (own_hook, *decoder_hooks):
        on_disable(model, hook.remove)
    for method in METHODS:
        if hasattr(model, method.__name__):
            setattr(model, method.__name__, MethodType(method, model))
            on_disable(model, partial(_forget, model, method.__name__))
    return model


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `enable`, and all that was put on the enabled model since; a model that is not enabled stays as it is."""
    if hasattr(model, "_rocketkv"):
        for undo in reversed(model._rocketkv.undo):
            undo()
        del model._rocketkv
    return model


def on_disable(model: PreTrainedModel, undo: Callable[[], Any]) -> None:
    """Let `disable` call a function for an enabled model, before those that were given earlier.

    Args:
        model: an enabled model.
        undo: a bound method or a `partial` with this model, and no closure, so that a deep copy of the model
            undoes what was put on the copy.
    """
    model._rocketkv.undo.append(undo)


def has_own_hook_only(model: PreTrainedModel) -> bool:
    """Return whether an enabled model has no hook around its forward pass but the one of `enable`."""
    return not model._forward_hooks and set(model._forward_pre_hooks) == {model._rocketkv.own_hook.id}


def _forget(model: PreTrainedModel, name: str) -> None:
    """Take away an attribute that hides one of the model's class."""
    vars(model).pop(name, None)


@once
def _warn_if_untested() -> None:
    """Say, once, that this transformers is not among the tested versions."""
    known = dependency("transformers")
    if not known.is_tested:
        warnings.warn(
            f"transformers {known.installed} is not among the versions that rocketkv was tested with, {known.tested}; "
            "if something fails, install one of those.",
            stacklevel=3,
        )
