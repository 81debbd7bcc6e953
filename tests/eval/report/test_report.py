"""Tests of the report's files: they are complete and the same to the byte, for whatever was run."""

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from markdown_it import MarkdownIt

from eval_records import BINS, LAYERS, answers, record, write_run
from rocketkv.errors import InputError
from rocketkv.eval.report import write as report
from rocketkv.eval.report.markdown import escape
from rocketkv.eval.report.runs import read_runs


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Make two runs, one of planted facts and one of several turns with a fault, with three methods."""
    generator = np.random.default_rng(0)
    variants = [("full", None), *((method, budget) for budget in (64, 256) for method in ("quest", "rocketkv"))]
    facts, turns, fidelity = [], [], []
    for method, budget in variants:
        share = 0.9 if budget is None else 0.5 + budget / 1000
        for number in range(20):
            score = float(generator.random() < share)
            facts.append(record(method, budget, str(number), score, depth=number % 10 / 9))
            graded = [float(generator.random() * share) for _ in range(3)]
            turns += [
                record(method, budget, str(number), one, suite="qa", task="turns", turn=turn, turns=3)
                for turn, one in enumerate(graded)
            ]
        layers = generator.random((LAYERS, BINS)).tolist()
        lists = (
            {} if budget is None else {"recall": [share] * LAYERS, "output_error": [1 - share] * LAYERS, "kept": layers}
        )
        figures = {"agreement": share, "kl": 0.1, "perplexity": 12.5} | lists
        fidelity.append(record(method, budget, "novel", 0, suite="fidelity", task="novel") | figures)
    fault = {"source": "rows.jsonl, line 3", "reason": "no answers | <b>give</b> *one*"}
    return [
        write_run(tmp_path / "facts", [*facts, *fidelity], commands=["eval run --suite niah", "eval run --shard 2/2"]),
        write_run(tmp_path / "turns", turns, faults=[fault], commands=["eval run --suite qa"]),
    ]


class Reader(HTMLParser):
    """A parser that collects links and text of a page, and checks that its tags match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_report_is_whole(folders: list[Path], tmp_path: Path) -> None:
    written = report.write_report(folders, tmp_path / "out")
    assert sorted(written) == sorted((tmp_path / "out").iterdir())
    markdown, html, *pictures = written
    assert (markdown.name, html.name) == ("report.md", "report.html")
    assert [path.stem for path in pictures] == [
        "niah-budgets", "niah-passkey-depths", "qa-several-turns-budgets", "qa-several-turns-by-turn",
        "fidelity-recall-1024",
        "fidelity-output-error-1024", "fidelity-kept-1024",
    ]  # fmt: skip
    text = markdown.read_text(encoding="utf-8")
    assert re.findall(r"!\[.*\]\((.*)\)", text) == [path.name for path in pictures]
    for path in pictures:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    page = Reader(html.read_text(encoding="utf-8"))
    assert page.open == []
    embedded = [base64.b64decode(source.removeprefix("data:image/svg+xml;base64,")) for source in page.sources]
    assert embedded == [path.read_bytes() for path in pictures]  # all of them, and nothing from elsewhere
    for words in (
        "smollm2",
        "eval run --suite niah; eval run --shard 2/2",
        "no answers | <b>give</b> *one*",
        "rows.jsonl, line 3",
    ):
        assert words in "".join(page.words)
    assert re.findall(r"^## .*", text, re.MULTILINE) == [
        "## What was run",
        "## Average over the tasks where the full cache scores above 50",
        "## niah",
        "## qa, several turns",
        "## Fidelity",
        "## One prefill for all methods",
        "## Faults",
        "## How to read it",
    ]
    assert "| 1,024 | rocketkv | 64 | 1 | 56.4 % | 0.1000 | 12.50 | 56.4 % | 43.6 % |" in text
    assert "| 1,024 | full |  | 1 | 90.0 % | 0.1000 | 12.50 |  |  | 4.0 MiB | 8.0 MiB |" in text
    assert "nan" not in text


def test_report_is_the_same_to_the_byte(folders: list[Path], tmp_path: Path) -> None:
    once, again = (report.write_report(folders, tmp_path / name) for name in ("once", "again"))
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]


def test_report_without_full_cache_and_of_one_turn(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", answers("quest", 64, [1, 0, 1]))
    text = report.write_report([folder], tmp_path / "out")[0].read_text(encoding="utf-8")
    assert "No data: the full cache was not run." in text
    assert "| quest | 64 | 66.7 [20.8, 93.9] | no data | no data | 3 | 1.0 MiB | no data | 8.0 MiB | no data |" in text
    assert "By turn" not in text
    assert "Fidelity" not in text
    assert "nan" not in text


def test_report_of_nothing_yet(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [])
    text = report.write_report([folder], tmp_path / "out")[0].read_text(encoding="utf-8")
    assert "| model | smollm2 |" in text
    assert "No answers yet." in text


def test_a_torn_line_and_half_an_answer_are_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", answers("quest", 64, [1, 0]))
    with (folder / "records.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record("quest", 64, "halved", 1, turns=2)) + '\n{"suite": "ni')
    [run] = read_runs([folder])
    assert [one["id"] for one in run.records] == ["0", "1"]


def test_shards_and_modes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", answers("quest", 64, [1]), mode="multi_request")
    (folder / "records.jsonl").rename(folder / "records-1-of-2.jsonl")
    second = json.dumps(record("quest", 64, "another", 0)) + "\n"
    (folder / "records-2-of-2.jsonl").write_text(second, encoding="utf-8")
    [run] = read_runs([folder])
    assert [(one["suite"], one["id"]) for one in run.records] == [
        ("niah (multi request)", "0"),
        ("niah (multi request)", "another"),
    ]


def test_packed_records_are_read_like_others(tmp_path: Path) -> None:
    records = [*answers("full", None, [1, 1]), *answers("quest", 64, [1, 0])]
    plain, packed = write_run(tmp_path / "run", records), write_run(tmp_path / "packed", [])
    (packed / "records.jsonl.gz").write_bytes(gzip.compress((plain / "records.jsonl").read_bytes()))
    (packed / "records.jsonl").unlink()
    assert read_runs([packed])[0].records == read_runs([plain])[0].records
    (packed / "records.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match=r"records.jsonl.gz cannot be read \(Not a gzipped file"):
        read_runs([packed])


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good", answers("quest", 64, [1]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no run\.json"):
        read_runs([good, tmp_path / "empty"])
    with pytest.raises(InputError, match=r"good and copy both hold niah, passkey, 0, quest"):
        read_runs([good, write_run(tmp_path / "copy", answers("quest", 64, [1]))])
    with pytest.raises(InputError, match=r"differ in model \(other, smollm2\)"):
        read_runs([good, write_run(tmp_path / "other", answers("snapkv", 64, [1]), model="other")])
    broken = write_run(tmp_path / "broken", [])
    (broken / "records.jsonl").write_text("{}{}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"records\.jsonl, line 1 is no record"):
        read_runs([broken])
    with pytest.raises(InputError, match="cannot be written"):
        report.write_report([good], good / "run.json")


def test_matplotlib_is_asked_for_by_name(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install rocketkv\[eval\]"):
        report.write_report(folders, tmp_path / "out")


@pytest.mark.parametrize("text", ["a|b", "*bold* _it_ niah_single_1", "<script>", "[a](b) `c` \\ & #"])
def test_any_text_is_shown_to_the_letter(text: str) -> None:
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    page = Reader(parser.render(f"| a |\n| --- |\n| {escape(text)} |"))
    assert "".join(page.words).rstrip("\n").endswith("\n" + text)
