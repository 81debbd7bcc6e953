"""Every model type that transformers generates text with: right, or refused by name with a reason, by both doors."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from families import UNCOMPILED, WORKS, skip_before_5_24, tiny_config
from rocketkv import RocketKVCache, RocketKVConfig, UnsupportedError, backends, enable
from rocketkv.hf.versions import pass_cache
from tiny import EVERYTHING, SMALL, generate, prompts
from vision import MODELS as VISION

PAGE = Path(__file__).parents[2].joinpath("docs", "models.md").read_text(encoding="utf-8")

REFUSED = {  # by the sentence that says why
    "its attention bypasses transformers' attention interface": """
        bloom cpmant falcon got_ocr2 gpt_neo gpt_neox_japanese mpt mvp
        openai-gpt prophetnet rwkv trocr xglm xlm xlstm
    """,
    r"layer \d+ keeps a \w+, not plain keys and values": """
        deepseek_v4
    """,
    r"multi-head latent attention \(MLA\) caches no plain keys and values": """
        axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa
        hy_v4 kimi_linear longcat_flash minicpm3 sarvam_mla youtu
    """,
    "its attention is bidirectional unless its configuration has is_decoder=True": """
        big_bird megatron-bert rembert roformer xmod
    """,
    "it runs its layers several times over and caches each time anew": """
        dory hrm_text
    """,
    "its layers attend in chunks": """
        llama4 llama4_text
    """,
    "transformers' own cache cannot be made from its configuration": """
        blt
    """,
    "its attention is the difference of two": """
        diffllama
    """,
    "it adds a mask of its own, made from the values, to the attention logits": """
        doge
    """,
    "some of its layers attend to images only": """
        mllama
    """,
    "its decoder cannot be told apart from its head": """
        modernbert-decoder
    """,
    "its attention does not say how wide its window is": """
        moshi
    """,
    "its layers hand no options down to their attention": """
        nemotron stablelm
    """,
    "no layer of it attends to the whole text, so there is nothing to compress": """
        falcon_mamba lara_mini mamba recurrent_gemma
    """,
    "its attention adds position biases to the logits": """
        inkling2_loop_text inkling2_text inkling_text
    """,
    "its attention does not run as attn_implementation='sdpa'": """
        bigbird_pegasus git
    """,
    "it takes caches of its own class only": """
        minimax
    """,
    "its attention selects tokens by an index of its own": """
        qwen4_exp qwen4_exp_text
    """,
}

# The sizes above do not make a configuration of theirs, or it needs a package.
NOT_TRIED = """
    cohere_compass_text dbrx dots3_note dots3_note_text gemma3n gemma4_assistant gemma4_unified_assistant
    mamba2 musicgen musicgen_melody reformer xlnet zamba zamba2
"""

# Their recurrent states start anew at each prompt, so that a second one is refused; see `test_hybrids.py`.
ONE_TURN = """
    jamba
"""

# They count positions by columns, so that the answers of transformers itself depend on the padding of a row.
COUNTS_COLUMNS = """
    bart blenderbot blenderbot-small marian mbart moss_transcribe_diarize pegasus plbart whisper
"""

SIXTEEN = RocketKVConfig(dense_below=0, token_budget=16, **SMALL)
MORE = prompts(9, 9, seed=1)[0]


def marks(kind: str) -> str:
    """Return the cells of a type that works, without its name."""
    reason = next((reason for reason, kinds in UNCOMPILED.items() if kind in kinds.split()), None)
    sees = "vision_config" in CONFIG_MAPPING[kind].sub_configs
    image = "yes" if kind in VISION else "not tried" if sees else ""
    turns = "refused" if kind in ONE_TURN.split() else "yes"
    return f"yes | {turns} | yes | {'yes' if reason is None else f'no: {reason}'} | {image}"


def table() -> str:
    """Return the tables of docs/models.md: what works, column by column, and what is refused, by the reason."""
    works: dict[str, list[str]] = {}
    for kind in dict.fromkeys([*WORKS.split(), *VISION]):
        works.setdefault(marks(kind), []).append(kind)
    rest: dict[str, Iterable[str]] = {}
    for pattern, kinds in REFUSED.items():
        reason = pattern.replace(r"\d+", "i").replace(r"a \w+", "something of its own").replace("\\", "")
        rest[f"Refused: {reason}"] = kinds.split()
    rest["Not tried: small sizes do not make such a model, or it needs a package"] = NOT_TRIED.split()
    lines = ["| text | turns | beams | compiled | image | types |", "|---|---|---|---|---|---|"]
    lines += [f"| {cells} | {_names(kinds)} |" for cells, kinds in sorted(works.items(), key=lambda row: -len(row[1]))]
    lines += ["", "| | types |", "|---|---|", *(f"| {what} | {_names(kinds)} |" for what, kinds in rest.items())]
    return "\n".join(lines)


def _names(kinds: Iterable[str]) -> str:
    return ", ".join(f"`{kind}`" for kind in kinds)


def turns(model: PreTrainedModel, cache: Cache, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Return the texts `[B, L]` after each turn of a conversation, of two turns if the type takes a second one."""
    texts = [generate(model, ids, mask, new=3, **pass_cache(cache))]
    if model.config.model_type not in ONE_TURN.split():
        longer = torch.cat([mask, mask.new_ones(len(mask), 3 + MORE.shape[1])], 1)
        texts.append(generate(model, torch.cat([texts[0], MORE], 1), longer, new=3, **pass_cache(cache)))
    return texts


@pytest.mark.parametrize("kind", WORKS.split())
def test_a_family_answers_as_with_a_full_cache_and_alike_by_any_backend(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_before_5_24(kind)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind)).eval()
    ids, mask = prompts(40, 25)
    answers = []
    for new_cache in (lambda: DynamicCache(config=model.config), lambda: RocketKVCache(model.config, EVERYTHING)):
        texts = turns(model, new_cache(), ids, mask)
        answers.append([*texts, generate(model, ids, mask, new=3, num_beams=2, **pass_cache(new_cache()))])
        enable(model)
    assert all(torch.equal(*pair) for pair in zip(*answers, strict=True))

    def small(rows: Tensor, rows_mask: Tensor) -> Tensor:
        return generate(model, rows, rows_mask, new=4, **pass_cache(RocketKVCache(model.config, SIXTEEN)))

    batch = small(ids, mask)
    if kind not in COUNTS_COLUMNS.split():
        assert torch.equal(small(ids[1:, 15:], mask[1:, 15:]), batch[1:, 15:])
    monkeypatch.setattr(backends, "BACKENDS", ())
    assert torch.equal(small(ids, mask), batch)


@pytest.mark.parametrize(
    ("kind", "reason"), [(kind, reason) for reason, kinds in REFUSED.items() for kind in kinds.split()]
)
def test_other_families_are_refused_by_name_with_a_reason(kind: str, reason: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind)).eval()
    for refused in (lambda: enable(model), lambda: RocketKVCache(model.config, EVERYTHING)):
        with pytest.raises(UnsupportedError, match=f" is not supported: {reason}; use it with transformers' own"):
            refused()


def test_every_type_has_its_place() -> None:
    listed = [*WORKS.split(), *NOT_TRIED.split(), *(kind for kinds in REFUSED.values() for kind in kinds.split())]
    assert len(listed) == len(set(listed))
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= set(listed)


def test_the_page_has_the_table() -> None:
    assert table() in PAGE, f"docs/models.md needs this table:\n{table()}"
