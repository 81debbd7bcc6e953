"""The decode step of a transformers model, compiled by `torch.compile` around our attention.

The way of a call: an accelerated model looks at the arguments. One new token per row with a `RocketKVCache` goes to the
compiled graph, everything else to the model as it was. In the graph the model sees a cache of stand-in layers, whose
attention is one opaque operation, `rocketkv::attend`; that operation looks up the live cache by the handle it is given.
So the graph knows nothing of the cache: it may grow, and another may take its place, without a new compilation.
"""

import operator
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.fx import GraphModule
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from rocketkv import backends
from rocketkv.errors import UnsupportedError
from rocketkv.hf import Call, RocketKVCache, RocketKVLayer
from rocketkv.hooks import after_forward, before_forward, enable
from rocketkv.versions import CACHE_ARGUMENT, pass_cache
from rocketkv.weights import quantize, quantized_as

_COMPILE_ERRORS = (TorchDynamoException, FailOnRecompileLimitHit)

_live: WeakValueDictionary[int, RocketKVCache] = WeakValueDictionary()  # what handles stand for, by id


def _attend(query: Tensor, key: Tensor, value: Tensor, handle: Tensor, layer: int, scale: float | None) -> Tensor:
    """Attend one new token per row, `[B, Hq, 1, D]`, through the cache that `handle` (int64 scalar) stands for."""
    output: Tensor = _live[int(handle)].layers[layer].attend(query, key, value, scale)
    return output.contiguous()


def _fake_attend(query: Tensor, *args: Any) -> Tensor:
    """What `_attend` returns, without its data."""
    return query.new_empty(query.shape)


# A change of signature needs a new name: torch's cache on disk keeps compiled calls of the old one.
# A plain registration, as its calls take half the time of torch.library.custom_op's.
torch.library.define(
    "rocketkv::attend", "(Tensor query, Tensor key, Tensor value, Tensor handle, int layer, float? scale) -> Tensor"
)
torch.library.impl("rocketkv::attend", "CompositeExplicitAutograd", _attend)
torch.library.register_fake("rocketkv::attend", _fake_attend)


def _fake_linear(x: Tensor, weight: Tensor) -> Tensor:
    """What `backends.linear` returns, without its data."""
    return x.new_empty(*x.shape[:-1], weight.shape[0])


torch.library.define("rocketkv::linear", "(Tensor x, Tensor weight) -> Tensor")
torch.library.impl("rocketkv::linear", "CompositeExplicitAutograd", backends.linear)
torch.library.register_fake("rocketkv::linear", _fake_linear)


class _StandIn(RocketKVLayer):
    """A compressed layer as the graph sees it: it holds nothing, and its attention is opaque."""

    def __init__(self, index: int, window: int | None, handle: Tensor) -> None:
        self.index, self.window, self.handle = index, window, handle
        self.call = Call()

    def get_seq_length(self) -> int:
        """Not known to the graph, nor needed: positions are given and the mask is the layer's own business."""
        return 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention of the new token, outside of the graph."""
        output: Tensor = torch.ops.rocketkv.attend(query, key, value, self.handle, self.index, scale)
        return output


class _FastCall:
    """What an accelerated model does when it is called."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=model.config).layers]
        self.model = model
        self.step: Callable[..., Tensor] | None = torch.compile(self._step, fullgraph=True, backend=_compile_graph)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take the step in the graph if it fits there, and call the model as it was if not."""
        if self.step is None or args or not self._fits(**kwargs):
            return self.model._call_impl(*args, **kwargs)
        decoder, cache, input_ids = self.model.get_decoder(), kwargs[CACHE_ARGUMENT], kwargs["input_ids"]
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.full_like(input_ids, cache.get_seq_length())
        before_forward(decoder, (), kwargs)
        _live[id(cache)] = cache
        try:
            logits = self.step(_canonical(input_ids), _canonical(positions), torch.tensor(id(cache)))
        except _COMPILE_ERRORS as error:  # nothing was computed
            warnings.warn(
                f"{type(self.model).__name__} cannot be compiled and goes on uncompiled, only slower "
                f"({' '.join(str(error).split()[:20])}).",
                stacklevel=3,
            )
            self.step = None
            cache.withdraw()
            return self.model._call_impl(**kwargs)
        after_forward(decoder, (), kwargs, None)
        return CausalLMOutputWithPast(logits=logits, **pass_cache(cache))

    def _fits(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> bool:
        """Whether a call is one new token per row with a compressed cache and asks for nothing but logits."""
        model, config, cache = self.model, self.model.config, others.pop(CACHE_ARGUMENT, None)
        return (
            isinstance(cache, RocketKVCache)
            and len(cache.compressed_layers) == len(cache)
            and cache.get_seq_length() > 0
            and input_ids is not None
            and input_ids.shape[1:] == (1,)
            and (position_ids is None or position_ids.shape == input_ids.shape)
            and isinstance(logits_to_keep, int)
            and all(value is None or value is False for value in others.values())
            and (config.return_dict if return_dict is None else return_dict)
            and not (config.output_attentions or config.output_hidden_states)
            and not (model.training or model._forward_hooks or torch.is_grad_enabled())
            and set(model._forward_pre_hooks) == {model._rocketkv[0].id}  # its own, of which a step has no need
        )

    def _step(self, input_ids: Tensor, position_ids: Tensor, handle: Tensor) -> Tensor:
        """The model's forward pass for one new token per row, `[B, 1]` int64: logits `[B, 1, V]`. This is compiled."""
        cache = Cache([_StandIn(i, window, handle) for i, window in enumerate(self.windows)])
        output = self.model.forward(
            input_ids=input_ids, position_ids=position_ids, rocketkv_cache=cache, use_cache=True, **pass_cache(cache)
        )
        logits: Tensor = output.logits
        return logits


def accelerate(model: PreTrainedModel, *, weights: str | None = None) -> PreTrainedModel:
    """Compile the model's decode step; prompts, and calls that ask for more than logits, run as they did.

    The first decoded token waits for the compiler, a minute for 30 layers on one core; later processes find most of it
    in torch's cache on disk. A cache that grows, or another one, compiles nothing anew; a second and a
    third batch size do, further ones do not. Models with sliding-window layers are left uncompiled. A hook that is put
    on a layer after the first decoded token is not called in decode steps.

    Args:
        model: a decoder of transformers; it is enabled if it is not yet.
        weights: `int8` or `int4` hands the model to `quantize` too; None leaves its weights as they are.

    Returns:
        The same model.

    Raises:
        InputError: there is no such format of weights.
        UnsupportedError: `enable` or `quantize` refuses the model, or it was compiled already by other means.
    """
    enable(model)
    if weights is not None:
        quantize(model, weights)
    if model._compiled_call_impl is None:
        model._compiled_call_impl = _FastCall(model)
    elif not isinstance(model._compiled_call_impl, _FastCall):
        raise UnsupportedError(
            f"{type(model).__name__} is compiled by model.compile(); load it anew and call accelerate instead."
        )
    return model


def decelerate(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `accelerate`; the model stays enabled, and one that is not accelerated stays as it is.

    Raises:
        UnsupportedError: the weights are quantized, and their originals gone; `disable` takes the compiled step away.
    """
    if (held := quantized_as(model)) is not None:
        raise UnsupportedError(f"the weights of {type(model).__name__} were given up for {held}; load it anew.")
    if isinstance(model._compiled_call_impl, _FastCall):
        model._compiled_call_impl = None
    return model


def _compile_graph(graph: GraphModule, inputs: list[Tensor]) -> Any:
    """Hand the graph to torch's compiler, its linear layers as calls of `rocketkv::linear`."""
    from torch._inductor.compile_fx import compile_fx  # seconds to import, needed by the first decode step only

    for node in graph.graph.find_nodes(op="call_function", target=torch._C._nn.linear):
        x, weight, bias = (*node.args, None)[:3]
        with graph.graph.inserting_before(node):
            output = graph.graph.call_function(torch.ops.rocketkv.linear.default, (x, weight))
            if bias is not None:
                output = graph.graph.call_function(operator.add, (output, bias))
        node.replace_all_uses_with(output)
        graph.graph.erase_node(node)
    graph.recompile()
    return compile_fx(graph, inputs)


def _canonical(tokens: Tensor) -> Tensor:
    """A copy of `[B, 1]` with the strides that the graph was made for."""
    return tokens.clone(memory_format=torch.contiguous_format)
