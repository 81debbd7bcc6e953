from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import T5Config

from rocketkv import InputError, UnsupportedError
from rocketkv.backends import library
from rocketkv.hf import models
from rocketkv.hf.embedded import embedded_path
from rocketkv.hf.models import LoadedModel, load, load_meta
from rocketkv.hf.weights import quantized_as
from tiny import save_tiny


def test_the_embedded_model_loads_and_its_tokenizer_round_trips(smollm2: LoadedModel) -> None:
    assert smollm2.context_length == 8192
    assert not smollm2.model.training
    text = 'Leading  spaces, "quotes" and 1,234 numbers\nsurvive.'
    assert smollm2.tokenizer.decode(smollm2.tokenizer.encode(text)) == text


def test_auto_is_bfloat16_for_packed_weights_where_the_cpu_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("smollm2", str(embedded_path("smollm2")))
    configs = {name: models._read_config(name, *models._locate(name)) for name in names}  # a GGUF file takes seconds
    monkeypatch.setattr(models, "_read_config", lambda name, *_: deepcopy(configs[name]))
    for multiplies, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(library, "multiplies_bfloat16", lambda multiplies=multiplies: multiplies)
        for name in names:
            assert load_meta(name).dtype == dtype
            assert load_meta(name, "float16").dtype == torch.float16


def test_a_folder_loads(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    assert load(str(tmp_path)).model.config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "is neither a folder nor a GGUF file"),
        ("./model.gguf", "there is no file './model.gguf'; give the path of a GGUF file."),
        ("broken.gguf", "cannot be loaded"),
        ("t5", "is an encoder-decoder \\(t5\\); give a decoder-only model."),
        ("empty", "cannot be loaded"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.gguf").write_bytes(b"GGUF and then nonsense" * 100)
    T5Config().save_pretrained("t5")
    Path("empty").mkdir()
    with pytest.raises(InputError, match=message) as error:
        load(name)
    assert "\n" not in str(error.value)


def test_a_dtype_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InputError, match="dtype='int3' does not exist; choose from auto, float32"):
        load("smollm2", "int3")


def test_quantized_weights_are_those_of_a_bfloat16_model(tmp_path: Path) -> None:
    save_tiny(tmp_path, head_dim=32, intermediate_size=128)
    model = load(str(tmp_path), weight_dtype="int8").model
    assert quantized_as(model) == "int8"
    assert model.dtype == torch.bfloat16
    with pytest.raises(UnsupportedError, match="q_proj is in float32; load the model in bfloat16"):
        load(str(tmp_path), "float32", "int8")
    with pytest.raises(InputError, match="weight_dtype='int3' does not exist; choose from int8, int4"):
        load("/no/such/folder", weight_dtype="int3")


def test_a_broken_tokenizer_is_refused(smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rocketkv.hf.models._read_model", lambda *_: smollm2.model)
    kind = type(smollm2.tokenizer)
    decode = kind.decode
    monkeypatch.setattr(kind, "decode", lambda self, *a, **o: decode(self, *a, **o).replace(" ", "#"))
    with pytest.raises(InputError, match="does not give back the text it encodes"):
        load("smollm2")
    monkeypatch.setattr(kind, "encode", lambda self, text, **o: list(range(100, 100 + len(text))))
    with pytest.raises(InputError, match="cuts text into single characters although it has 49152 tokens: transformers"):
        load("smollm2")
