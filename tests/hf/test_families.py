"""Every model type that transformers generates text with: right, or refused by name with a reason, by both doors."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from families import HYBRIDS, tiny_config
from rocketkv import RocketKVCache, RocketKVConfig, UnsupportedError, enable
from rocketkv.hf.versions import CACHE_ARGUMENT, pass_cache
from tiny import generate, prompts
from vision import MODELS as VISION

PAGE = Path(__file__).parents[2].joinpath("docs", "models.md").read_text(encoding="utf-8")

WORKS = """
    afmoe apertus apertus1p5_text arcee aria_text bamba bart beam bert bert-generation biogpt
    bitnet blenderbot blenderbot-small camembert codegen cohere cohere2 cohere2_moe ctrl cwm
    data2vec-text dots1 electra emu3 ernie ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe
    falcon_h1 flex_olmo flint fuyu gemma gemma2 gemma3 gemma3_text gemma4 gemma4_text gemma4_unified
    gemma4_unified_text glm glm4 glm4_moe gpt-sw3
    gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite granite_swa granitemoe granitemoe_swa
    granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax
    internlm3 iquestcoder jais2 jamba jetmoe kolibri1 laguna lfm2 lfm2_moe lfm3 llama marian
    mbart mellum mimo_v2_flash minimax_m2 minimax_m3_vl_text ministral ministral3 mistral
    mixtral moss_transcribe_diarize nanochat nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe opt
    pegasus persimmon phi phi3 phi4_multimodal phimoe plbart qwen2 qwen2_moe qwen3 qwen3_5
    qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next roberta roberta-prelayernorm
    roc_bert sarvam_moe seed_oss smollm3 solar_open starcoder2 vaultgemma whisper xlm-roberta
    xlm-roberta-xl zaya
"""

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
    "some of its layers share the cache of others": """
        gemma3n_text
    """,
}

# The sizes above do not make a configuration of theirs, or it needs a package.
NOT_TRIED = """
    cohere_compass_text dbrx dots3_note dots3_note_text gemma3n gemma4_assistant gemma4_unified_assistant
    mamba2 musicgen musicgen_melody reformer xlnet zamba zamba2
"""

# They bypass the attention interface in earlier versions of transformers, or warn.
SINCE_5_24 = """
    codegen gpt_bigcode gptj
"""

KINDS = [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in NOT_TRIED.split()]


def table() -> str:
    """Return the table of docs/models.md."""
    rows: dict[str, Iterable[str]] = {
        "A text, token for token as with a full cache, with a budget that holds it all": WORKS.split(),
        "Beside that: two turns of a padded batch, beams, a small budget, copies, files": HYBRIDS,
        "A text with an image: two turns of a padded batch, a small budget": VISION,
    }
    for pattern, kinds in REFUSED.items():
        reason = pattern.replace(r"\d+", "i").replace(r"a \w+", "something of its own").replace("\\", "")
        rows[f"Refused: {reason}"] = kinds.split()
    rows["Not tried: small sizes do not make such a model, or it needs a package"] = NOT_TRIED.split()
    lines = [f"| {what} | {', '.join(f'`{kind}`' for kind in kinds)} |" for what, kinds in rows.items()]
    return "\n".join(["| | types |", "|---|---|", *lines])


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_is_right_or_refused_by_name(kind: str) -> None:
    if kind in SINCE_5_24.split() and CACHE_ARGUMENT == "past_key_values":
        pytest.skip("an earlier transformers")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind)).eval()
    config = RocketKVConfig(token_budget=4096)
    ids, _ = prompts(40)
    if kind in WORKS.split():
        expected = generate(model, ids, new=6)
        enable(model)
        assert torch.equal(generate(model, ids, new=6, **pass_cache(RocketKVCache(model.config, config))), expected)
        return
    (reason,) = (reason for reason, kinds in REFUSED.items() if kind in kinds.split())
    for refused in (lambda: enable(model), lambda: RocketKVCache(model.config, config)):
        with pytest.raises(UnsupportedError, match=f" is not supported: {reason}; use it with transformers' own"):
            refused()


def test_every_type_has_its_place() -> None:
    listed = [*WORKS.split(), *NOT_TRIED.split(), *(kind for kinds in REFUSED.values() for kind in kinds.split())]
    assert len(listed) == len(set(listed))
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= set(listed)


def test_the_page_has_the_table() -> None:
    assert table() in PAGE, f"docs/models.md needs this table:\n{table()}"
