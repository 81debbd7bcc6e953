"""lm-eval's tasks through our cache: its own numbers where nothing is compressed, else a compressed cache's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rocketkv import disable
from rocketkv.errors import RocketKVError
from rocketkv.eval.data.haystack import default_text
from rocketkv.hf.models import LoadedModel

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
from rocketkv.eval import harness
from rocketkv.hf.versions import pass_cache

PROSE = default_text()
TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_choice: ['Paris', 'a long river in Asia', 'Berlin']\n"
    "doc_to_target: 0\nmetric_list: [{metric: acc}]",
    "write": "output_type: generate_until\ndoc_to_target: 'Paris'\ngeneration_kwargs: {until: ['.'], max_gen_toks: 8}\n"
    "metric_list: [{metric: exact_match}]",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_target: '{{text}}'\n"
    "metric_list: [{metric: word_perplexity}]",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make tasks over a local file, as users write them."""
    path = tmp_path_factory.mktemp("tasks")
    rows = [{"text": f"{PROSE[start : start + 1200]}\n\nThe capital of France is"} for start in (20_000, 60_000)]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rest in TASKS.items():
        text = "''" if name == "rolling" else "'{{text}}'"
        (path / f"{name}.yaml").write_text(
            f"task: rocketkv_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {path / 'rows.jsonl'}}}\n"
            f"test_split: train\ndoc_to_text: {text}\n{rest}\n"
        )
    return path


def evaluate(model: Any, folder: Path, names: list[str]) -> dict[str, list[Any]]:
    """Return the model's answers, task by task."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(
        model=model, tasks=[f"rocketkv_{name}" for name in names], task_manager=manager, bootstrap_iters=0,
        model_args=None if not isinstance(model, str) else {"method": "snapkv", "token_budget": 64},
    )  # fmt: skip
    return {name: [sample["filtered_resps"] for sample in found["samples"][f"rocketkv_{name}"]] for name in names}


@pytest.fixture(autouse=True)
def _restored(smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(harness, "load", lambda *_: smollm2)  # once for all tests
    yield
    disable(smollm2.model)


@pytest.mark.filterwarnings("default")  # what other packages warn of is not ours to mend
def test_without_compression_it_is_lm_evals_own_model(smollm2: LoadedModel, folder: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    plain = evaluate(HFLM(pretrained=smollm2.model, tokenizer=smollm2.tokenizer), folder, list(TASKS))
    ours = evaluate(harness.RocketKVLM(method="rocketkv", token_budget=4096), folder, list(TASKS))
    assert ours["write"] == plain["write"]
    for name in ("choice", "rolling"):
        for one, other in zip(ours[name], plain[name], strict=True):
            torch.testing.assert_close(torch.tensor(one).float(), torch.tensor(other).float(), rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("default")
def test_a_likelihood_is_of_tokens_decoded_from_a_compressed_cache(smollm2: LoadedModel, folder: Path) -> None:
    """The continuation's tokens go through `decode` one by one, after a prefill that has evicted."""
    from rocketkv import RocketKVCache, enable
    from rocketkv.eval.run.methods import method_config

    found = evaluate("rocketkv", folder, ["choice"])["choice"]
    row = json.loads((folder / "rows.jsonl").read_text().splitlines()[0])
    enable(smollm2.model)
    context = smollm2.tokenizer(row["text"]).input_ids
    for answer, choice in zip(found[0], ("Paris", "a long river in Asia", "Berlin"), strict=True):
        continuation = smollm2.tokenizer(f"{row['text']} {choice}").input_ids[len(context) :]
        cache, total, ids = RocketKVCache(smollm2.model.config, method_config("snapkv", 64)), 0.0, context
        for token in continuation:
            with torch.inference_mode():
                logits = smollm2.model(input_ids=torch.tensor([ids]), **pass_cache(cache)).logits[0, -1]
            total, ids = total + float(logits.log_softmax(-1)[token]), [token]
        assert answer[0] == pytest.approx(total, rel=1e-4)
        assert max(layer.cache.num_stored.max() for layer in cache.compressed_layers) == 64 + len(continuation) - 1


@pytest.mark.filterwarnings("default")
def test_what_cannot_be_run_is_refused(smollm2: LoadedModel) -> None:
    for options, message in [
        ({"method": "magic"}, "method 'magic' does not exist"),
        ({"token_budget": 8}, "token_budget=8 is smaller than window_size=32"),
    ]:
        with pytest.raises(RocketKVError, match=message):
            harness.RocketKVLM(**options)
    short = harness.RocketKVLM(max_length=4)
    with pytest.raises(
        RocketKVError, match="a continuation of 9 tokens leaves no room for its context in max_length=4"
    ):
        short._loglikelihood_tokens([(None, [1, 2], list(range(9)))])
