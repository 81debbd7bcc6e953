"""The prompt that every engine reads, and the model in the form that OpenVINO's exporter reads."""

import sys
from pathlib import Path
from typing import Any

QUESTION = "Who is the heroine of this story, and what is she like?"


def make_prompt(tokenizer: Any, text: str, question: str, num_tokens: int) -> list[int]:
    """Return a text's start and a question about it in the model's chat form, of exactly `num_tokens` tokens."""
    mark = "\0"
    messages = [{"role": "user", "content": f"{mark}\n\n{question}"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, after = (tokenizer(part, add_special_tokens=False).input_ids for part in rendered.split(mark))
    body = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    room = num_tokens - len(before) - len(after)
    if not 0 < room <= len(body):
        sys.exit(f"a prompt of {num_tokens} tokens cannot be made from a text of {len(body)}; change --prompt-tokens.")
    return [*before, *body[:room], *after]


def save_checkpoint(gguf: Path, folder: Path) -> None:
    """Write the model, dequantized, and its tokenizer as transformers keeps them."""
    from rocketkv.hf.models import load as load_model

    model, tokenizer = load_model(str(gguf), "float32")
    model.hf_quantizer = None  # transformers would refuse to save a GGUF model, although its weights are plain here
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
