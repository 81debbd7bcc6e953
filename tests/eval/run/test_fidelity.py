"""Fidelity: the figures against plain loops, on a tiny model; passages are where the seed says."""

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

import oracle
from eval_inputs import byte_tokenizer, make_request
from inputs import arrays, make_inputs
from rocketkv import InputError, LayerCache, LogitTerms, RocketKVCache, enable
from rocketkv.cli import app
from rocketkv.eval.run import fidelity, passages
from rocketkv.eval.run.fidelity import BINS, measure
from rocketkv.eval.run.generation import BASE, forward
from rocketkv.eval.run.methods import Arm, make_arms
from rocketkv.eval.run.passages import Passage, find_passages
from rocketkv.eval.run.records import Case
from rocketkv.eval.suites.base import Request
from rocketkv.hf.models import LoadedModel, load
from tiny import prompts, save_tiny

LENGTH, STEPS = 320, 24


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> LoadedModel:
    loaded = load(str(model_folder))
    enable(loaded.model)
    return loaded


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "STEPS", STEPS)
    monkeypatch.setattr(passages, "STEPS", STEPS)


@pytest.fixture(scope="module")
def passage() -> Passage:
    return Passage(Case("text", "text-320-0", LENGTH), prompts(LENGTH + STEPS + 1)[0][0].tolist())


def request_for(loaded: LoadedModel, **changes: Any) -> Request:
    haystack = "".join(chr(97 + (i * i // 7) % 26) for i in range(3000))
    return replace(Request(loaded.tokenizer, [], [LENGTH], None, 0, None, haystack, False), **changes)


@torch.inference_mode()
def test_predictions_are_those_of_the_cache_alone(loaded: LoadedModel, passage: Passage) -> None:
    arms = make_arms(["full", "snapkv", "rocketkv", "rocketkv_mt"], [48])
    records = measure(loaded, passage, arms)
    logits = []
    for arm in arms:
        cache = RocketKVCache(loaded.model.config, arm.config())
        forward(loaded.model, cache, [passage.token_ids[:LENGTH]])
        logits.append([forward(loaded.model, cache, [[t]])[0].double() for t in passage.token_ids[LENGTH:-1]])
    full = [x.softmax(-1) for x in logits[0]]
    for arm, record, mine in zip(arms, records, logits, strict=True):
        chances = [x.softmax(-1) for x in mine]
        same = sum(int(p.argmax()) == int(q.argmax()) for p, q in zip(full, chances, strict=True))
        kl = sum(float((p * (p / q).log()).sum()) for p, q in zip(full, chances, strict=True))
        nll = -sum(math.log(q[t]) for q, t in zip(chances, passage.token_ids[LENGTH + 1 :], strict=True))
        assert record["agreement"] == record["scores"]["score"] == same / STEPS
        assert record["kl"] == pytest.approx(kl / STEPS, rel=1e-3, abs=1e-5)
        assert record["perplexity"] == pytest.approx(math.exp(nll / STEPS), rel=1e-3)
        assert (record["method"], record["token_budget"]) == (arm.method, arm.token_budget)
    assert records[0]["agreement"] == 1
    assert 0 < records[1]["agreement"] < 1
    assert records[1]["kl"] > 0.01


@torch.inference_mode()
@pytest.mark.parametrize("method", ["snapkv", "rocketkv", "quest", "exact_topk", "rocketkv_mt"])
def test_layers_are_compared_on_the_trace_of_the_full_cache(loaded: LoadedModel, passage: Passage, method: str) -> None:
    budget = 48
    arm = Arm(method, budget)
    (record,) = measure(loaded, passage, [arm])
    base = RocketKVCache(loaded.model.config, BASE, keep_queries=32)
    forward(loaded.model, base, [passage.token_ids[:LENGTH]])
    _, trace = fidelity._follow_full(loaded, base, passage.token_ids[LENGTH:])
    for number, (layer, steps) in enumerate(zip(base.compressed_layers, trace, strict=True)):
        cache = layer.cache.fork(arm.config())
        past = layer.cache.working.every_token().fields
        keys, values = past["keys"], past["values"]
        cache.trace = True
        errors, recalls = [], []
        kept = torch.zeros(2, BINS)
        for head in range(2):
            for position in cache.positions[0, head].tolist():
                kept[head, position * BINS // LENGTH] += position >= 0
        torch.testing.assert_close(
            torch.tensor(record["kept"][number]), kept.mean(0) / (LENGTH / BINS), atol=1e-4, rtol=0
        )
        for step in steps:
            keys, values = torch.cat([keys, step.key], 2), torch.cat([values, step.value], 2)
            output = cache.decode(step.query, step.key, step.value, scale=step.scale)
            mask = cache.last_attended
            for head in range(4):
                weights = (keys[0, head // 2] @ step.query[0, head, 0] * step.scale).softmax(0)
                exact = weights @ values[0, head // 2]
                torch.testing.assert_close(step.output[0, head, 0], exact, rtol=1e-4, atol=1e-5)
                errors.append(float((output[0, head, 0] - exact).norm() / exact.norm()))
            for head in range(2):
                masses = (keys[0, head] @ step.query[0, 2 * head : 2 * head + 2, 0].T * step.scale).softmax(0).mean(1)
                best = masses.sort(descending=True).values[:budget].sum()
                recalls.append(float(masses[mask[0, head, : len(masses)]].sum() / best))
        assert record["output_error"][number] == pytest.approx(sum(errors) / len(errors), rel=1e-3, abs=2e-5)
        assert record["recall"][number] == pytest.approx(sum(recalls) / len(recalls), rel=1e-3)
    assert 0 < record["recall"][0] < 1.01
    assert record["output_error"][0] > 0.001


def test_masses_of_attention_know_sinks_and_soft_caps(seeded: torch.Generator) -> None:
    x, terms = make_inputs(seeded, 1, 4, 2, 30, 16), LogitTerms(torch.randn(4, generator=seeded), 1.5)
    cache = LayerCache(BASE)
    cache.prefill(*x.part(0, 28), terms=terms)
    steps = [fidelity.Step(*x.part(t, t + 1), 0.25, terms, x.query[:, :, t : t + 1]) for t in (28, 29)]
    masses = fidelity._attention_masses(cache, steps)
    assert terms.sink_logits is not None
    for head in range(2):
        for step, seen in enumerate((29, 30)):
            query, keys, sinks = arrays(x.query[0, :, seen - 1], x.key[0, head, :seen], terms.sink_logits)
            weights = [oracle.softmax(keys @ query[h] * 0.25, sinks[h], 1.5) for h in (2 * head, 2 * head + 1)]
            np.testing.assert_allclose(masses[head, step, :seen], np.mean(weights, axis=0), atol=1e-6)


def test_the_full_cache_has_no_figures_by_layer(loaded: LoadedModel, passage: Passage) -> None:
    (record,) = measure(loaded, passage, [Arm("full", None)])
    assert not {"output_error", "recall", "kept"} & set(record)
    assert record["kl"] == pytest.approx(0, abs=1e-5)


def test_batches_are_no_larger_than_memory_allows(
    loaded: LoadedModel, passage: Passage, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = make_arms(["full", "snapkv", "quest"], [48])
    together = measure(loaded, passage, arms)
    monkeypatch.setattr(fidelity, "BATCH_BYTES", 1)
    for one, other in zip(together, measure(loaded, passage, arms), strict=True):
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-3, abs=1e-5)
        assert one["agreement"] == other["agreement"]


def test_a_method_with_a_smaller_window_is_measured_too(loaded: LoadedModel, passage: Passage) -> None:
    [record] = measure(loaded, passage, make_arms(["rocketkv:window_size=8"], [48]))
    assert 0 < record["agreement"] <= 1


def test_passages_are_drawn_by_the_seed(loaded: LoadedModel, tmp_path: Path) -> None:
    request = request_for(loaded, lengths=[320, 400], num_samples=2)
    drawn = list(find_passages(request, 2048))
    assert drawn == list(find_passages(request, 2048))
    assert [passage.case for passage in drawn] == [
        Case("haystack", f"haystack-{length}-{number}", length) for length in (320, 400) for number in range(2)
    ]
    text = loaded.tokenizer(request.haystack).input_ids
    for passage in drawn:
        ids = passage.token_ids
        assert len(ids) == passage.case.length + STEPS + 1
        assert any(text[i : i + len(ids)] == ids for i in range(len(text)))
    assert drawn[0].token_ids != drawn[1].token_ids
    assert drawn != list(find_passages(replace(request, seed=1), 2048))
    (tmp_path / "b.txt").write_text(request.haystack)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(request.haystack[::-1].encode()))
    (tmp_path / "notes.md").write_text("")
    found = list(find_passages(replace(request, data=tmp_path, num_samples=None), 2048))
    assert [passage.case.task for passage in found] == ["a", "a", "b", "b"]


def test_a_passage_begins_as_the_tokenizer_begins_texts() -> None:
    tokenizer = byte_tokenizer()
    plain = make_request(tokenizer=tokenizer, lengths=[LENGTH], haystack="abcdefg" * 200)
    (without,) = find_passages(plain, 4096)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="! $A", special_tokens=[("!", 0)])
    (passage,) = find_passages(plain, 4096)
    assert len(passage.token_ids) == len(without.token_ids) == LENGTH + STEPS + 1
    assert (passage.token_ids[0], passage.token_ids.count(0)) == (0, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [2040]}, "length=2040 and 24 tokens to decode do not fit in the model's 2048 tokens"),
        ({"haystack": "short"}, "haystack has 5 tokens, 340 too few for length=320"),
        ({"data": "empty"}, r"has no \.txt or \.txt\.gz; give a text or a folder of texts"),
        ({"data": "empty/none.txt"}, r"none\.txt cannot be read as text"),
        ({"data": "bad.txt.gz"}, r"bad\.txt\.gz cannot be read as text"),
    ],
)
def test_texts_that_do_not_fit_are_refused(
    loaded: LoadedModel, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.txt.gz").write_bytes(b"no gzip")
    changes = {name: tmp_path / value if name == "data" else value for name, value in changes.items()}
    with pytest.raises(InputError, match=message):
        list(find_passages(request_for(loaded, **changes), 2048))


def test_the_command_resumes(model_folder: Path, tmp_path: Path) -> None:
    def run(methods: str, samples: int) -> list[dict[str, Any]]:
        arguments = [
            "eval", "run", "--suite", "fidelity", "--model", str(model_folder), "--methods", methods,
            "--budgets", "48", "--lengths", "320", "--samples", str(samples), "--out", str(tmp_path),
        ]  # fmt: skip
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]

    first = run("full,snapkv", 1)
    assert [record["method"] for record in first] == ["full", "snapkv"]
    records = run("full,snapkv,quest", 2)
    assert records[:2] == first
    assert len(records) == 6
    assert len({(record["id"], record["method"]) for record in records}) == 6
