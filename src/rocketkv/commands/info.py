"""The command `rocketkv info`: facts for a bug report, and which backend would run a model's decode steps."""

import json
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from rocketkv.commands.options import AsJson, Dtype, KvDtype, Selection
from rocketkv.commands.terminal import out, quieten

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rocketkv.config import RocketKVConfig
    from rocketkv.hf.versions import Dependency

_REMEDY = (
    "install GCC or Clang for C++17, on Linux or macOS, and run `pip install .` in a clone of the sources, "
    "or `pip install --force-reinstall --no-deps --no-binary rocketkv rocketkv`"
)
_COMPRESSED = "full-attention"
_HEAD_DIM = 128  # channels of a key for which `info` says who attends a prompt

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Say how this model would decode, without loading its weights.")
]
GeometryName = Annotated[
    str | None, typer.Option("--geometry", "-g", help="Say how a model of these known sizes would decode.")
]
Mode = Annotated[
    Literal["single_turn", "multi_turn"], typer.Option(help="The mode of the cache: single_turn or multi_turn.")
]
Backend = Annotated[str, typer.Option(help="The backend to decode with: auto, reference or a backend's name.")]


def info(
    model: Model = None,
    geometry: GeometryName = None,
    mode: Mode = "single_turn",
    selection: Selection = None,
    backend: Backend = "auto",
    kv_dtype: KvDtype = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Print what a bug report needs, versions, kernels, threads and models, and how a given model would decode."""
    import platform
    import warnings

    import torch
    from huggingface_hub.constants import HF_HUB_CACHE

    import rocketkv
    from rocketkv.backends import library
    from rocketkv.config import DEFAULT_SELECTION, RocketKVConfig
    from rocketkv.folders import cache_folder
    from rocketkv.hf.embedded import EMBEDDED, missing_wheels
    from rocketkv.hf.versions import dependency

    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # the table says what the warning would
        kernels = library.instruction_set()
    facts: dict[str, Any] = {
        "rocketkv": rocketkv.__version__,
        "python": platform.python_version(),
        **{name: _compared(dependency(name)) for name in ("torch", "transformers")},
        "system": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "kernels": kernels,
        **({"to get the kernels": _REMEDY} if kernels == library.NOT_INSTALLED else {}),
        "kernel threads": library.thread_runtime() or "one: no OpenMP runtime was found in this process",
        **_taken(),
        "embedded models": [
            f"{name}: {f'not installed: {model.pip}' if missing_wheels(name) else 'installed'}"
            for name, model in EMBEDDED.items()
        ],
        "embedded models' cache": str(cache_folder()),
        "model cache": HF_HUB_CACHE,
    }
    chosen = selection or DEFAULT_SELECTION
    config = RocketKVConfig(token_budget=256, mode=mode, selection=chosen, backend=backend, kv_dtype=kv_dtype)
    if model or geometry:
        facts |= _decoding(_meta_model(model, geometry, dtype), config)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, "\n".join(value) if isinstance(value, list) else str(value))
    out.print(table)


def _compared(found: "Dependency") -> str:
    """Return the version at hand, and whether it is a tested one."""
    return f"{found.installed} ({'tested' if found.is_tested else 'not tested; tested are'}: {found.tested})"


def _taken() -> dict[str, Any]:
    """Ask the kernels what they take."""
    import torch

    from rocketkv.backends import Spec, cpp, find_backend
    from rocketkv.backends.base import MAX_HEAD_DIM
    from rocketkv.selection import SELECTION_METHODS

    def takes(dtype: torch.dtype, selection: str) -> bool:
        scoring = SELECTION_METHODS[selection]().scoring
        return find_backend(cpp.NAME, Spec("cpu", dtype, MAX_HEAD_DIM), scoring)[0] is not None

    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    dtypes = [str(dtype).removeprefix("torch.") for dtype in floats if takes(dtype, "dense")]
    prompts = {dtype: cpp.decline_prefill_densely(Spec("cpu", dtype, _HEAD_DIM)) for dtype in floats}
    methods = [name for name in SELECTION_METHODS if takes(torch.float32, name)]
    return {
        "kernel dtypes": ", ".join(dtypes) or "none",
        "kernel head_dim": f"up to {MAX_HEAD_DIM}" if dtypes else "none",
        "kernel selection": ", ".join(methods) or "none",
        "attention of prompts": [
            f"{str(dtype).removeprefix('torch.')}: {'native kernels' if reason is None else f'plain torch ({reason})'}"
            for dtype, reason in prompts.items()
        ],
    }


def _meta_model(model: str | None, geometry: str | None, dtype: str) -> "PreTrainedModel":
    """Return the model in question, without weights."""
    quieten()
    if model is not None:
        from rocketkv.hf.models import load_meta

        return load_meta(model, dtype)
    assert geometry is not None
    import torch

    from rocketkv.bench.geometries import find_geometry
    from rocketkv.bench.model import build_model
    from rocketkv.hf.models import find_dtype

    return build_model(find_geometry(geometry), find_dtype(dtype, torch.bfloat16), "meta")


def _kind(layer: Any) -> str:
    """Return what a layer of a cache keeps, in a word."""
    from rocketkv.hf import RocketKVLayer

    if isinstance(layer, RocketKVLayer):
        return _COMPRESSED
    return "sliding-window" if getattr(layer, "is_sliding", False) else "recurrent or cacheless"


def _decoding(model: "PreTrainedModel", config: "RocketKVConfig") -> dict[str, Any]:
    """Return which backend decodes in each kind of layer, and why, as `LayerCache` would decide."""
    from rocketkv.backends import BACKENDS, Spec, find_backend
    from rocketkv.hf import RocketKVCache, head_dims
    from rocketkv.hf.support import shared_layers
    from rocketkv.hf.switch import enable

    scoring = getattr(config.selection_method(), "scoring", None)
    layers, shared = RocketKVCache(enable(model).config, config).layers, shared_layers(model.config)
    dims_of = head_dims(model.config)
    kinds = Counter((_kind(layers[shared.get(i, i)]), head_dim) for i, head_dim in enumerate(dims_of))

    def way(name: str, head_dim: int) -> str:
        spec = Spec("cpu", model.dtype, head_dim, config.kv_dtype)
        backend, reasons = find_backend(name, spec, scoring)
        if backend is not None:
            return f"native kernels ({backend.NAME})"
        if name not in ("auto", "reference"):
            return f"refused ({'; '.join(reasons)})"
        return f"plain torch ({'; '.join(reasons) or 'backend=reference was chosen'})"

    ways = []
    for (kind, head_dim), count in kinds.items():
        how = way(config.backend, head_dim) if kind == _COMPRESSED else "transformers' own cache, not compressed"
        ways.append(f"{count} {kind}, head_dim={head_dim}: {how}")
    dims = {head_dim for kind, head_dim in kinds if kind == _COMPRESSED}
    refusals = {
        f"backend={backend.NAME}": sorted({way(backend.NAME, head_dim) for head_dim in dims}) for backend in BACKENDS
    }
    return {
        "decode of": f"{type(model).__name__}, {str(model.dtype).removeprefix('torch.')}, {config.mode}, "
        f"selection={config.selection}, kv_dtype={config.kv_dtype}, backend={config.backend}",
        "layers": ways,
        **refusals,
    }
