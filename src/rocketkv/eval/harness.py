"""Runs any task of lm-eval, EleutherAI's harness, with any of our methods, as `--model rocketkv`.

    python -m rocketkv.eval.harness --model rocketkv --model_args method=rocketkv,token_budget=256 --tasks ...

runs lm-eval's own command line with our model known to it. Versions of lm-eval that look for models in installed
packages find our model by themselves.
"""

import sys
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from rocketkv.errors import InputError, RocketKVError, UnsupportedError
from rocketkv.eval.run.generation import forward
from rocketkv.eval.run.methods import method_config
from rocketkv.hf import RocketKVCache
from rocketkv.hf.models import load
from rocketkv.hf.switch import enable
from rocketkv.hf.versions import pass_cache

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # lm-eval's cache key, context, continuation


@register_model("rocketkv")
class RocketKVLM(HFLM):
    """A model whose answers, and whose likelihoods, come from a compressed cache.

    A likelihood is measured as text is generated: the context is prefilled and compressed, then the continuation's
    tokens are decoded one by one. A task without a context (rolling likelihood) has nothing to compress at prefill;
    all of its text is decoded.

    Args:
        pretrained: as `--model` of the command line: a hub id, a folder, a GGUF file, `smollm2` or `gemma3-270m`.
        method: one of the names that `--methods` of `rocketkv eval run` takes.
        token_budget: see `RocketKVConfig`.
        dtype: a value of `--dtype`.
        weight_dtype: a value of `--weight-dtype`; None leaves the weights as they are.
        options: options of lm-eval's `HFLM`: `batch_size` (for generation; likelihoods run one by one), `max_length`,
            `add_bos_token` and so on.

    Raises:
        ConfigError: the budget or an option does not fit the method.
        InputError: there is no such model or method.
        UnsupportedError: another device than the model's is asked for.
    """

    def __init__(
        self,
        pretrained: str = "smollm2",
        method: str = "rocketkv",
        token_budget: int = 256,
        dtype: str = "auto",
        weight_dtype: str | None = None,
        **options: Any,
    ) -> None:
        config = method_config(method, token_budget)
        loaded = load(pretrained, dtype, weight_dtype)
        device = options.pop("device", None)  # lm-eval always passes a device
        if device is not None and torch.device(device).type != loaded.model.device.type:
            raise UnsupportedError(f"the model is on {loaded.model.device}, not on {device}; leave out --device.")
        super().__init__(pretrained=loaded.model, tokenizer=loaded.tokenizer, **options)
        enable(self.model)
        self.cache_config = config

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Generate as `HFLM` does, with a compressed cache."""
        cache = RocketKVCache(self.model.config, self.cache_config)
        generated: Tensor = super()._model_generate(context, max_length, stop, **pass_cache(cache), **options)
        return generated

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return log likelihoods of continuations, and whether each is the greedy one; prefill each context once."""
        found: dict[int, tuple[float, bool]] = {}
        cut = [(key, *self._cut(context, continuation)) for key, context, continuation in requests]
        order = sorted(range(len(cut)), key=lambda i: cut[i][1])
        with tqdm(total=len(cut), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for context, members in groupby(order, key=lambda i: cut[i][1]):
                cache = RocketKVCache(self.model.config, self.cache_config)
                logits = forward(self.model, cache, [context])
                for i in members:
                    key, _, continuation = cut[i]
                    found[i] = self._likelihood(cache.copy(), logits, continuation)
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, found[i])
                    bar.update()
        return [found[i] for i in range(len(cut))]

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Return both texts, the context without its first tokens where both are too long, as `HFLM` cuts them."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise InputError(
                f"a continuation of {len(continuation)} tokens leaves no room for its context in max_length="
                f"{self.max_length}; give a larger max_length."
            )
        return context[-room:], continuation

    def _likelihood(self, cache: RocketKVCache, logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
        """Return the log likelihood of the tokens that follow those seen by `cache`, whose last logits are `[1, V]`."""
        total, is_greedy = 0.0, True
        for place, token in enumerate(continuation):
            total += float(logits[0].float().log_softmax(-1)[token])
            is_greedy = is_greedy and int(logits[0].argmax()) == token
            if place < len(continuation) - 1:
                logits = forward(self.model, cache, [[token]])
        return total, is_greedy


def main() -> None:
    """Run lm-eval's own command line."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except RocketKVError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
