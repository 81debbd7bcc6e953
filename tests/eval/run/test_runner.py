"""The runner: every sample once, whatever happens; the right text before the model; faults named, the rest kept."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from rocketkv import InputError
from rocketkv.cli import app
from rocketkv.eval.data.dialogue import encode, fit
from rocketkv.eval.data.samples import Fault, Sample, Turn
from rocketkv.eval.run.generation import SharedPrefill
from rocketkv.eval.run.journal import Journal, Shard
from rocketkv.eval.run.methods import make_arms
from rocketkv.eval.run.records import Case
from rocketkv.eval.run.runner import Plan, run
from rocketkv.eval.suites import SUITES, find_suite
from rocketkv.eval.suites.base import Request, Suite
from rocketkv.hf.models import LoadedModel
from tiny import save_tiny, tiny_model

CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STAMPS = ("prefill_s", "decode_s", "rows")  # what may differ from run to run
LONG = "It was the best of times, it was the worst of times, it was the age of wisdom. "


def make_tokenizer(chat_template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return LoadedModel(tiny_model("llama", vocab_size=256), make_tokenizer())


def turn(question: str, *answers: str, prefix: str = "", new: int = 6) -> Turn:
    return Turn(question, answers, new, answer_prefix=prefix)


def make_sample(number: int, turns: int = 1, chat: bool = True, length: int | None = None) -> Sample:
    asked = [turn(f" What is {number + k}?", f"gold {k}") for k in range(turns)]
    return Sample(str(number), "small", "times", f"{number}. {LONG * 3}", asked, chat, length=length)


@dataclass
class Small:
    """A suite of a few samples, whose task `broken` has faults of every kind."""

    turns: int = 1
    name = "small"
    tasks = ("times", "broken")

    def samples(self, request: Request) -> Iterator[Sample | Fault]:
        count = request.num_samples or 6
        for number in range(count):
            yield make_sample(number, self.turns)
        if "broken" in request.tasks:
            yield Fault("rows.jsonl, line 7", "it has no context")
            yield make_sample(0, self.turns)  # the same id again
            yield replace(make_sample(100), context=LONG * 100, length=5000)  # does not fit
            yield make_sample(666)  # cannot be judged
            yield make_sample(101, self.turns)

    def score(self, sample: Sample, turn: int, prediction: str) -> Mapping[str, float]:
        if sample.id == "666":
            raise InputError("the metric needs a package")
        return {"score": float("e" in prediction)}


def request_for(loaded: LoadedModel, **changes: Any) -> Request:
    return replace(Request(loaded.tokenizer, [], [], None, 0, None, LONG, False), **changes)


def run_small(
    loaded: LoadedModel,
    folder: Path,
    *,
    methods: Sequence[str] = ("full", "rocketkv", "snapkv"),
    budgets: Sequence[int] = (64,),
    turns: int = 1,
    shard: Shard = Shard(),  # noqa: B008  # it is frozen
    seed: int = 0,
    **changes: Any,
) -> tuple[list[dict[str, Any]], list[tuple[int, int]]]:
    """Run the small suite; return all records in the folder and the reported progress."""
    said: list[tuple[int, int]] = []
    plan = Plan(Small(turns), request_for(loaded, **changes), make_arms(methods, budgets), None, shard)
    with Journal(folder, {"model": "tiny", "seed": seed}, shard, facts={"versions": {}}, command="run") as journal:
        run(loaded, plan, journal, lambda done, total: said.append((done, total)))
    return journal.records, said


def plain(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in STAMPS} for record in records]


def key(record: Mapping[str, Any]) -> tuple[object, ...]:
    return tuple(record[name] for name in ("task", "id", "method", "token_budget", "turn"))


def by_key(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return sorted(plain(records), key=lambda record: repr(key(record)))


# What the model is given


def texts(tokenizer: PreTrainedTokenizerFast, sample: Sample, mode: str) -> list[str]:
    dialogue = encode(tokenizer, sample, mode)
    return [tokenizer.decode(ids) for ids in ([dialogue.head] if dialogue.head else []) + dialogue.pieces]


SHORT = Sample(
    "a", "small", "times", "The text.", [turn(" One?", "first", "other", prefix="It is"), turn("Two?", "second")], True
)


def test_turns_follow_the_right_answers() -> None:
    first = "<user>The text. One?</s>\n<assistant>It is"
    assert texts(make_tokenizer(), SHORT, "multi_turn") == [first, " first</s>\n<user>Two?</s>\n<assistant>"]
    assert texts(make_tokenizer(None), SHORT, "multi_turn") == ["The text. One?It is", " firstTwo?"]
    literal = replace(SHORT, chat=False)
    assert texts(make_tokenizer(), literal, "multi_turn") == ["The text. One?It is", " firstTwo?"]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("mode", ["multi_turn", "multi_request"])
def test_special_tokens_in_a_sample_are_text(chat: bool, mode: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    turns = [turn(" One </s>?", "fi</s>rst", prefix="</s>It"), turn("Two?</s>", "second")]
    sample = replace(SHORT, context="The </s>text.", turns=turns, chat=chat)
    dialogue = encode(tokenizer, sample, mode)
    ids = [i for piece in (dialogue.head, *dialogue.pieces) for i in piece]
    from_template = (3 if mode == "multi_turn" else 2) if chat else 0
    assert ids.count(tokenizer.eos_token_id) == from_template
    assert tokenizer.decode(ids).count("</s>") == from_template + (5 if mode == "multi_turn" else 4)
    cut = fit(tokenizer, replace(sample, context="</s>" * 100), mode, 200, None)
    assert 0 < cut.needed_tokens(turns) <= 200
    assert sum(piece.count(tokenizer.eos_token_id) for piece in (cut.head, *cut.pieces)) == from_template


def test_requests_follow_the_context() -> None:
    head = "<user>The text."
    expected = [head, " One?</s>\n<assistant>It is", "Two?</s>\n<assistant>"]
    assert texts(make_tokenizer(), SHORT, "multi_request") == expected
    literal = replace(SHORT, chat=False)
    assert texts(make_tokenizer(), literal, "multi_request") == ["The text.", " One?It is", "Two?"]


def test_tokens_of_a_prompt_are_counted() -> None:
    dialogue = encode(make_tokenizer(None), SHORT, "multi_turn")
    assert [dialogue.prompt_tokens(k) for k in range(2)] == [19, 29]
    assert dialogue.needed_tokens(SHORT.turns) == 35
    dialogue = encode(make_tokenizer(None), SHORT, "multi_request")
    assert [dialogue.prompt_tokens(k) for k in range(2)] == [19, 13]
    assert dialogue.needed_tokens(SHORT.turns) == 25


def test_special_tokens_stand_at_the_start_of_literal_text_only() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="! $A", special_tokens=[("!", 0)])
    literal = replace(SHORT, chat=False)
    assert [piece[0] == 0 for piece in encode(tokenizer, literal, "multi_turn").pieces] == [True, False]
    requests = encode(tokenizer, literal, "multi_request")
    assert [ids[0] == 0 for ids in (requests.head, *requests.pieces)] == [True, False, False]
    assert all(0 not in piece for piece in encode(tokenizer, SHORT, "multi_turn").pieces)


@pytest.mark.parametrize(
    ("template", "changes", "mode", "message"),
    [
        ("{{ raise_exception('no users') }}", {}, "multi_turn", r"chat template refuses the prompt \(no users\)"),
        (
            "{% for m in messages[-1:] %}{{ m['content'] }}{% endfor %}",
            {},
            "multi_turn",
            "rewrites earlier turns; give a model whose template appends only",
        ),
        (CHAT.replace("['content']", "['content'] | upper"), {}, "multi_request", "does not begin with its context"),
        (CHAT, {"context": ""}, "multi_request", "does not begin with its context"),
        (None, {"turns": [turn("", "a")]}, "multi_request", "a question is empty"),
    ],
)
def test_what_cannot_be_rendered_is_refused(
    template: str | None, changes: dict[str, Any], mode: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        encode(make_tokenizer(template), replace(SHORT, **changes), mode)


def test_the_middle_is_left_out_before_the_template_is_put_around() -> None:
    tokenizer, sample = make_tokenizer(), make_sample(1)
    body = sample.context + sample.turns[0].question
    (piece,) = fit(tokenizer, sample, "multi_turn", 2048, 100).pieces
    assert tokenizer.decode(piece) == f"<user>{body[:50]}{body[-50:]}</s>\n<assistant>"
    whole = encode(tokenizer, sample, "multi_turn")
    assert fit(tokenizer, sample, "multi_turn", len(whole.pieces[0]) + 6, None) == whole
    (piece,) = fit(tokenizer, sample, "multi_turn", len(whole.pieces[0]) + 5, None).pieces
    assert len(piece) == len(whole.pieces[0]) - 1
    assert tokenizer.decode(piece).endswith("What is 1?</s>\n<assistant>")


@pytest.mark.parametrize("mode", ["multi_turn", "multi_request"])
def test_of_several_turns_the_context_is_cut(mode: str) -> None:
    tokenizer, sample = make_tokenizer(), make_sample(1, turns=3)
    whole = encode(tokenizer, sample, mode)
    cut = fit(tokenizer, sample, mode, 200, None)
    assert 190 <= cut.needed_tokens(sample.turns) <= 200
    assert cut.pieces[1:] == whole.pieces[1:]
    start = texts(tokenizer, sample, mode)[0][:20]
    assert tokenizer.decode(cut.head or cut.pieces[0]).startswith(start)


def test_what_was_made_to_a_length_is_not_cut() -> None:
    tokenizer, sample = make_tokenizer(), make_sample(1, length=250)
    with pytest.raises(InputError, match=r"need 2\d\d tokens, but the model was made for 200; ask for shorter"):
        fit(tokenizer, sample, "multi_turn", 200, None)
    with pytest.raises(InputError, match=r"has 251 tokens, more than max_length=100; ask for shorter lengths"):
        fit(tokenizer, sample, "multi_turn", 2048, 100)
    with pytest.raises(InputError, match="leave no room in the model's 20 tokens"):
        fit(tokenizer, make_sample(1), "multi_turn", 20, None)


# Cache handling: each of these fails if a cache is used again that should not be


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


# Journal, resume and shards


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


def test_another_run_does_not_go_into_the_same_folder(loaded: LoadedModel, tmp_path: Path) -> None:
    run_small(loaded, tmp_path)
    before = (tmp_path / "records.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"holds a run with seed=0, not 1; give another --out, or the same settings"):
        run_small(loaded, tmp_path, seed=1)
    with pytest.raises(InputError, match="times, 0 is another prompt than in an earlier run into this folder"):
        run_small(loaded, tmp_path, turns=2, methods=("full", "quest"))
    assert (tmp_path / "records.jsonl").read_bytes() == before


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    def journal() -> Journal:
        return Journal(tmp_path, {}, Shard(), facts={}, command="run")

    with journal(), pytest.raises(InputError, match=r"records\.jsonl is being written to by another run"), journal():
        pass
    with journal():
        pass


@pytest.mark.parametrize("cut", [1, 40, 700])
def test_a_torn_end_is_dropped_and_answered_anew(loaded: LoadedModel, tmp_path: Path, cut: int) -> None:
    whole, _ = run_small(loaded, tmp_path, turns=2)
    path = tmp_path / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(tmp_path, {"model": "tiny", "seed": 0}, Shard(), facts={}, command="run") as journal:
        journal.begin()
        left = journal.records
    assert len(whole) - 4 <= len(left) < len(whole)
    assert len(left) % 2 == 0  # no answer with one of its turns
    assert [json.loads(line) for line in path.read_text().splitlines()] == left
    records, _ = run_small(loaded, tmp_path, turns=2)
    assert by_key(records) == by_key(whole)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("records.jsonl", "{}\n", r"records\.jsonl, line 1 is no record of an evaluation; give another folder"),
        ("records.jsonl", "3\n", r"records\.jsonl, line 1 is no record"),
        ("run.json", "{}", r"run\.json does not describe a run"),
        ("run.json", "oops", r"run\.json does not describe a run"),
        ("run.json", "[]", r"run\.json does not describe a run"),
        ("run.json", '{"model": "tiny", "seed": 0}', r"run\.json does not describe a run"),
        ("run.json", '{"model": "tiny", "seed": 0, "commands": 3}', r"run\.json does not describe a run"),
        ("run.json", "[" * 100_000, r"run\.json does not describe a run"),
        ("run.json", "\udcff", r"run\.json does not describe a run"),
    ],
)
def test_files_of_others_are_left_alone(
    loaded: LoadedModel, tmp_path: Path, name: str, content: str, message: str
) -> None:
    content_bytes = content.encode(errors="surrogateescape")
    (tmp_path / name).write_bytes(content_bytes)
    with pytest.raises(InputError, match=message):
        run_small(loaded, tmp_path)
    assert (tmp_path / name).read_bytes() == content_bytes
    if name == "run.json":  # an empty list of settings finds nothing that differs
        with (
            pytest.raises(InputError, match=message),
            Journal(tmp_path, {}, Shard(), facts={}, command="run") as journal,
        ):
            journal.begin()


@pytest.mark.parametrize("name", ["records.jsonl", "records-1-of-2.jsonl", "faults.jsonl", "run.json"])
def test_a_folder_where_a_file_should_be_is_named(loaded: LoadedModel, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=r"cannot be used|cannot be read|cannot be written|does not describe a run"):
        run_small(loaded, tmp_path)


@pytest.fixture
def full_disk() -> Iterator[Any]:
    """Return a function that lets no file grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def allow(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield allow
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 3000])
def test_a_full_disk_is_one_sentence_and_loses_no_whole_answer(
    loaded: LoadedModel, tmp_path: Path, full_disk: Any, size: int
) -> None:
    whole, _ = run_small(loaded, tmp_path / "whole")
    full_disk(size)
    with pytest.raises(InputError, match=r"cannot be written \(File too large\); see to it, then run the same again"):
        run_small(loaded, tmp_path / "torn")
    full_disk(resource.RLIM_INFINITY)
    records, _ = run_small(loaded, tmp_path / "torn")
    assert by_key(records) == by_key(whole)


def test_a_refused_run_leaves_nothing_that_refuses_the_next(loaded: LoadedModel, tmp_path: Path) -> None:
    class Refusing(Small):
        def samples(self, request: Request) -> Iterator[Sample | Fault]:
            raise InputError("there are no such tasks")

    def plan(suite: Suite) -> Plan:
        return Plan(suite, request_for(loaded), make_arms(["full"], [64]), None, Shard())

    def journal(suite: str) -> Journal:
        return Journal(tmp_path, {"suite": suite}, Shard(), facts={}, command=suite)

    with pytest.raises(InputError, match="no such tasks"), journal("refusing") as refused:
        run(loaded, plan(Refusing()), refused, lambda done, total: None)
    assert not (tmp_path / "run.json").exists()
    with journal("small") as accepted:
        run(loaded, plan(Small()), accepted, lambda done, total: None)
        accepted.note_fault(Fault("a row", "is odd"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match="no such tasks"), journal("small") as refused:
        run(loaded, plan(Refusing()), refused, lambda done, total: None)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_used_is_named(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file cannot be used \(File exists\); give another --out"):
        run_small(loaded, tmp_path / "file")


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


def test_cases_of_other_lengths_are_other_cases(tmp_path: Path) -> None:
    with Journal(tmp_path, {}, Shard(), facts={}, command="run") as journal:
        arms = make_arms(["full"], [64])
        one = {"task": "t", "id": "0", "turn": 0, "turns": 1, "method": "full", "token_budget": None, "prompt": "a"}
        journal.append([{**one, "length": 1000}])
        assert journal.missing(Case("t", "0", 1000), arms, "a") == []
        assert journal.missing(Case("t", "0", 2000), arms, "b") == arms


# The command


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder)
    return folder


def arguments(model_folder: Path, out: Path, samples: int = 2) -> list[str]:
    return [
        "eval", "run", "--suite", "niah", "--model", str(model_folder), "--methods", "full,rocketkv,snapkv,quest",
        "--budgets", "48,64", "--lengths", "700", "--samples", str(samples), "--out", str(out),
    ]  # fmt: skip


def read_records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def test_a_run_that_is_killed_loses_and_repeats_nothing(model_folder: Path, tmp_path: Path) -> None:
    whole = CliRunner().invoke(app, arguments(model_folder, tmp_path / "whole"))
    assert whole.exit_code == 0, whole.output
    path = tmp_path / "killed" / "records.jsonl"
    command = [sys.executable, "-m", "rocketkv", *arguments(model_folder, tmp_path / "killed")]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    end = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    expected = read_records(tmp_path / "whole")
    left = path.read_bytes().count(b"\n")
    assert 0 < left < len(expected)
    resumed = CliRunner().invoke(app, arguments(model_folder, tmp_path / "killed"))
    assert resumed.exit_code == 0, resumed.output
    records = read_records(tmp_path / "killed")
    assert plain(records) == plain(expected)
    assert len({key(record) for record in records}) == len(records) == 2 * 10 * 7


def test_the_command_ends_with_a_table_and_what_was_saved(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [*arguments(model_folder, tmp_path, samples=1), "--shard", "2/4"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/rocketkv", *given])
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    rows = [line.split()[:2] for line in result.stdout.splitlines() if "%" in line]
    assert rows[:4] == [["full", rows[0][1]], ["rocketkv", "48"], ["snapkv", "48"], ["quest", "48"]]
    assert "for each method on its own it would have taken" in result.stdout
    written = json.loads((tmp_path / "run.json").read_text())
    assert written["suite"] == "niah"
    assert written["commands"] == [" ".join(["rocketkv", *given])]
    assert {"machine", "versions"} < set(written)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["--suite", "glue"],
            "suite 'glue' does not exist; choose from niah, ruler, longbench, scbench, qa, rows or fidelity.",
        ),
        (["--methods", "h2o"], "method 'h2o' does not exist"),
        (["--budgets", "16"], "token_budget=16 is smaller than window_size=32"),
        (["--mode", "chat"], "mode='chat' does not exist; choose from multi_turn, multi_request."),
        (["--parity", "kvpress"], "parity='kvpress' does not exist; choose from rocketkv."),
        (["--shard", "3/2"], "shard='3/2' is no part of a whole; give i/n with i from 1 to n, as in 1/3."),
        (["--shard", "one"], "shard='one' is no part of a whole"),
        (["--data", "nowhere"], "there is no nowhere; give the path of a file or folder"),
        (["--tasks", "needle"], "needle"),
        (
            ["--suite", "fidelity", "--tasks", "prose", "--mode", "multi_request"],
            "fidelity has no use for --tasks and --mode; run it without.",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(
    model_folder: Path, tmp_path: Path, changes: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    result = CliRunner().invoke(app, [*arguments(model_folder, tmp_path), *changes])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "records.jsonl").exists() or (tmp_path / "records.jsonl").read_text() == ""
    assert not (tmp_path / "run.json").exists()


def test_faults_make_the_command_fail(model_folder: Path, tmp_path: Path) -> None:
    lengths = ["--lengths", "700,1980"]  # the longer ones leave no room for the answer
    result = CliRunner().invoke(app, [*arguments(model_folder, tmp_path, samples=1), *lengths, "--shard", "1/5"])
    faults = (tmp_path / "faults-1-of-5.jsonl").read_text().splitlines()
    assert result.exit_code == (1 if faults else 0), result.output
    if faults:
        assert f"{len(faults)} samples could not be evaluated" in result.stderr


@pytest.mark.parametrize("name", list(SUITES))
def test_every_suite_is_found_by_its_name(name: str) -> None:
    suite = find_suite(name)
    assert suite.name == name
    assert len(suite.tasks) == len(set(suite.tasks))
    assert suite.tasks or name == "rows"  # whose tasks are those of the rows


def test_a_model_without_a_chat_template_is_asked_only_for_completions(loaded: LoadedModel, tmp_path: Path) -> None:
    base = LoadedModel(loaded.model, make_tokenizer(None))
    with pytest.raises(InputError, match="no chat template, which small needs for times; a base model takes niah"):
        run_small(base, tmp_path / "out")
