"""Tests of the main job on the real small model and real prose, in short; `make eval` measures it in full."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from rocketkv import RocketKVCache, RocketKVConfig, disable, enable
from rocketkv.eval.data.dialogue import encode
from rocketkv.eval.data.haystack import default_text
from rocketkv.eval.run.generation import SharedPrefill, stop_ids
from rocketkv.eval.run.methods import method_config
from rocketkv.eval.suites.base import Request
from rocketkv.eval.suites.niah import SUITE
from rocketkv.hf.models import LoadedModel
from rocketkv.hf.session import Session
from rocketkv.hf.versions import pass_cache

PROSE = default_text()
NEW = 8


@pytest.fixture(autouse=True)
def _restored(smollm2: LoadedModel) -> Any:
    yield
    disable(smollm2.model)


@torch.inference_mode()
def generate(loaded: LoadedModel, texts: list[str], **options: Any) -> list[list[int]]:
    loaded.tokenizer.padding_side = "left"
    batch = loaded.tokenizer(texts, return_tensors="pt", padding=True)
    output = loaded.model.generate(**batch, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options)
    return output[:, batch.input_ids.shape[1] :].tolist()


TEXTS = [PROSE[20000:20900], PROSE[50000:50400], PROSE[90000:90150]]  # about 225, 90 and 35 tokens


@pytest.fixture(scope="module")
def together(smollm2: LoadedModel) -> Callable[[RocketKVConfig], list[list[int]]]:
    """What a padded batch of the texts is answered under a configuration, once for all tests."""

    @cache
    def answer(config: RocketKVConfig) -> list[list[int]]:
        enable(smollm2.model)
        return generate(smollm2, TEXTS, **pass_cache(RocketKVCache(smollm2.model.config, config)))

    return answer


def config(token_budget: int, **options: Any) -> RocketKVConfig:
    return RocketKVConfig(dense_below=0, token_budget=token_budget, **options)


@pytest.fixture(scope="module")
def plain(smollm2: LoadedModel) -> list[list[int]]:
    """What the model answers to each text alone without us."""
    return [tokens for text in TEXTS for tokens in generate(smollm2, [text])]


@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
def test_a_budget_for_everything_gives_plain_generates_tokens(
    smollm2: LoadedModel, plain: list[list[int]], together: Callable[[RocketKVConfig], list[list[int]]], mode: str
) -> None:
    everything = config(4096, mode=mode)
    assert together(everything) == plain
    alone = generate(smollm2, TEXTS[:1], **pass_cache(RocketKVCache(smollm2.model.config, everything)))
    assert alone == plain[:1]


@pytest.mark.parametrize("mode", ["single_turn", "multi_turn"])
def test_padded_rows_give_the_tokens_they_give_alone(
    smollm2: LoadedModel, together: Callable[[RocketKVConfig], list[list[int]]], mode: str
) -> None:
    small = config(128, mode=mode)
    enable(smollm2.model)
    alone = [generate(smollm2, [text], **pass_cache(RocketKVCache(smollm2.model.config, small))) for text in TEXTS]
    assert [[tokens] for tokens in together(small)] == alone


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_the_kernels_answer_as_the_reference_does(
    together: Callable[[RocketKVConfig], list[list[int]]], kv_dtype: str
) -> None:
    kernels, reference = (together(config(128, kv_dtype=kv_dtype, backend=name)) for name in ("auto", "reference"))
    assert kernels == reference


@torch.inference_mode()
def find(loaded: LoadedModel, methods: list[str], task: str, length: int, depths: slice) -> list[list[list[float]]]:
    """Return scores of needle tasks at some depths, t = 256, by sample, turn and method."""
    enable(loaded.model)
    request = Request(loaded.tokenizer, [task], [length], 1, seed=42, data=None, haystack=PROSE, parity=False)
    scores = []
    for sample in list(SUITE.samples(request))[depths]:
        shared = SharedPrefill(loaded.model, [method_config(method, 256) for method in methods])
        scores.append([])
        for turn, piece in enumerate(encode(loaded.tokenizer, sample, "multi_turn").pieces):
            shared.take_in(piece)
            answers = shared.answer(sample.turns[turn].max_new_tokens, stop_ids(loaded))
            texts = [loaded.tokenizer.decode(answer.token_ids, skip_special_tokens=True) for answer in answers]
            scores[-1].append([SUITE.score(sample, turn, text)["score"] for text in texts])
    return scores


def test_needles_are_found_where_the_full_cache_finds_them(smollm2: LoadedModel) -> None:
    methods = ["full", "rocketkv", "rocketkv:kv_dtype=int8"]
    full, *ours = torch.tensor(find(smollm2, methods, "passkey_tokens", 2000, slice(0, None, 3)))[:, 0].T
    assert full.sum() >= 3
    assert all((full * found).sum() >= full.sum() - 1 for found in ours)


def test_multi_turn_finds_the_needles_of_later_turns(smollm2: LoadedModel, report: Callable[[str], None]) -> None:
    methods = ["full", "rocketkv_mt", "rocketkv"]
    scores = torch.tensor(find(smollm2, methods, "passkey_turns", 1000, slice(0, None, 4)))
    full, ours, evicted = scores[:, 1:].sum((0, 1)).tolist()
    report(f"needles of turns 2 to 4 found, of 9: {full} full, {ours} multi-turn, {evicted} single-turn")
    assert full >= 3
    assert ours >= full - 1


def test_a_session_of_the_full_cache_is_plain_generate(smollm2: LoadedModel) -> None:
    dense = Session(smollm2, RocketKVConfig(dense_below=0, token_budget=8192), max_new_tokens=8)
    full = Session(smollm2, None, max_new_tokens=8)
    for message in (PROSE[10000:10800] + "\n\nWhat is this about?", "And why?"):
        one, other = dense.send(message), full.send(message)
        assert one.text == other.text
        assert one.stats.total.num_seen == other.stats.total.num_seen
        assert other.stats.total.retained_fraction == 1.0
