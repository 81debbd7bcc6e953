"""The command line as a user meets it: real processes for start-up and exits, the runner for the rest."""

import json
import os
import platform
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from typer.testing import CliRunner, Result

import rocketkv
from rocketkv import LayerCache, RocketKVConfig, disable
from rocketkv.backends import Spec, cpp
from rocketkv.cli import app
from rocketkv.commands.info import _meta_model
from rocketkv.hf.models import LoadedModel
from rocketkv.hf.session import _TimedStreamer
from rocketkv.selection import SELECTION_METHODS, Hybrid
from tiny import CONFIGS, save_tiny


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "80")

    def invoke(*arguments: str, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(app, arguments, input=stdin)

    return invoke


@pytest.fixture
def loaded(smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The real model, loaded once for all tests instead of once a command."""
    monkeypatch.setattr("rocketkv.hf.models.load", lambda name, dtype, weights: smollm2)
    yield smollm2
    disable(smollm2.model)


@pytest.fixture
def document(tmp_path: Path) -> str:
    path = tmp_path / "licence.txt"
    path.write_text(Path(__file__).parents[2].joinpath("LICENSE").read_text()[:4000])
    return str(path)


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from rocketkv.cli import app\n"
        "for command in ('', 'generate', 'chat', 'prefill', 'store', 'store list', 'budget', 'recommend', 'info',\n"
        "                'eval run', 'eval report', 'bench', 'bench attention', 'bench decode', 'bench prefill',\n"
        "                'bench reuse', 'bench memory'):\n"
        "    result = CliRunner().invoke(app, [*command.split(), '--help'])\n"
        "    assert result.exit_code == 0, result.output\n"
        "print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "[]", result.stderr


def test_budget_explains_the_split(run: Any) -> None:
    sizes = ("budget", "--seq-len", "131072", "--token-budget", "512")
    for more, parts, record in (
        ((), ("256.0 x", "4226 tokens", "26 of 128"), {"kept_tokens": 4226, "top_k": 385}),
        (
            ("--selection", "hybrid"),
            ("256.0 x", "3019", "1007 pages of 3", "65 of 128", "512 tokens' worth"),
            {"kept_tokens": 3019, "page_size": 3, "num_channels": 65, "top_k": 255},
        ),
        (
            ("--kv-dtype", "int8"),
            ("24 of 128", "672", "by these scores, int8", "508 tokens' worth"),
            {"kept_tokens": 6038, "top_k": 672},
        ),
    ):
        result = run(*sizes, *more)
        assert result.exit_code == 0
        for part in parts:
            assert part in result.stdout
        assert json.loads(run(*sizes, *more, "--json").stdout).items() >= record.items()
    assert "nothing is evicted" in run("budget", "--seq-len", "100").stdout
    assert "all are attended, by default (dense_below=512)" in run("budget", "--seq-len", "400").stdout
    dense = json.loads(run(*sizes, "--selection", "dense", "--json").stdout)
    assert dense["top_k"] == dense["kept_tokens"]
    assert "all" in run(*sizes, "--selection", "dense").stdout
    assert "did you mean hybrid?" in run(*sizes, "--selection", "hybird", "--kv-dtype", "int8").stderr


@pytest.mark.parametrize(
    ("command", "message", "way_out"),
    [
        ("budget --seq-len 5000 -t 10", "raise token_budget or lower window_size", "--token-budget 32"),
        ("budget --seq-len 5000 -t 10", "raise token_budget or lower window_size", "--window-size 10"),
        ("budget --seq-len 500 --selection exact --kv-dtype int8", "set kv_dtype='auto'", "--kv-dtype auto"),
        ("budget --seq-len 500 --new-tokens -1", "give 0 or more", "--new-tokens 0"),
        ("info -g smollm2-135m --selection exact --kv-dtype int8", "set kv_dtype='auto'", "--kv-dtype auto"),
    ],
)
def test_the_way_out_of_a_refusal_is_one_that_the_command_takes(
    run: Any, command: str, message: str, way_out: str
) -> None:
    refused = run(*command.split())
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert run(*command.split(), *way_out.split()).exit_code == 0


def test_bench_does_not_advise_an_option_that_it_has_not(run: Any) -> None:
    for command in ("attention", "decode", "prefill", "memory"):
        refused = run("bench", command, "-t", "512,10")
        assert refused.exit_code == 2
        assert "token_budget=10 is smaller than window_size=32" in refused.stderr
        assert refused.stderr.endswith("give a larger --token-budget.\n")


def test_info_tells_what_a_bug_report_needs(run: Any) -> None:
    facts = json.loads(run("info", "--json").stdout)
    assert {
        "rocketkv": rocketkv.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "kernels": cpp.instruction_set(),
        "model cache": HF_HUB_CACHE,
    }.items() <= facts.items()
    for name in ("torch", "transformers"):
        assert facts[name].startswith(f"{version(name)} (")
        assert "tested" in facts[name]
    shown = " ".join(run("info").stdout.split())
    for name in facts:
        assert f"{name} " in shown
    assert f"python {platform.python_version()} torch {version('torch')} (" in shown


@pytest.fixture
def describe(run: Any, tmp_path: Path) -> Any:
    """What `info` says of a tiny model's decode steps: its layers, and `backend="cpp"`."""

    def described(name: str, *options: str, **changes: Any) -> tuple[list[str], list[str]]:
        config = type(CONFIGS[name])(**CONFIGS[name].to_dict() | changes)
        config.save_pretrained(tmp_path)
        result = run("info", "--model", str(tmp_path), *options, "--json")
        assert result.exit_code == 0, result.output
        facts = json.loads(result.stdout)
        return facts["layers"], facts["backend=cpp"]

    return described


@pytest.fixture
def _kernels() -> None:
    if reason := cpp.decline(Spec("cpu", torch.float32, 64)):
        pytest.skip(reason)


@pytest.mark.usefixtures("_kernels")
def test_info_tells_which_way_decode_steps_go(describe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = "native kernels (cpp)"
    for mode in ("single_turn", "multi_turn"):
        assert describe("llama", "--mode", mode) == ([f"3 full-attention, head_dim=16: {fast}"], [fast])
    assert describe("llama", "--dtype", "bfloat16", "--kv-dtype", "int8")[1] == [fast]
    reference = "3 full-attention, head_dim=16: plain torch (backend=reference was chosen)"
    assert describe("llama", "--backend", "reference") == ([reference], [fast])
    assert describe("gemma3")[0] == [
        "1 sliding-window, head_dim=32: transformers' own cache, not compressed",
        f"2 full-attention, head_dim=32: {fast}",
    ]
    wide = "(cpp: head_dim=258 is more than 256)"
    assert describe("qwen3", head_dim=258) == (
        [f"3 full-attention, head_dim=258: plain torch {wide}"],
        [f"refused {wide}"],
    )
    assert describe("llama", dtype="float64")[1] == ["refused (cpp: it has no kernels for torch.float64)"]

    class Mine(Hybrid):
        scoring = "magic"  # type: ignore[assignment]  # none that a backend knows

    monkeypatch.setitem(SELECTION_METHODS, "mine", Mine)
    assert (
        "cpp: the selection method's scoring='magic' is none of dense, exact"
        in describe("llama", "--selection", "mine")[0][0]
    )


@pytest.mark.usefixtures("_kernels")
def test_info_tells_what_a_cache_does(describe: Any) -> None:
    for head_dim, is_fused in ((256, True), (258, False)):
        (layer,), _ = describe("qwen3", head_dim=head_dim)
        cache = LayerCache(RocketKVConfig(token_budget=64))
        prompt, token = torch.randn(1, 2, 100, head_dim), torch.randn(1, 2, 1, head_dim)
        cache.prefill(prompt, prompt, prompt)
        cache.decode(token, token, token)
        assert (cache.backend == "cpp") == is_fused == ("native kernels" in layer)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="elsewhere the kernels need no AVX2")
def test_info_on_a_cpu_without_avx2(tmp_path: Path) -> None:
    CONFIGS["llama"].save_pretrained(tmp_path)
    command = [sys.executable, "-m", "rocketkv", "info", "--model", str(tmp_path), "--json"]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    facts = json.loads(result.stdout)
    reason = "this CPU runs DEFAULT code only; the kernels need AVX2"
    assert facts["kernels"] == reason
    assert facts["kernel dtypes"] == facts["kernel head_dim"] == facts["kernel selection"] == "none"
    assert facts["layers"] == [f"3 full-attention, head_dim=16: plain torch (cpp: {reason})"]


@pytest.mark.usefixtures("_kernels")
def test_info_tells_what_the_kernels_take(run: Any) -> None:
    facts = json.loads(run("info", "--json").stdout)
    assert facts["kernel dtypes"] == "float32, bfloat16, float16"
    assert facts["kernel head_dim"] == "up to 256"
    assert facts["kernel selection"] == ", ".join(SELECTION_METHODS)
    result = run("info", "--geometry", "llama-3.1-8b")
    assert "32 full-attention, head_dim=128: native kernels (cpp)" in result.stdout
    assert _meta_model(None, "smollm2-135m", "auto").device.type == "meta"  # no memory for the weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-m", "/no/model"), "model '/no/model' is neither a folder nor a GGUF file"),
        (("-g", "x"), "geometry='x' does not exist"),
        (("-g", "qwen3-8b", "--selection", "hybird"), "selection='hybird' does not exist; did you mean hybrid?"),
        (("-g", "qwen3-8b", "--dtype", "int3"), "dtype='int3' does not exist"),
    ],
)
def test_info_refuses_what_does_not_exist(run: Any, options: tuple[str, ...], message: str) -> None:
    result = run("info", *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_generate_fast_gives_the_same_answer(run: Any, tmp_path: Path, document: str) -> None:
    save_tiny(tmp_path / "model")
    Path(document).write_text(Path(document).read_text()[:1000])
    arguments = ("generate", "-f", document, "-q", "What?", "-m", str(tmp_path / "model"), "-t", "64", "--json")
    plain, fast = (run(*arguments, "--max-new-tokens", "8", *extra) for extra in ((), ("--fast",)))
    assert fast.exit_code == 0, fast.output
    assert json.loads(fast.stdout)["rocketkv"]["text"] == json.loads(plain.stdout)["rocketkv"]["text"]


def test_generate_with_quantized_weights(run: Any, tmp_path: Path, document: str) -> None:
    save_tiny(tmp_path / "model", head_dim=32, intermediate_size=128)
    Path(document).write_text(Path(document).read_text()[:1000])
    arguments = ("generate", "-f", document, "-q", "What?", "-m", str(tmp_path / "model"), "-t", "64", "--json")
    result = run(*arguments, "--max-new-tokens", "8", "--weight-dtype", "int4")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rocketkv"]["new_tokens"] > 0


def test_generate_answers_and_compares(run: Any, loaded: LoadedModel, document: str) -> None:
    question = "What does the license say?"
    arguments = ("generate", "-f", document, "-q", question, "-t", "128", "--max-new-tokens", "6", "--compare")
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    for part in ("RocketKV t=128", "full cache", "held MiB", "read MiB"):
        assert part in result.stdout
    record = json.loads(run(*arguments, "--json").stdout)
    assert (record["model"], record["token_budget"]) == ("smollm2", 128)
    ours, full = record["rocketkv"], record["full_cache"]
    assert ours["prompt_tokens"] == full["prompt_tokens"] > 800
    assert ours["new_tokens"] == 6
    assert ours["text"] in result.stdout.replace("\n", " ") or ours["text"].split("\n")[0] in result.stdout
    assert ours["stats"]["total"]["read_bytes"] < full["stats"]["total"]["read_bytes"] / 4
    assert ours["stats"]["total"]["full_read_bytes"] == full["stats"]["total"]["read_bytes"]
    assert len(ours["stats"]["layers"]) == 30


def test_chat_keeps_history_and_obeys(run: Any, loaded: LoadedModel, document: str) -> None:
    stdin = "What is this?\n/stats\nAnd who wrote it?\n/nonsense\n/reset\n/stats\nWhat is this?\n/quit\n"
    result = run("chat", "-f", document, "-t", "128", "--max-new-tokens", "5", stdin=stdin)
    assert result.exit_code == 0, result.output
    assert "RocketKV-MT t=128" in result.stdout
    assert "There is no command /nonsense" in result.stdout
    assert "The conversation is forgotten" in result.stdout
    assert "Nothing was asked yet." in result.stdout
    assert run("chat", "-f", document, stdin="").exit_code == 0  # end of input quits


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that has Ctrl-C pressed when a method of the streamer is called for the n-th time."""

    def press(method: str, number: int) -> None:
        real, calls = getattr(_TimedStreamer, method), []

        def pressing(*given: Any) -> None:
            calls.append(None)
            if len(calls) == number:
                signal.raise_signal(signal.SIGINT)
            real(*given)

        monkeypatch.setattr(_TimedStreamer, method, pressing)

    return press


def test_an_interrupt_ends_the_answer_and_not_the_chat(
    run: Any, loaded: LoadedModel, tmp_path: Path, interrupt: Any
) -> None:
    (tmp_path / "text").write_text("Water is wet.")
    chat = ("chat", "-f", str(tmp_path / "text"), "-t", "128", "--max-new-tokens", "30")
    interrupt("put", 3)  # the prompt is put first: within the second token
    handler = signal.getsignal(signal.SIGINT)
    result = run(*chat, stdin="Tell a long story.\n/stats\nGo on.\n")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("Interrupted: the answer ends here, and stays in the conversation as it is.") == 1
    assert "RocketKV-MT t=128" in result.stdout
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_interrupted_prefill_says_that_the_conversation_is_forgotten(
    run: Any, loaded: LoadedModel, tmp_path: Path, interrupt: Any
) -> None:
    (tmp_path / "text").write_text("Water is wet.")
    interrupt("__init__", 2)
    result = run(
        "chat", "-f", str(tmp_path / "text"), "--max-new-tokens", "2", stdin="What?\nAnd?\n/stats\nWhat?\n/stats\n"
    )
    assert result.exit_code == 0, result.output
    forgotten = "Interrupted before the answer began: the conversation is forgotten; the document stays."
    assert forgotten in " ".join(result.stdout.split())
    assert result.stdout.count("Nothing was asked yet.") == 1
    assert result.stdout.count("RocketKV-MT") == 1


def test_an_interrupt_at_the_prompt_leaves(
    run: Any, loaded: LoadedModel, document: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rocketkv.commands.terminal.out.input", lambda prompt: signal.raise_signal(signal.SIGINT))
    result = run("chat", "-f", document)
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"


def test_chat_takes_no_document_from_where_its_questions_come(run: Any) -> None:
    result = run("chat", "-f", "-", stdin="What?\n")
    assert result.exit_code == 2
    assert "give a file instead" in result.stderr


def test_generate_reads_standard_input_and_samples(run: Any, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    arguments = (
        "generate",
        "-f",
        "-",
        "-q",
        "What?",
        "-m",
        str(tmp_path),
        "-t",
        "64",
        "--max-new-tokens",
        "8",
        "--json",
    )
    drawn = (*arguments, "--do-sample", "--temperature", "2", "--top-k", "50", "--top-p", "0.9", "--seed")
    text = "A text. " * 40

    def answer(*given: str) -> str:
        result = run(*given, stdin=text)
        assert result.exit_code == 0, result.output
        return str(json.loads(result.stdout)["rocketkv"]["text"])

    assert answer(*drawn, "1") == answer(*drawn, "1") != answer(*drawn, "2")
    assert answer(*arguments) == answer(*arguments, "--repetition-penalty", "1.0")
    result = run(*arguments, "--system", "Be brief.", stdin=text)
    assert "no chat template and so no system prompt" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--temperature 0.5", "--temperature 0.5 has no effect on greedy answers; add --do-sample or leave it out."),
        ("--seed 1", "--seed 1 has no effect on greedy answers"),
        ("--do-sample --temperature 0", "--temperature 0.0 is out of range; give a number above 0."),
        ("--do-sample --temperature nan", "--temperature nan is out of range"),
        ("--do-sample --temperature inf", "--temperature inf is out of range"),
        ("--do-sample --top-p 1.5", "--top-p 1.5 is out of range; give a number above 0 and at most 1."),
        ("--do-sample --top-k -1", "--top-k -1 is out of range; give 0 or more."),
        ("--do-sample --seed -1", "--seed -1 is out of range"),
        ("--repetition-penalty 0", "--repetition-penalty 0.0 is out of range"),
    ],
)
def test_sampling_options_that_make_no_sense_are_refused(run: Any, document: str, options: str, message: str) -> None:
    for command in (("generate", "-q", "What?"), ("chat",)):
        result = run(*command, "-f", document, *options.split())
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: {message}")


def test_version_and_short_help(run: Any) -> None:
    assert run("--version").stdout.startswith("rocketkv ")
    for command in ("", "generate", "eval", "eval run", "bench decode"):
        assert run(*command.split(), "-h").stdout == run(*command.split(), "--help").stdout != ""


def test_chat_survives_a_message_that_does_not_fit(run: Any, loaded: LoadedModel, document: str) -> None:
    stdin = f"What is this?\n{'too long ' * 9000}\nAnd now?\n"
    result = run("chat", "-f", document, "-t", "128", "--max-new-tokens", "3", stdin=stdin)
    assert result.exit_code == 0, result.output
    assert "leaves no room for an answer in the 8192 that the model was made for" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-t", "16"), "token_budget=16 is smaller than window_size=32; raise token_budget or lower window_size."),
        (("-f", "missing.txt"), "missing.txt cannot be read (No such file or directory)"),
        (("-f", "folder"), "folder cannot be read (Is a directory)"),
        (("-f", "binary.txt"), "binary.txt is not UTF-8 text (invalid start byte at byte 0)"),
        (("-f", "empty.txt"), "empty.txt is empty; give a file with text."),
        (("-m", "/no/model"), "model '/no/model' is neither a folder nor a GGUF file"),
        (("-m", "no-such-model"), "model 'no-such-model' cannot be loaded"),
        (("--dtype", "int3"), "dtype='int3' does not exist"),
        (("--weight-dtype", "int3"), "weight_dtype='int3' does not exist; choose from int8, int4."),
    ],
)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("A text.")
    Path("folder").mkdir()
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    Path("empty.txt").write_text(" \n")
    result = run("generate", "-f", "text.txt", "-q", "What?", *arguments)
    assert result.exit_code == 2
    assert "error: " + message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_a_text_longer_than_the_context_is_refused(run: Any, loaded: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("word " * 9000)
    result = run("generate", "-f", str(path), "-q", "What?")
    assert result.exit_code == 2
    assert "in the 8192 that the model was made for; give a shorter text or another model." in result.stderr


def test_an_error_in_a_real_process_leaves_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rocketkv", "generate", "-f", str(tmp_path / "missing"), "-q", "What?"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def in_a_shell(redirected: str) -> tuple[int, str]:
    """Exit code of `rocketkv` with these arguments and redirections, and all that it wrote to standard error."""
    command = f"{sys.executable} -m rocketkv {redirected}; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    return result.returncode, result.stderr


@pytest.mark.parametrize(
    ("redirected", "code", "message"),
    [
        ("--help > /dev/full", 2, "standard output cannot be written (No space left on device)"),
        ("budget --seq-len 5000 > /dev/full", 2, "standard output cannot be written (No space left on device)"),
        ("budget --seq-len 5000 --json > /dev/full", 2, "standard output cannot be written (No space left on device)"),
        ("budget --seq-len 5000 >&-", 2, "standard output is closed"),
        ("generate -f - -q What? <&-", 2, "standard input is closed"),
    ],
)
def test_a_stream_that_cannot_be_used_is_one_sentence(redirected: str, code: int, message: str) -> None:
    found, said = in_a_shell(redirected)
    assert found == code, said
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\x00", "is not UTF-8 text"), (b" \n", "is empty; give a file with text.")]
)
def test_standard_input_that_is_no_text_is_one_sentence(run: Any, content: bytes, message: str) -> None:
    result = run("generate", "-f", "-", "-q", "What?", stdin=content)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: standard input {message}")


@pytest.mark.parametrize("command", ["budget --seq-len 5000", "budget --seq-len 5000 --json", "eval run --help"])
def test_who_has_read_enough_may_go(command: str) -> None:
    assert in_a_shell(f"{command} | true") == (1, "")


def test_standard_error_that_cannot_be_written_changes_no_exit_code_to_success() -> None:
    assert in_a_shell("budget --seq-len 10 -t 1 2> /dev/full")[0] != 0
    assert in_a_shell("budget --seq-len 10 -t 1 2>&-")[0] != 0
