"""A conversation with a model over one cache: turns, streaming and timing."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import DynamicCache, PreTrainedModel, StoppingCriteria, StoppingCriteriaList, TextStreamer

from rocketkv.config import RocketKVConfig
from rocketkv.errors import InputError
from rocketkv.hf.cache import RocketKVCache, cache_stats
from rocketkv.hf.models import LoadedModel
from rocketkv.hf.switch import enable
from rocketkv.hf.text import PlainText
from rocketkv.hf.versions import pass_cache
from rocketkv.stats import CacheStats

OnText = Callable[[str], None]
OnLayer = Callable[[int, int], None]
Stopped = Callable[[], bool]


@dataclass(frozen=True)
class Answer:
    """One turn's answer.

    Attributes:
        text: the answer without special tokens.
        prompt_tokens: the number of tokens that the turn prefilled.
        new_tokens: the number of tokens generated, the end-of-turn token included.
        prefill_ms: the time from the call to the first token, in ms.
        decode_tokens_per_second: the rate of the tokens after the first; None if there was only one token.
        stats: what the cache stored and read at the end.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_ms: float
    decode_tokens_per_second: float | None
    stats: CacheStats


class Session:
    """Turns of one conversation, which share a cache.

    Args:
        loaded: the model, which is then enabled, and its tokenizer.
        config: the options of the compression; None uses transformers' own full cache.
        max_new_tokens: the largest number of tokens generated in a turn.
        system: the system prompt; None leaves the chat template's own, if it has one.
        sampling: options of transformers' `generate` that say how tokens are chosen; None chooses greedily.
        seed: the seed of random draws, the same for the n-th answer of every session; None leaves torch's state.

    Raises:
        InputError: there is a system prompt, but no chat template to put it into.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: RocketKVConfig | None,
        max_new_tokens: int,
        *,
        system: str | None = None,
        sampling: Mapping[str, Any] | None = None,
        seed: int | None = None,
    ) -> None:
        if system is not None and loaded.tokenizer.chat_template is None:
            raise InputError("this model has no chat template and so no system prompt; put it into the text instead.")
        self.loaded = loaded
        self.config = config
        self.max_new_tokens = max_new_tokens
        self.system = system
        self.sampling = {"do_sample": False, **(sampling or {})}
        self.seed = seed
        self._plain = PlainText(loaded.tokenizer)
        enable(loaded.model)
        self.reset()

    def reset(self) -> None:
        """Forget the conversation and empty the cache."""
        model_config = self.loaded.model.config
        self.cache: DynamicCache = (
            DynamicCache(config=model_config) if self.config is None else RocketKVCache(model_config, self.config)
        )
        self.messages: list[dict[str, str]] = []
        self._token_ids: list[int] = []  # every token that was prefilled or generated
        self._rendered = ""  # the rendered text of those tokens, without the last answer
        self._end_of_turn = ""  # the special token that ended the last answer, if one did

    def send(
        self,
        text: str,
        *,
        on_text: OnText | None = None,
        on_layer: OnLayer | None = None,
        stopped: Stopped | None = None,
    ) -> Answer:
        """Send a message to the model and return its answer.

        Args:
            text: the user's message; special tokens that are written out in it are text.
            on_text: a function that is called with each finished piece of the answer.
            on_layer: a function that is called with the number of layers prefilled so far and the number of all layers.
            stopped: a function that is called after each token; the answer ends where the function returns True.

        Returns:
            The answer. The conversation has grown by the message and the answer, also where the answer was stopped.
            Any exception during a generation, one of `on_text` too, resets the conversation.

        Raises:
            InputError: the conversation does not fit in the model's context or chat template; it stays as it was.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        rendered, new_ids = self._encode(messages)
        num_tokens, context = len(self._token_ids) + len(new_ids), self.loaded.context_length
        if num_tokens >= context:
            raise InputError(
                f"the conversation has {num_tokens} tokens and leaves no room for an answer in the {context} that "
                "the model was made for; give a shorter text or another model."
            )
        try:
            return self._generate(messages, rendered, new_ids, on_text, on_layer, stopped)
        except BaseException:  # the cache may have seen tokens that are not in the conversation
            self.reset()
            raise

    def _encode(self, messages: list[dict[str, str]]) -> tuple[str, list[int]]:
        """Render the conversation and encode the part that the cache has not seen."""
        tokenizer, hide = self.loaded.tokenizer, self._plain.hide
        has_template = tokenizer.chat_template is not None
        messages = [{**message, "content": hide(message["content"])} for message in messages]
        if has_template:
            if self.system is not None:
                messages.insert(0, {"role": "system", "content": hide(self.system)})
            try:
                rendered = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            except TemplateError as error:
                raise InputError(f"the model's chat template refuses this conversation ({error}).") from None
            if self.system is not None and hide(self.system.strip()) not in rendered:
                raise InputError(
                    "the model's chat template leaves the system prompt out; put it into the text instead."
                )
        else:  # a base model continues a text
            rendered = "".join(
                f"{m['content']}\n\nAnswer:" if m["role"] == "user" else f" {m['content']}\n\n" for m in messages
            )
        if not self.messages:
            return rendered, self._plain.encode(rendered, add_special_tokens=not has_template)
        answer = hide(self.messages[-1]["content"])
        start = rendered.find(answer, len(self._rendered))
        if not rendered.startswith(self._rendered) or start < 0:
            raise InputError(
                "this model's chat template rewrites earlier turns, so its cache cannot be continued; "
                "reset the conversation before each question."
            )
        rest = rendered[start + len(answer) :].removeprefix(self._end_of_turn)
        return rendered, self._plain.encode(rest)

    def _generate(
        self,
        messages: list[dict[str, str]],
        rendered: str,
        new_ids: list[int],
        on_text: OnText | None,
        on_layer: OnLayer | None,
        stopped: Stopped | None,
    ) -> Answer:
        model, tokenizer = self.loaded
        token_ids = self._token_ids + new_ids
        input_ids = torch.tensor([token_ids], device=model.device)
        streamer = _TimedStreamer(tokenizer, on_text)
        if self.seed is not None:
            torch.manual_seed(self.seed + len(self.messages))
        start = time.perf_counter()
        with torch.inference_mode(), prefill_progress(model, on_layer):
            output = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                **pass_cache(self.cache),
                max_new_tokens=min(self.max_new_tokens, self.loaded.context_length - len(token_ids)),
                stopping_criteria=StoppingCriteriaList([_Stop(stopped)] if stopped is not None else []),
                **self.sampling,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                streamer=streamer,
            )[0].tolist()
        answer = output[len(token_ids) :]
        text = tokenizer.decode(answer, skip_special_tokens=True).strip()
        self.messages = [*messages, {"role": "assistant", "content": text}]
        self._rendered, self._token_ids = rendered, output
        self._end_of_turn = (
            tokenizer.decode(answer[-1:]) if tokenizer.decode(answer[-1:], skip_special_tokens=True) == "" else ""
        )
        times = streamer.token_times
        return Answer(
            text=text,
            prompt_tokens=len(new_ids),
            new_tokens=len(answer),
            prefill_ms=1000 * (times[0] - start),
            decode_tokens_per_second=(len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None,
            stats=cache_stats(self.cache),
        )


class _TimedStreamer(TextStreamer):
    """Hands finished text on and records when each token came."""

    def __init__(self, tokenizer: object, on_text: OnText | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.token_times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.token_times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.on_text is not None:
            self.on_text(text)


class _Stop(StoppingCriteria):
    """Ends every row once a function returns True; it is called between two passes, so that no pass breaks off."""

    def __init__(self, stopped: Stopped) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.stopped(), dtype=torch.bool, device=input_ids.device)


@contextmanager
def prefill_progress(model: PreTrainedModel, on_layer: OnLayer | None) -> Iterator[None]:
    """Report each decoder layer of the first forward pass, where the decoder keeps its layers in `layers`."""
    layers = getattr(model.get_decoder(), "layers", None)
    if on_layer is None or layers is None:
        yield
        return
    handles: list[torch.utils.hooks.RemovableHandle] = []

    def report(index: int) -> None:
        on_layer(index + 1, len(layers))
        handles[index].remove()

    handles += [
        layer.register_forward_hook(lambda *_, index=index: report(index)) for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
