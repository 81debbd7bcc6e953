"""`rocketkv recommend`: the advice as a function of figures, the passages, the command on a tiny and a real model."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from rocketkv import InputError, disable, enable
from rocketkv.cli import app
from rocketkv.eval.data.haystack import default_text
from rocketkv.eval.recommend import Measured, advise, cut_passages, find_budget, warn
from rocketkv.eval.run.fidelity import measure as measure_fidelity
from rocketkv.eval.run.fidelity import predict
from rocketkv.eval.run.methods import make_arms
from rocketkv.eval.run.passages import Passage
from rocketkv.eval.run.records import Case
from rocketkv.hf.models import LoadedModel, load
from tiny import save_tiny

TEXT = "".join(chr(97 + (i * i // 7) % 26) for i in range(1000))
SMALL = ("--length", "300", "--new-tokens", "8", "--budgets", "48,64")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder)
    return folder


@pytest.fixture
def run(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    Path("text.txt").write_text(TEXT)
    Path("short.txt").write_text(TEXT[:100])
    Path("empty.txt").write_text(" \n")

    def invoke(*arguments: str, stdin: str | None = None) -> Result:
        defaults = ("recommend", "-m", str(model_folder), "-f", "text.txt")
        return CliRunner().invoke(app, [*defaults, *arguments], input=stdin)

    return invoke


def figures(*agreements: float, oracle: float = 1.0, ratio: float = 1.0) -> list[Measured]:
    """Return figures for budgets from 128 on, each twice the one before."""
    return [Measured(128 << i, x, oracle, 0.02 * ratio, 0.02, 0.1) for i, x in enumerate(agreements)]


@pytest.mark.parametrize(
    ("agreements", "budget", "advice"),
    [
        (
            (0.91, 0.97, 0.98),
            256,
            "t = 256 keeps 97.0% of the full cache's next tokens; below that it falls: t = 128 keeps 91.0%.",
        ),
        ((0.98, 0.98), 128, "t = 128, the smallest budget measured, keeps 98.0% of the full cache's next tokens."),
        (
            (0.70, 0.80, 0.90),
            None,
            "no budget measured keeps 95% of the full cache's next tokens; t = 512 keeps 90.0%: try larger --budgets, "
            "or a lower --target.",
        ),
        (
            (0.70, 0.90, 0.905, 0.902),
            None,
            "no budget measured keeps 95% of the full cache's next tokens; t = 256 keeps 90.0%, and larger budgets "
            "gain less than 1% on that.",
        ),
        ((0.95,), 128, "t = 128, the smallest budget measured, keeps 95.0% of the full cache's next tokens."),
    ],
)
def test_the_advice(agreements: tuple[float, ...], budget: int | None, advice: str) -> None:
    assert find_budget(figures(*agreements), 0.95) == budget
    assert advise(figures(*agreements), 0.95) == advice


def test_a_large_gap_to_the_oracle_is_told() -> None:
    warning = warn(figures(0.80, 0.77, 0.86, oracle=0.87, ratio=4))
    assert warning is not None
    assert warning.startswith("at t = 256 the oracle keeps 87.0% and ours 77.0%: ")
    assert warn(figures(0.83, 0.84, oracle=0.87, ratio=4)) is None  # too few tokens to matter
    assert warn(figures(0.77, 0.77, oracle=0.87, ratio=2)) is None  # what a budget costs any method that reads no more


def test_passages_are_spread_and_start_as_the_model_expects() -> None:
    def tokenizer(text: str, *, add_special_tokens: bool = True, **_: Any) -> Any:
        return SimpleNamespace(input_ids=[1] * add_special_tokens + [10 + ord(x) for x in text])

    tokenizer.bos_token_id = 1  # type: ignore[attr-defined]
    tokenizer.all_special_tokens, tokenizer.added_tokens_decoder = [], {}  # type: ignore[attr-defined]
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    length, cut = cut_passages(tokenizer, TEXT, 2048, 50, 100, 3)  # type: ignore[arg-type]
    assert length == 100
    firsts = [0, 425, 850]
    assert cut == [[1, *ids[first : first + 150]] for first in firsts]
    for given, expected in (
        ({}, (950, 1)),
        ({"length": 900}, (900, 2)),
        ({"length": 901}, (901, 1)),
        ({"context_length": 600}, (550, 2)),
    ):
        length, cut = cut_passages(tokenizer, TEXT, **{"context_length": 8192, "new_tokens": 50, **given})  # type: ignore[arg-type]
        assert (length, len(cut)) == expected
        assert all(len(one) == length + 51 for one in cut)
    with pytest.raises(InputError, match="room for 2 passages of 900 and 50 tokens, not for 3"):
        cut_passages(tokenizer, TEXT, 8192, 50, 900, 3)  # type: ignore[arg-type]


def test_predictions_are_those_of_the_fidelity_suite(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rocketkv.eval.run.fidelity.STEPS", 8)
    loaded = load(str(model_folder))
    _, (token_ids,) = cut_passages(loaded.tokenizer, TEXT, 2048, 8, 300, 1)
    arms = make_arms(["rocketkv", "exact_topk"], [48])
    done: list[tuple[float, float]] = []
    enable(loaded.model)
    records = measure_fidelity(loaded, Passage(Case("text", "0", 300), token_ids), arms)
    free = predict(loaded, token_ids, 300, arms, lambda *step: done.append(step))
    assert [one.kl for one in free] == pytest.approx([record["kl"] for record in records])
    assert [one.agreement for one in free] == [record["agreement"] for record in records]
    assert (done[0], done[-1][1]) == ((0, 3 + 2 * 8), 3 + 2 * 8)
    assert done[-1][0] == pytest.approx(done[-1][1])


def test_the_command_prints_a_table_and_advice(run: Any) -> None:
    result = run(*SMALL)
    assert result.exit_code == 0, result.output
    assert "read per step" in result.stdout
    assert "of the full cache's next tokens" in result.stdout
    record = json.loads(run(*SMALL, "--samples", "3", "--json").stdout)
    assert set(record) == {
        "model", "dtype", "selection", "kv_dtype", "prompt_tokens", "new_tokens", "passages", "target", "budgets",
        "token_budget", "advice", "warning",
    }  # fmt: skip
    assert (record["prompt_tokens"], record["passages"], record["selection"]) == (300, 3, "lowbit")
    assert [set(one) for one in record["budgets"]] == [set(Measured._fields)] * 2
    assert [one["token_budget"] for one in record["budgets"]] == [48, 64]


def test_the_command_reads_standard_input_and_takes_other_methods(run: Any) -> None:
    options = ("-f", "-", "--selection", "hybrid", "--kv-dtype", "int8", "--new-tokens", "8", "--json")
    record = json.loads(run(*options, stdin=TEXT[:400]).stdout)
    assert (record["selection"], record["kv_dtype"], record["prompt_tokens"]) == ("hybrid", "int8", 391)
    assert [one["token_budget"] for one in record["budgets"]] == [128, 256]  # those that fit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-f", "missing.txt"), "missing.txt cannot be read (No such file or directory)"),
        (("-f", "empty.txt"), "empty.txt is empty"),
        (("-f", "-"), "standard input is empty"),
        (("-f", "short.txt"), "the text has 100 tokens, too few for a prompt of 2 and 128 tokens to decode"),
        (("-f", "short.txt", "--new-tokens", "4"), "a budget of 128 is not below the prompt's 95 tokens"),
        (("--length", "990"), "the text has 1000 tokens, too few for a prompt of 990 and 128 tokens to decode"),
        (("--length", "2000"), "length=2000 and 128 tokens to decode do not fit in the model's 2048 tokens"),
        (("--length", "300", "--budgets", "64,300"), "a budget of 300 is not below the prompt's 300 tokens"),
        (("--budgets", "8"), "token_budget=8 is smaller than window_size=32"),
        (("--budgets", "many"), "budgets='many' is no list of numbers"),
        (("--selection", "hybird"), "selection='hybird' does not exist; did you mean hybrid?"),
        (("--kv-dtype", "int3"), "kv_dtype='int3' does not exist"),
        (("--dtype", "int3"), "dtype='int3' does not exist"),
        (("-m", "/no/model"), "model '/no/model' is neither a folder nor a GGUF file"),
    ],
)
def test_a_mistake_is_one_sentence(run: Any, arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments, "--json", stdin="")
    assert result.exit_code == 2
    assert f"error: {message}" in result.stderr
    assert result.stdout == ""


def test_an_interruption_is_clean(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rocketkv.eval.recommend.predict", interrupted)
    result = run(*SMALL)
    assert result.exit_code == 130
    assert result.stderr.strip().endswith("interrupted")
    assert result.stdout == ""


def test_a_real_model_gives_sane_figures(run: Any, smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rocketkv.hf.models.load", lambda name, dtype, weights: smollm2)
    Path("prose.txt").write_text(default_text()[:8000])
    options = ("--length", "768", "--new-tokens", "24", "--budgets", "64,512", "--samples", "1", "--json")
    result = run("-m", "smollm2", "-f", "prose.txt", *options)
    disable(smollm2.model)
    assert result.exit_code == 0, result.output
    small, large = json.loads(result.stdout)["budgets"]
    assert small["kl"] > large["kl"] > 0
    assert small["oracle_kl"] > large["oracle_kl"] >= 0
    assert large["agreement"] >= 0.8
    assert large["oracle_agreement"] >= 0.9
    assert 64 / 800 * 0.7 < small["read_fraction"] < 64 / 768 * 1.1
