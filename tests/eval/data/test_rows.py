"""Tests of rows in our own schema: they read back as written, and broken ones are refused by name."""

import gzip
import json
import re
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from pyarrow import Table
from pyarrow.parquet import write_table

from eval_inputs import make_request, write_lines
from rocketkv.errors import InputError
from rocketkv.eval.data.files import by_stem, find_files
from rocketkv.eval.data.hub import locate_data
from rocketkv.eval.data.samples import Fault, Sample, Turn, load_samples
from rocketkv.eval.suites.own_rows import SUITE

TURNS = (
    Turn("one?", ("1", "one"), 8, answer_prefix="It is", options=("1", "2"), subtask="numbers"),
    Turn("two?", ("2",), 1),
)
FULL = Sample(
    id="a",
    suite="qa",
    task="squad",
    context="Zwei Bücher. ",
    turns=TURNS,
    chat=True,
    all_classes=("x", "y"),
    length=4096,
    depth=0.5,
    lang="de",
)
SHORT = Sample("b", "qa", "squad", "", (Turn("one?", ("1",), 8),), chat=False)
SHORT_ROW: dict[str, Any] = {
    "id": "b",
    "suite": "qa",
    "task": "squad",
    "context": "",
    "turns": [{"question": "one?", "answers": ["1"], "max_new_tokens": 8}],
    "chat": False,
}


def test_the_row_of_the_guide_is_a_sample(tmp_path: Path) -> None:
    guide = Path(__file__).parents[3] / "docs" / "guides" / "compare.md"
    (tmp_path / "rows.jsonl").write_text("\n".join(re.findall(r"^    (\{.*)", guide.read_text("utf-8"), re.MULTILINE)))
    (sample,) = load_samples(tmp_path / "rows.jsonl")
    assert isinstance(sample, Sample)
    assert sample.turns == (Turn("\nWho signed it?", ("harbour master",), 20),)


def test_rows_read_back_as_they_were_written(tmp_path: Path) -> None:
    text = json.dumps(asdict(FULL), ensure_ascii=False) + "\n\n" + json.dumps(SHORT_ROW) + "\n"
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "list.json").write_text(json.dumps([asdict(FULL), SHORT_ROW]))
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        archive.write(tmp_path / "rows.jsonl", "folder/rows.jsonl")
    for name in ("rows.jsonl", "packed.jsonl.gz", "list.json", "rows.zip"):
        assert list(load_samples(tmp_path / name)) == [FULL, SHORT]


def test_a_folder_is_all_its_files_and_an_id_stands_once(tmp_path: Path) -> None:
    write_lines(tmp_path / "2.jsonl", [SHORT_ROW])
    write_lines(tmp_path / "1.jsonl", [asdict(FULL), SHORT_ROW | {"task": "nq"}])
    (tmp_path / "notes.txt").write_text("no rows")
    first, other_task, second = load_samples(tmp_path)
    assert (first, second) == (FULL, SHORT)
    assert isinstance(other_task, Sample)
    write_lines(tmp_path / "3.jsonl", [SHORT_ROW])
    assert list(load_samples(tmp_path))[3] == Fault(
        "3.jsonl, line 1", "has the id 'b' of an earlier row of squad; give each its own"
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chat": 1}, "has int as 'chat' where bool is expected"),
        ({"context": 3}, "has int as 'context' where str is expected"),
        ({"lenght": 3}, "has the unknown key 'lenght'; known are all_classes, chat"),
        ({"length": True}, "has bool as 'length' where int is expected"),
        ({"depth": "deep"}, "has str as 'depth' where int or float is expected"),
        ({"all_classes": [1]}, r"has \[1\] as 'all_classes' where at least 0 strings are expected"),
        ({"turns": []}, "has 'turns' that are no list of at least one object"),
        ({"turns": ["one?"]}, "has 'turns' that are no list of at least one object"),
        ({"turns": [{"answers": ["1"], "max_new_tokens": 8}]}, "has no 'question'"),
        ({"turns": [{"question": "", "answers": [], "max_new_tokens": 8}]}, r"has \[\] as 'answers' where at least 1"),
        ({"turns": [{"question": "", "answers": "1", "max_new_tokens": 8}]}, "has str as 'answers' where list"),
        (
            {"turns": [{"question": "", "answers": ["1"], "max_new_tokens": 0}]},
            "has 0 as 'max_new_tokens' where",
        ),
        ({"turns": [{"question": "", "answers": ["1"], "tokens": 1}]}, "has the unknown key 'tokens'"),
    ],
)
def test_a_broken_row_is_named_and_the_others_are_read(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [asdict(FULL), SHORT_ROW | {"id": "c"} | changes, SHORT_ROW])
    first, fault, last = load_samples(path)
    assert (first, last) == (FULL, SHORT)
    assert isinstance(fault, Fault)
    assert fault.source == "rows.jsonl, line 2"
    assert re.match(reason, fault.reason)


def test_a_line_that_is_no_utf8_or_no_json_is_a_broken_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xff\xfe\n{"id": \n' + json.dumps(SHORT_ROW).encode())
    no_text, torn, last = load_samples(path)
    assert isinstance(no_text, Fault)
    assert isinstance(torn, Fault)
    assert (no_text.source, torn.source) == ("rows.jsonl, line 1", "rows.jsonl, line 2")
    assert torn.reason.startswith("is no JSON: ")
    assert last == SHORT


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "absent.jsonl does not exist; give a file or a folder"),
        ("rows.parquet", b"PAR1", r"rows.parquet is no parquet \("),
        ("rows.jsonl.gz", b"no gzip", r"rows.jsonl.gz cannot be read \(Not a gzipped file"),
        ("rows.jsonl.gz", gzip.compress(b"x" * 9999, mtime=0)[:20], r"rows.jsonl.gz cannot be read \("),
        ("rows.zip", b"no zip", r"rows.zip is no .zip file \("),
        ("rows.json", b"{", r"rows.json is no JSON \("),
        ("rows.json", b"{}", "rows.json holds no list of objects"),
    ],
)
def test_a_file_that_is_missing_or_of_the_wrong_kind(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(load_samples(tmp_path / name))


# The suite of such rows


def test_own_rows_are_judged_by_the_suite_that_they_name(tmp_path: Path) -> None:
    rows = [SHORT_ROW | {"id": id} for id in "abc"] + [SHORT_ROW | {"task": "lines"}]
    rows += [SHORT_ROW | {"suite": suite, "id": suite} for suite in ("rows", "mine")] + [SHORT_ROW | {"task": "poems"}]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    found = list(SUITE.samples(make_request(data=data)))
    samples = [sample for sample in found if isinstance(sample, Sample)]
    assert [(sample.task, sample.id) for sample in samples] == [*(("squad", id) for id in "abc"), ("lines", "b")]
    assert [fault.reason.partition(";")[0] for fault in found if isinstance(fault, Fault)] == [
        "names the suite 'rows', which judges nothing by itself",
        "suite 'mine' does not exist",
        "names a task that qa does not have",
    ]
    with pytest.raises(InputError, match=r"has no rows of poem; ask for tasks that it has"):
        list(SUITE.samples(make_request(data=data, tasks=["squad", "poem"])))
    turn = SHORT_ROW["turns"][0] | {"subtask": "magic"}
    row = SHORT_ROW | {"suite": "scbench", "task": "scbench_repoqa_and_kv", "turns": [turn]}
    [fault] = SUITE.samples(make_request(data=write_lines(tmp_path / "odd.jsonl", [row])))
    assert isinstance(fault, Fault)
    assert fault.reason.startswith("cannot be judged as scbench_repoqa_and_kv of scbench")
    assert SUITE.score(samples[0], 0, "It is the 1.") == {"score": 1.0}  # the articles go: as `squad` judges
    assert SUITE.score(samples[3], 0, "It is 11.") == {"score": 0.0}  # whole numbers: as `lines` judges
    few = SUITE.samples(make_request(data=data, tasks=["squad"], num_samples=2))
    assert [sample.id for sample in few if isinstance(sample, Sample)] == ["a", "b"]
    with pytest.raises(InputError, match="rows needs its data; give --data"):
        SUITE.samples(make_request())


# The hub's data, from its own cache


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a revision of a dataset as the hub's client stores it, without access to the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "datasets--some--rows" / "snapshots" / COMMIT
    for split in ("kv", "vt"):
        (snapshot / f"scbench_{split}").mkdir(parents=True)
        table = Table.from_pylist(
            [{"context": split, "multi_turns": [{"input": "one?", "answer": "1"}]}, {"context": "b"}]
        )
        write_table(table, snapshot / f"scbench_{split}" / "test-00000-of-00001.parquet")
    write_lines(snapshot / "rows.jsonl", [SHORT_ROW])
    return snapshot


def test_a_pinned_dataset_of_the_hub_is_data_like_any_other(hub: Path) -> None:
    source = f"hf://datasets/some/rows@{COMMIT}"
    assert locate_data(source) == hub
    assert list(load_samples(locate_data(f"{source}/rows.jsonl"))) == [SHORT]
    files = {file.stem: file for file in find_files(locate_data(source))}
    assert list(files) == ["rows", "scbench_kv", "scbench_vt"]
    first, second = files["scbench_kv"].items()
    assert first.value == {"context": "kv", "multi_turns": [{"input": "one?", "answer": "1"}]}
    assert second.source == "scbench_kv/test-00000-of-00001.parquet, row 2"
    assert list(by_stem(files.values())) == list(files)
    write_table(Table.from_pylist([{"context": "c"}]), hub / "scbench_kv" / "train-00000-of-00001.parquet")
    with pytest.raises(InputError, match=r"are both scbench_kv; give one of them alone"):
        by_stem(find_files(hub))
    assert locate_data(str(hub / "rows.jsonl")) == hub / "rows.jsonl"


def test_hub_data_that_cannot_be_had_is_refused(hub: Path) -> None:
    for source, message in [
        ("hf://datasets/some/rows", "names no pinned dataset; give hf://datasets/OWNER/NAME@REVISION with a commit"),
        ("hf://datasets/some/rows@main", "names no pinned dataset"),
        (f"hf://datasets/other/rows@{COMMIT}", "cannot be fetched"),
        (f"hf://datasets/some/rows@{COMMIT}/more", "some/rows has no 'more' at that revision"),
        ("nowhere", "there is no nowhere; give the path of a file or folder"),
    ]:
        with pytest.raises(InputError, match=re.escape(message)):
            locate_data(source)
    broken = hub / "scbench_kv" / "test-00000-of-00001.parquet"
    broken.write_text("no parquet")
    with pytest.raises(InputError, match="is no parquet"):
        list(find_files(hub)[1].items())
