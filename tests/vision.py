"""Tiny random models that see, and prompts with one image of theirs: pixels and the tokens that stand for them."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel

from rocketkv import enable
from tiny import prompts

IMAGE, VIDEO, START, END = 120, 121, 122, 123  # token ids
TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
QWEN: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
PIXELS = {"pixel_values": (1, 3, 16, 16)}  # an image, of 16 patches in a square
MANY_PIXELS = {"pixel_values": (1, 1, 3, 16, 16)}
GRID = {"pixel_values": (16, 96)}  # the patches of an image, 3 * 2 * 4 * 4 numbers each

# By model_type: the text model's type and options, those of the vision tower, those of the whole, the shapes of an
# image, and the number of tokens that it takes.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any], int]] = {
    "llava": ("llama", {}, {**SMALL_VISION, "model_type": "clip_vision_model"}, {"image_seq_length": 16}, PIXELS, 16),
    "smolvlm": ("llama", {}, SMALL_VISION, {"scale_factor": 2}, MANY_PIXELS, 4),
    "idefics3": ("llama", {}, SMALL_VISION, {"scale_factor": 2}, MANY_PIXELS, 4),
    "qwen2_vl": (
        "qwen2_vl_text",
        {"rope_parameters": MROPE},
        {**QWEN, "embed_dim": 32, "hidden_size": 64},
        {},
        GRID,
        4,
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl_text",
        {"rope_parameters": MROPE},
        {**QWEN, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "fullatt_block_indexes": [1]},
        {},
        GRID,
        4,
    ),
    "qwen3_vl": (
        "qwen3_vl_text",
        {"rope_parameters": MROPE},
        {
            **QWEN,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
        {},
        GRID,
        4,
    ),
    "internvl": (
        "qwen2",
        {},
        {**SMALL_VISION, "image_size": (16, 16), "patch_size": (4, 4)},
        {"image_seq_length": 4},
        PIXELS,
        4,
    ),
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
            "initializer_range": 0.5,
        },
        {**SMALL_VISION, "model_type": "siglip_vision_model"},
        {"mm_tokens_per_image": 16, "tie_word_embeddings": False},
        {**PIXELS, "token_type_ids": None},
        16,
    ),
    "gemma4": (
        "gemma4_text",
        {
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 128,
            "use_bidirectional_attention": "vision",  # in sliding windows only
        },
        {**SMALL_VISION, "num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 2},
        {"audio_config": None, "tie_word_embeddings": False},
        {"pixel_values": (1, 16, 48), "image_position_ids": None, "mm_token_type_ids": None},
        4,
    ),
    "mistral3": (
        "mistral",
        {"sliding_window": None},
        {**SMALL_VISION, "head_dim": 16, "model_type": "pixtral"},
        {"spatial_merge_size": 2},
        {**PIXELS, "image_sizes": None},
        4,
    ),
}


@cache
def seeing_model(kind: str) -> PreTrainedModel:
    """Return the enabled random model of this type; tests share it, and must leave it as it is."""
    text_type, text, vision, options, _, _ = MODELS[kind]
    config_class = CONFIG_MAPPING[kind]
    names = {"image_token_id": IMAGE, "image_token_index": IMAGE, "video_token_id": VIDEO}
    names |= {"vision_start_token_id": START, "vision_end_token_id": END}
    known = {name: value for name, value in names.items() if hasattr(config_class(), name)}
    config = config_class(
        text_config={**TEXT, **text, "model_type": text_type}, vision_config=vision, pad_token_id=0, **known, **options
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("mm_input_projection_weight"):  # zeros, which tell nothing of an image
            torch.nn.init.normal_(weight)
    return enable(model)


def seen_prompt(kind: str, *lengths: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return left-padded prompts of these lengths with an image each, their mask, and what else the model takes."""
    *_, shapes, num_tokens = MODELS[kind]
    ids, mask = prompts(*lengths)
    ids = ids.clamp(max=IMAGE - 1)
    start = ids.shape[1] - min(lengths) + 3
    ids[:, start : start + num_tokens] = IMAGE
    generator = torch.Generator().manual_seed(1)
    inputs: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if shape is not None:
            parts = [torch.randn(shape, generator=generator) for _ in lengths]
            inputs[name] = torch.cat(parts)
    if shapes is GRID:
        ids[:, start - 1], ids[:, start + num_tokens] = START, END
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * len(lengths))
        inputs["mm_token_type_ids"] = (ids == IMAGE).to(torch.int64)
    for name in shapes:
        if name.endswith("token_type_ids"):
            inputs[name] = (ids == IMAGE).to(torch.int64)
    if "image_position_ids" in shapes:
        square = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).view(1, 16, 2)
        inputs["image_position_ids"] = square.repeat(len(lengths), 1, 1)
    if "image_sizes" in shapes:
        inputs["image_sizes"] = torch.tensor([[16, 16]] * len(lengths))
    return ids, mask, inputs
