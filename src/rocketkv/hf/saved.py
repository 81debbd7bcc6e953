"""A `RocketKVCache` in a file: what is written of it, and which model may go on with it.

`snapshot.py` takes the layers apart, and `tensor_file.py` writes and reads the file.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Self
from weakref import ref

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rocketkv import snapshot, tensor_file
from rocketkv.budget import Budget
from rocketkv.config import RocketKVConfig
from rocketkv.errors import CacheFileError, InputError, UnsupportedError
from rocketkv.hf.history import History
from rocketkv.hf.layer import HybridLayer, RocketKVLayer
from rocketkv.hf.plain import has_tokens
from rocketkv.hf.states import is_state, read_states, write_states
from rocketkv.hf.support import check_model
from rocketkv.tensor_file import Rows

_WITHOUT_EFFECT = ("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")  # on keys and values
_SAMPLE = 8  # numbers looked at of each weight


class Identity(NamedTuple):
    """What tells a decoder from others, as far as keys and values go.

    Attributes:
        name: what it was loaded from, or its class; for messages.
        dtype: the dtype in which it computes.
        config: a digest of its configuration: architecture, sizes, rotary embedding.
        weights: a digest of some numbers of each of its weights.
    """

    name: str
    dtype: str
    config: str
    weights: str


class SavedCache:
    """The part of `RocketKVCache` that knows files."""

    layers: list[Any]
    history: History
    config: RocketKVConfig
    keep_queries: int
    _decoder: "ref[PreTrainedModel] | None"
    _recover: Callable[[], None]
    get_seq_length: Callable[[], int]

    def save(self, path: str | PathLike[str]) -> None:
        """Write the cache to a file, from which `load` makes an equal one; this one goes on as it is.

        The file holds all that was seen, readable to whoever has the file: the token ids, and keys and values from
        which the text can be told. Its owner alone may read it (mode 0600). A `multi_turn` file has every token; a
        `single_turn` file is small and has those that stage 1 has left, so its cache answers as this one does.

        Args:
            path: the path of the file; what stood there before is replaced once the new file is complete.

        Raises:
            CacheFileError: the file cannot be written.
            InputError: no forward pass has filled the cache, its model is gone, or a pass broke off half way.
            UnsupportedError: the cache is a stack, or it has an eviction or a selection of your own.
        """
        tensor_file.save(Path(path), *self.parts())

    @classmethod
    def load(cls, path: str | PathLike[str], model: PreTrainedModel) -> Self:
        """Return the cache that was saved in a file, which answers to the token what the saved one would.

        The archive of a `multi_turn` cache is mapped on the CPU, not read: caches of one file share its memory until
        they write to it, and only what they write is theirs. Leave the file as it is while such a cache lives;
        to replace or delete it is safe.

        Args:
            path: the path of the file.
            model: the model that filled the cache, in the same dtype.

        Raises:
            CacheFileError: there is no such file, it is damaged, or another model, dtype or version made it.
            UnsupportedError: the model is not supported.
        """
        return cls.from_parts(Path(path), model, *tensor_file.load(Path(path)))

    def parts(self) -> tuple[dict[str, Tensor | Rows], dict[str, Any]]:
        """Return the tensors and the record of which a file consists; see `save`."""
        self._recover()
        decoder = None if self._decoder is None else self._decoder()
        if self.history.num_rows is None or decoder is None:
            raise InputError(
                "no forward pass of a model that is still there has filled this cache, so it cannot be saved; "
                "give it a prompt or, after pickle, the next token first."
            )
        tensors: dict[str, Tensor | Rows] = {"ids": self.history.ids}
        if self.history.mask is not None:
            tensors["mask"] = self.history.mask
        if self.history.offsets is not None:
            tensors["offsets"] = self.history.offsets
        layers: list[Any] = []
        for i, layer in enumerate(self.layers):
            parts, facts = _take_apart(layer)
            tensors |= {f"{i}.{name}": tensor for name, tensor in parts.items()}
            layers.append(facts)
        record = {
            "model": identify(decoder)._asdict(),
            "config": options_of(self.config),
            "keep_queries": self.keep_queries,
            "layers": layers,
        }
        return tensors, record

    @classmethod
    def from_parts(
        cls,
        path: Path,
        model: PreTrainedModel,
        record: dict[str, Any],
        tensors: Mapping[str, Tensor],
        own: Identity | None = None,
    ) -> Self:
        """Return the cache that consists of these parts of a file; see `load`. `own` is the model's, if it is known."""
        decoder = check_model(model)
        try:
            check_identity(path, Identity(**record["model"]), own or identify(decoder))
            cache = cls(model.config, _config_of(record["config"]), keep_queries=record["keep_queries"])  # type: ignore[call-arg]  # a RocketKVCache
            mask = tensors.get("mask")
            cache.history.append(tensors["ids"], None if mask is None else mask.clone())
            if "offsets" in tensors:
                cache.history.offsets = tensors["offsets"].clone()
            for i, (layer, facts) in enumerate(zip(cache.layers, record["layers"], strict=True)):
                prefix = f"{i}."
                parts = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
                _put_together(layer, cache, parts, facts, model.device)
            if cache.get_seq_length() != cache.history.num_columns:
                raise ValueError(f"{cache.history.num_columns} token ids for {cache.get_seq_length()} tokens")
        except (KeyError, TypeError, InputError, ValueError) as error:
            if isinstance(error, CacheFileError):
                raise
            raise CacheFileError(
                f"{path} holds no cache that this rocketkv can make ({error}); save it anew."
            ) from None
        cache._decoder = ref(decoder)
        return cache


def identify(decoder: PreTrainedModel) -> Identity:
    """Return what tells a decoder from others; enabled or not, compiled or not, it is the same."""
    options = decoder.config.to_diff_dict()
    shown = {
        name: value
        for name, value in options.items()
        if name not in _WITHOUT_EFFECT and not name.startswith("_") and not name.endswith("_token_id")
    }
    weights = hashlib.sha256()
    for name, weight in decoder.state_dict().items():
        while weight.dim() > 1 and weight.numel() > 0:
            weight = weight[weight.shape[0] // 2]  # the row in the middle
        weights.update(f"{name} {weight.flatten()[:_SAMPLE].tolist()}".encode())
    kind = type(decoder).__name__
    return Identity(
        name=Path(decoder.config._name_or_path or "").name or kind,
        dtype=str(decoder.dtype).removeprefix("torch."),
        config=hashlib.sha256(json.dumps([kind, shown], sort_keys=True, default=str).encode()).hexdigest(),
        weights=weights.hexdigest(),
    )


def check_identity(path: Path, saved: Identity, own: Identity) -> None:
    """Refuse a decoder that did not fill the cache which a file holds.

    Raises:
        CacheFileError: the dtype, the configuration or the weights differ.
    """
    if saved.dtype != own.dtype:
        raise CacheFileError(
            f"{path} was made in {saved.dtype}, but the model computes in {own.dtype}; load the model in "
            f"{saved.dtype}, or make the file anew."
        )
    for kind in ("config", "weights"):
        if getattr(saved, kind) != getattr(own, kind):
            what = "another configuration" if kind == "config" else "other weights"
            raise CacheFileError(
                f"{path} was made with {saved.name}, which has {what} than the model at hand, {own.name}; load that "
                "model, or make the file anew with this one."
            )


def _take_apart(layer: Any) -> tuple[Mapping[str, Tensor | Rows], Any]:
    """Return the tensors of a layer by name, and its facts."""
    states = read_states(layer)
    if isinstance(layer, RocketKVLayer):
        if type(layer) not in (RocketKVLayer, HybridLayer):
            raise UnsupportedError("a stack of caches cannot be saved; save its caches before they are stacked.")
        parts, facts = snapshot.take(layer.cache)
        return {**parts, **states}, facts
    if has_tokens(layer):
        return {"keys": layer.keys, "values": layer.values, **states}, layer.get_seq_length()
    return states, None


def _put_together(
    layer: RocketKVLayer | DynamicLayer,
    cache: SavedCache,
    parts: dict[str, Any],
    facts: Any,
    device: torch.device,
) -> None:
    """Put an empty layer into the state that was saved."""
    write_states(layer, {name: parts.pop(name).to(device) for name in list(parts) if is_state(name)})
    if isinstance(layer, RocketKVLayer):
        layer.cache = snapshot.restore(cache.config, cache.keep_queries, snapshot.Snapshot(parts, facts), device)
        return
    if not has_tokens(layer):
        return
    keys, values = (parts[name].to(device) for name in ("keys", "values"))
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    if hasattr(layer, "cumulative_length"):  # of a sliding window
        layer.cumulative_length = facts


def options_of(config: RocketKVConfig) -> dict[str, Any]:
    """Return the options as JSON holds them."""
    for name in ("eviction", "selection"):
        if not isinstance(given := getattr(config, name), str):
            raise UnsupportedError(
                f"a cache with {name}={type(given).__name__}, an object of your own, cannot be saved, as the file "
                "could not make that object again; choose one of the library's by name."
            )
    return asdict(config)


def _config_of(options: dict[str, Any]) -> RocketKVConfig:
    """Return the configuration with these options."""
    budget = options["budget"]
    return RocketKVConfig(**{**options, "budget": None if budget is None else Budget(*budget)})
