"""The runner: every sample once, the right records, and faults named while the rest is kept."""

import json
from pathlib import Path

import pytest
import torch

from eval_inputs import byte_tokenizer
from eval_runs import by_key, key, make_sample, plain, run_small
from rocketkv import InputError
from rocketkv.eval.data.dialogue import encode
from rocketkv.eval.run.generation import SharedPrefill
from rocketkv.eval.run.journal import Shard
from rocketkv.eval.run.methods import make_arms
from rocketkv.hf.models import LoadedModel


@torch.inference_mode()
@pytest.mark.parametrize("mode", ["multi_turn", "multi_request"])
def test_answers_of_a_turn_do_not_leak_into_the_next(loaded: LoadedModel, tmp_path: Path, mode: str) -> None:
    """Every turn of a dialogue answers as it does with the same past prefilled from nothing and no answer before."""
    methods = ("full", "exact_topk", "snapkv", "rocketkv_mt")
    records, _ = run_small(loaded, tmp_path / "all", methods=methods, turns=3, mode=mode, num_samples=2)
    for number in range(2):
        sample = make_sample(number, turns=3)
        dialogue = encode(loaded.tokenizer, sample, mode)
        for k, piece in enumerate(dialogue.pieces):
            before = [dialogue.head] if dialogue.head else dialogue.pieces[:k]
            shared = SharedPrefill(loaded.model, [arm.config() for arm in make_arms(methods, [64])])
            for ids in [*before, piece]:
                shared.take_in(ids)
            expected = [loaded.tokenizer.decode(a.token_ids) for a in shared.answer(6, set())]
            found = [r["prediction"] for r in records if (r["id"], r["turn"]) == (str(number), k)]
            assert found == expected
    assert len({record["prediction"] for record in records}) > 3


def test_a_record_says_what_was_asked_and_what_it_took(loaded: LoadedModel, tmp_path: Path) -> None:
    records, said = run_small(loaded, tmp_path, num_samples=2)
    assert said == [(0, 2), (1, 2), (2, 2)]
    assert [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()] == records
    assert [key(record)[1:4] for record in records[:3]] == [
        ("0", "full", None), ("0", "rocketkv", 64), ("0", "snapkv", 64)
    ]  # fmt: skip
    full, ours, snapkv = records[:3]
    prompt = len(encode(loaded.tokenizer, make_sample(0), "multi_turn").pieces[0])
    for record in records[:3]:
        assert record["agrees"] == (record["prediction"] == full["prediction"])
        assert record["scores"] == {"score": float("e" in record["prediction"])}
        assert (record["prompt_tokens"], record["rows"], record["turns"]) == (prompt, 3, 1)
        assert (record["suite"], record["length"], record["depth"]) == ("small", None, None)
        assert 1 <= record["new_tokens"] <= 6
        assert record["prefill_s"] > 0
        assert record["decode_s"] > 0
    token = 3 * 2 * 2 * 16 * 4  # bytes: layers, KV heads, keys and values, head_dim, float32
    assert full["read_bytes"] == (prompt + full["new_tokens"] - 1) * token
    assert snapkv["read_bytes"] == (64 + snapkv["new_tokens"] - 1) * token
    assert 50 * token < ours["read_bytes"] < 1.05 * 64 * token
    assert snapkv["kv_bytes"] < full["kv_bytes"]


def test_runs_are_deterministic(loaded: LoadedModel, tmp_path: Path) -> None:
    one, _ = run_small(loaded, tmp_path / "one")
    other, _ = run_small(loaded, tmp_path / "other")
    assert plain(one) == plain(other)
    assert len({record["prediction"] for record in one}) > 3


def test_shards_are_the_whole(loaded: LoadedModel, tmp_path: Path) -> None:
    whole, _ = run_small(loaded, tmp_path / "whole")
    for index in (1, 2, 3, 4):
        records, _ = run_small(loaded, tmp_path / "parts", shard=Shard(index, 4))
    assert by_key(records) == by_key(whole)
    names = {path.name for path in (tmp_path / "parts").iterdir()}
    assert {f"records-{i}-of-4.jsonl" for i in (1, 2, 3, 4)} < names
    done, said = run_small(loaded, tmp_path / "parts")  # unsharded, there is nothing left to do
    assert by_key(done) == by_key(whole)
    assert (tmp_path / "parts" / "records.jsonl").read_text() == ""
    assert said[-1] == (6, 6)


def test_more_methods_budgets_and_samples_are_added(loaded: LoadedModel, tmp_path: Path) -> None:
    whole, _ = run_small(loaded, tmp_path / "whole", methods=("full", "snapkv", "quest"), budgets=(48, 64))
    run_small(loaded, tmp_path / "grown", methods=("full", "snapkv"), budgets=(64,), num_samples=4)
    run_small(loaded, tmp_path / "grown", methods=("snapkv", "quest"), budgets=(48, 64))
    grown, _ = run_small(loaded, tmp_path / "grown", methods=("full", "snapkv", "quest"), budgets=(48, 64))
    unknown = [record for record in grown if record["agrees"] is None]  # answered before the full cache was
    assert {record["id"] for record in unknown} == {"4", "5"}
    for record in unknown:
        record["agrees"] = next(r["agrees"] for r in whole if key(r) == key(record))
    assert by_key(grown) == by_key(whole)
    assert json.loads((tmp_path / "grown" / "run.json").read_text())["commands"] == ["run"]


def test_faults_are_named_and_counted_and_the_rest_is_kept(loaded: LoadedModel, tmp_path: Path) -> None:
    for _ in range(2):  # a second run finds the same ones
        records, said = run_small(loaded, tmp_path, tasks=["broken"], num_samples=2)
        faults = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
        assert [fault["source"] for fault in faults] == [
            "rows.jsonl, line 7", "small, times, 0", "small, times, 100", "small, times, 666"
        ]  # fmt: skip
        reasons = ["it has no context", "another sample has the same id", "tokens, but the model was made", "a package"]
        assert all(reason in fault["reason"] for reason, fault in zip(reasons, faults, strict=True))
        assert {record["id"] for record in records} == {"0", "1", "101"}
        assert len(records) == 9
        assert said[-1] == (7, 7)


def test_a_model_without_a_chat_template_is_asked_only_for_completions(loaded: LoadedModel, tmp_path: Path) -> None:
    base = LoadedModel(loaded.model, byte_tokenizer(None))
    with pytest.raises(InputError, match="no chat template, which small needs for times; a base model takes niah"):
        run_small(base, tmp_path / "out")
