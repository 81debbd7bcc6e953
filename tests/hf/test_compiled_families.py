"""Tests of the compiled decode step of every type that works: the column "compiled" of docs/models.md.

Torch traces each step, through AOTAutograd, and runs the graph operation by operation; what could go wrong with a type
goes wrong there. Tracing takes a second for each type, so that `make test` tries two that are left uncompiled, and
`test_fast.py` five that are not; `make test-compiled` tries all.
"""

import os
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

import rocketkv
from families import UNCOMPILED, WORKS, skip_before_5_24, tiny_config
from rocketkv import RocketKVCache, RocketKVConfig
from rocketkv.hf.versions import pass_cache
from tiny import SMALL, prompts
from vision import MODELS as VISION
from vision import seeing_model, seen_prompt

ALL = dict.fromkeys([*WORKS.split(), *VISION])
KINDS = list(ALL) if os.environ.get("ROCKETKV_TEST_FAMILIES") == "all" else ["bart", "ctrl"]
SIXTEEN = RocketKVConfig(dense_below=0, token_budget=16, **SMALL)


@pytest.mark.usefixtures("uncompiled_graph")
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_compiled_step_gives_the_logits_of_an_uncompiled_one(kind: str) -> None:
    skip_before_5_24(kind)
    torch._dynamo.reset()
    counters.clear()
    if kind in WORKS.split():
        torch.manual_seed(0)
        model, (ids, mask) = AutoModelForCausalLM.from_config(tiny_config(kind)).eval(), prompts(40, 25)
        image = {}
    else:
        model, (ids, mask, image) = seeing_model.__wrapped__(kind), seen_prompt(kind, 40, 25)
    rocketkv.enable(model)
    options: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    outputs = []
    for _ in range(2):
        warns = outputs and kind in UNCOMPILED["torch cannot trace it"].split()
        with pytest.warns(UserWarning, match="cannot be compiled and goes on uncompiled") if warns else nullcontext():
            cache = pass_cache(RocketKVCache(model.config, SIXTEEN))
            outputs.append(model.generate(ids, attention_mask=mask, max_new_tokens=4, **options, **image, **cache))
        rocketkv.compile(model)
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=1e-4, atol=1e-4)
    is_left = any(kind in kinds.split() for kinds in UNCOMPILED.values())
    assert int(counters["stats"]["unique_graphs"]) == (0 if is_left else 1)
