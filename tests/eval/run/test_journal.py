"""The journal of a run: nothing is lost, nothing is repeated, and files of others are left alone."""

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eval_runs import Small, by_key, request_for, run_small
from rocketkv import InputError
from rocketkv.eval.data.samples import Fault, Sample
from rocketkv.eval.run.journal import Journal, Shard
from rocketkv.eval.run.methods import make_arms
from rocketkv.eval.run.records import Case
from rocketkv.eval.run.runner import Plan, run
from rocketkv.eval.suites.base import Request, Suite
from rocketkv.hf.models import LoadedModel


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
    """A function that lets no file grow beyond so many bytes."""
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


def test_a_later_run_on_another_machine_is_noted(tmp_path: Path) -> None:
    for cpu in ("first", "second", "first", "second"):
        with Journal(tmp_path, {"seed": 0}, Shard(), facts={"machine": {"cpu": cpu}}, command="run") as journal:
            journal.begin()
    assert json.loads((tmp_path / "run.json").read_text()) == {
        "seed": 0,
        "machine": {"cpu": "first"},
        "commands": ["run"],
        "also_ran_with": [{"machine": {"cpu": "second"}}],
    }


def test_a_folder_that_cannot_be_used_is_named(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file cannot be used \(File exists\); give another --out"):
        run_small(loaded, tmp_path / "file")


def test_cases_of_other_lengths_are_other_cases(tmp_path: Path) -> None:
    with Journal(tmp_path, {}, Shard(), facts={}, command="run") as journal:
        arms = make_arms(["full"], [64])
        one = {"task": "t", "id": "0", "turn": 0, "turns": 1, "method": "full", "token_budget": None, "prompt": "a"}
        journal.append([{**one, "length": 1000}])
        assert journal.missing(Case("t", "0", 1000), arms, "a") == []
        assert journal.missing(Case("t", "0", 2000), arms, "b") == arms
