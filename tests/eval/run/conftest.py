"""What the tests of runs share."""

import pytest

from eval_inputs import byte_tokenizer
from eval_runs import CHAT
from rocketkv.hf.models import LoadedModel
from tiny import tiny_model


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return LoadedModel(tiny_model("llama", vocab_size=256), byte_tokenizer(CHAT))
