"""The decode step of a transformers model, compiled by `torch.compile` around our attention.

The way of a call: a compiled model looks at the arguments. One new token per row with a `RocketKVCache` goes to the
compiled graph, everything else to the model as it was. In the graph the model sees a cache of stand-in layers and a
stand-in pass, whose attention is one opaque operation, `rocketkv::attend_layer`; that operation looks up the live pass
by a handle. The graph knows nothing of the cache, which may grow or give way to another without a new compilation.
On a GPU, `graph.py` captures the compiled step as a whole.
"""

import inspect
import operator
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.fx import GraphModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from rocketkv import backends
from rocketkv.errors import UnsupportedError
from rocketkv.hf.cache import RocketKVCache
from rocketkv.hf.generation import keeper_of_offsets
from rocketkv.hf.graph import StepGraphs
from rocketkv.hf.hooks import after_forward, before_forward
from rocketkv.hf.layer import RocketKVLayer
from rocketkv.hf.passes import Pass
from rocketkv.hf.states import has_states
from rocketkv.hf.switch import enable, has_own_hook_only, on_disable
from rocketkv.hf.versions import CACHE_ARGUMENT, pass_cache
from rocketkv.hf.weights import quantize, quantized_as
from rocketkv.ops import LogitTerms

_COMPILE_ERRORS = (TorchDynamoException, FailOnRecompileLimitHit)

_live: WeakValueDictionary[int, Pass] = WeakValueDictionary()  # the passes that handles stand for, by id


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    handle: Tensor,
    layer: int,
    scale: float | None,
    sink_logits: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Attend one new token per row, `[B, Hq, 1, D]`, in the pass that `handle` (int64 scalar) stands for."""
    output: Tensor = _live[int(handle)].attend(layer, query, key, value, scale, LogitTerms(sink_logits, softcap))
    return output.contiguous()


def _fake_attend(query: Tensor, *args: Any) -> Tensor:
    """Return an empty tensor like the output of `_attend`."""
    return query.new_empty(query.shape)


# A change of signature needs a new name: torch's cache on disk keeps compiled calls of the old one.
# A plain registration, as its calls take half the time of torch.library.custom_op's.
torch.library.define(
    "rocketkv::attend_layer",
    "(Tensor query, Tensor key, Tensor value, Tensor handle, int layer, float? scale, Tensor? sink_logits, "
    "float? softcap) -> Tensor",
)
torch.library.impl("rocketkv::attend_layer", "CompositeExplicitAutograd", _attend)
torch.library.register_fake("rocketkv::attend_layer", _fake_attend)


def _fake_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return an empty tensor like the output of `backends.linear`."""
    return x.new_empty(*x.shape[:-1], weight.shape[0])


torch.library.define("rocketkv::linear", "(Tensor x, Tensor weight) -> Tensor")
torch.library.impl("rocketkv::linear", "CompositeExplicitAutograd", backends.linear)
torch.library.register_fake("rocketkv::linear", _fake_linear)


class _StandIn(RocketKVLayer):
    """A compressed layer as the graph sees it: without any tokens."""

    def __init__(self, window: int | None) -> None:
        self.window = window

    def get_seq_length(self) -> int:
        """Return 0: the graph needs no length, as positions are given and the layer takes no mask."""
        return 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the new tokens as they are, as `RocketKVCache.update` does for a compressed layer."""
        return key_states, value_states


class _PassInGraph(Pass):
    """A forward pass as the graph sees it: its attention is opaque."""

    def __init__(self, layers: list[Any], handle: Tensor) -> None:
        self.layers, self.handle = layers, handle
        self.waits = [True] * len(layers)

    def attend(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, terms: LogitTerms
    ) -> Tensor:
        """Attend the new token outside of the graph."""
        sinks, softcap, _ = terms
        output: Tensor = torch.ops.rocketkv.attend_layer(query, key, value, self.handle, index, scale, sinks, softcap)
        return output


class _FastCall:
    """The call of a compiled model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=model.config).layers]
        self.model = model
        # Only with positions from outside, one number per token, can a graph know nothing of the cache's length.
        takes_positions = "position_ids" in inspect.signature(model.get_decoder().forward).parameters
        self.is_told_positions = takes_positions and keeper_of_offsets(model) is None
        self.step: Callable[..., Tensor] | None = torch.compile(self._step, fullgraph=True, backend=_compile_graph)
        self.graphs = StepGraphs(model, self._run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take the step in the graph if it fits there, and call the model as it was if not."""
        if self.step is None or args or not self._fits(**kwargs):
            return self.model._call_impl(*args, **kwargs)
        decoder, cache, input_ids = self.model.get_decoder(), kwargs[CACHE_ARGUMENT], kwargs["input_ids"]
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.full_like(input_ids, cache.get_seq_length())
        _, announced = before_forward(decoder, (), kwargs)
        current = announced["rocketkv_pass"]
        try:
            logits = self.graphs(_canonical(input_ids), _canonical(positions), current, cache)
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
        """Return whether a call is one new token per row with a compressed cache and asks for nothing but logits."""
        model, config, cache = self.model, self.model.config, others.pop(CACHE_ARGUMENT, None)
        return (
            self.is_told_positions
            and isinstance(cache, RocketKVCache)
            and len(cache.compressed_layers) == len(cache)
            and not any(has_states(layer) for layer in cache.layers)
            and cache.get_seq_length() > 0
            and input_ids is not None
            and input_ids.shape[1:] == (1,)
            and (position_ids is None or position_ids.shape == input_ids.shape)
            and isinstance(logits_to_keep, int)
            and all(value is None or value is False for value in others.values())
            and (config.return_dict if return_dict is None else return_dict)
            and not (config.output_attentions or config.output_hidden_states)
            and not (model.training or torch.is_grad_enabled())
            and has_own_hook_only(model)  # of which a step has no need
        )

    def _run(self, input_ids: Tensor, position_ids: Tensor, current: Pass) -> Tensor:
        """Take an announced step in the compiled graph; see `ModelStep`."""
        assert self.step is not None
        _live[id(current)] = current
        return self.step(input_ids, position_ids, torch.tensor(id(current)))

    def _step(self, input_ids: Tensor, position_ids: Tensor, handle: Tensor) -> Tensor:
        """Compute the logits `[B, 1, V]` of one new token per row, `[B, 1]` int64. This method is compiled."""
        layers = [_StandIn(window) for window in self.windows]
        output = self.model.forward(
            input_ids=input_ids,
            position_ids=position_ids,
            rocketkv_pass=_PassInGraph(layers, handle),
            use_cache=True,
            **pass_cache(Cache(layers)),
        )
        logits: Tensor = output.logits
        return logits


def compile(model: PreTrainedModel, *, weight_dtype: str | None = None) -> PreTrainedModel:
    """Compile the model's decode step; prompts, and calls that ask for more than logits, run as they did.

    The first decoded token waits for the compiler, a minute for 30 layers on one core; later processes find most of the
    work in torch's cache on disk. A cache that grows, or another cache, compiles nothing anew; a second and a third
    batch size do, further ones do not. Models with sliding windows or recurrent states, and those that count positions
    themselves (BART, Qwen-VL), are left uncompiled. A hook that is put on a layer after the first decoded token is not
    called in decode steps.

    On a GPU each cache gets a CUDA graph of the whole step. The graph is captured anew when the buffers grow, by 256
    tokens or more, when the plan changes, and when the weights lie elsewhere; a layer that takes another's place after
    the first decoded token is not seen, and neither is an adapter that is switched on or off while a cache decodes; go
    on with a copy of the cache then. Beam search reorders the rows after each step and runs without a graph.

    Args:
        model: a decoder of transformers; a model that is not enabled is enabled first.
        weight_dtype: `int8` or `int4` hands the model to `quantize`, too; None leaves the weights as they are.

    Returns:
        The same model.

    Raises:
        InputError: `weight_dtype` does not exist.
        UnsupportedError: `enable` or `quantize` refuses the model, or it was compiled already by other means.
    """
    enable(model)
    if weight_dtype is not None:
        quantize(model, weight_dtype)
    if model._compiled_call_impl is None:
        model._compiled_call_impl = _FastCall(model)
        on_disable(model, partial(_drop_step, model))
    elif not isinstance(model._compiled_call_impl, _FastCall):
        raise UnsupportedError(
            f"{type(model).__name__} is compiled by model.compile(); load it anew and call rocketkv.compile instead."
        )
    return model


def uncompile(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `compile`; the model stays enabled, and one that is not compiled stays as it is.

    Raises:
        UnsupportedError: the weights are quantized, and their originals gone; `disable` takes the compiled step away.
    """
    if (found := quantized_as(model)) is not None:
        raise UnsupportedError(f"the weights of {type(model).__name__} were given up for {found}; load it anew.")
    _drop_step(model)
    return model


def _drop_step(model: PreTrainedModel) -> None:
    """Take a compiled step of ours away, and leave a call that was compiled by other means."""
    if isinstance(model._compiled_call_impl, _FastCall):
        model._compiled_call_impl = None


def _compile_graph(graph: GraphModule, inputs: list[Tensor]) -> Any:
    """Hand the graph to torch's compiler, after its linear layers became calls of `rocketkv::linear`."""
    from torch._inductor.compile_fx import compile_fx  # seconds to import, needed by the first decode step only

    for node in graph.graph.find_nodes(op="call_function", target=torch._C._nn.linear):
        x, weight, bias = (*node.args, None)[:3]
        if is_traceable_wrapper_subclass(weight.meta.get("example_value")):
            continue  # weights that another library stores in fewer bits have products of their own
        with graph.graph.inserting_before(node):
            output = graph.graph.call_function(torch.ops.rocketkv.linear.default, (x, weight))
            if bias is not None:
                output = graph.graph.call_function(operator.add, (output, bias))
        node.replace_all_uses_with(output)
        graph.graph.erase_node(node)
    graph.recompile()
    return compile_fx(graph, inputs)


def _canonical(tokens: Tensor) -> Tensor:
    """Return a copy of `[B, 1]` with the strides that the graph was made for, and not of torch's inference mode."""
    with torch.inference_mode(False):
        return tokens.clone(memory_format=torch.contiguous_format)
