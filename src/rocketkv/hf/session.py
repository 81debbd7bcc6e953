"""A conversation with a model over one cache: turns, streaming and timing."""

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList, TextStreamer

from rocketkv.config import RocketKVConfig
from rocketkv.errors import CacheFileError, InputError
from rocketkv.hf.cache import RocketKVCache
from rocketkv.hf.history import UNKNOWN
from rocketkv.hf.models import LoadedModel
from rocketkv.hf.plain import cache_stats
from rocketkv.hf.progress import OnLayer, prefill_progress
from rocketkv.hf.store import PrefixStore
from rocketkv.hf.switch import enable
from rocketkv.hf.text import PlainText
from rocketkv.hf.versions import pass_cache
from rocketkv.stats import CacheStats

OnText = Callable[[str], None]
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
        if not self.messages and self._token_ids:
            text = f"\n\n{text}"  # after the document
        messages = [*self.messages, {"role": "user", "content": text}]
        rendered, new_ids = self._encode(messages)
        self._check_room(len(self._token_ids) + len(new_ids))
        try:
            return self._generate(messages, rendered, new_ids, on_text, on_layer, stopped)
        except BaseException:  # the cache may have seen tokens that are not in the conversation
            self.reset()
            raise

    def read(self, document: str, *, store: PrefixStore | None = None, on_layer: OnLayer | None = None) -> int:
        """Begin the conversation with a document, which the cache takes in before a question comes.

        The message of the next `send` follows the document, after an empty line. What was said before is forgotten.

        Args:
            document: the text; special tokens that are written out in it are text.
            store: where the document is looked for, and put if it was not there; the session's cache is then one of the
                store, which compresses as the store says.
            on_layer: called with the layers prefilled so far and their number.

        Returns:
            The tokens that the model took in: all of the document's, or those that the store did not have.

        Raises:
            InputError: the document leaves no room in the model's context, or does not fit its chat template.
        """
        self.reset()
        head, rendered = self._before_document()
        ids = self._plain.encode(head + self._plain.hide(document), add_special_tokens=not self._has_template)
        self._check_room(len(ids))
        if store is not None:
            self.cache, self.config = store.get(torch.tensor([[*ids, UNKNOWN]])), store.config
        num_new: int = len(ids) - self.cache.get_seq_length()
        if num_new > 0:
            model = self.loaded.model
            input_ids = torch.tensor([ids[-num_new:]], device=model.device)
            with torch.inference_mode(), prefill_progress(model, on_layer):
                model.get_decoder()(input_ids=input_ids, **pass_cache(self.cache))
            if isinstance(self.cache, RocketKVCache):
                self.cache.end_turn()
                if store is not None:
                    try:
                        store.put(self.cache)
                    except CacheFileError as error:  # the answer needs no file
                        warnings.warn(str(error), stacklevel=2)
        self._token_ids, self._rendered = ids, rendered
        return num_new

    def resume(self, cache: RocketKVCache) -> None:
        """Begin the conversation with a cache that has seen a document, as `read` leaves it; see there.

        Raises:
            InputError: the cache has several rows, or padding.
        """
        if cache.history.num_rows != 1 or cache.history.mask is not None:
            raise InputError("a conversation has one row without padding; give a cache that has one.")
        self.reset()
        self.cache, self.config = cache, cache.config
        self._token_ids, self._rendered = cache.history.ids[0].tolist(), self._before_document()[1]

    def _before_document(self) -> tuple[str, str]:
        """Return what the template puts before the first message, alone and with the document's stand-in after it."""
        head, found, _ = self._render([{"role": "user", "content": ""}], self._plain.document).partition(
            self._plain.document
        )
        if not found:
            raise InputError("the model's chat template rewrites a document; put it into the question instead.")
        return head, head + found

    @property
    def _has_template(self) -> bool:
        return self.loaded.tokenizer.chat_template is not None

    def _render(self, messages: list[dict[str, str]], document: str) -> str:
        """Return the hidden text of a conversation whose first message begins with the document's stand-in, or not."""
        hidden = [{**message, "content": self._plain.hide(message["content"])} for message in messages]
        hidden[0]["content"] = document + hidden[0]["content"]
        return self._plain.render(hidden, self.system)

    def _encode(self, messages: list[dict[str, str]]) -> tuple[str, list[int]]:
        """Render the conversation and encode the part that the cache has not seen."""
        has_document = self._plain.document in self._rendered
        rendered = self._render(messages, self._plain.document if has_document else "")
        start = len(self._rendered)
        if self.messages:
            answer = self._plain.hide(self.messages[-1]["content"])
            found = rendered.find(answer, start)
            start = -1 if found < 0 else found + len(answer)
        if start < 0 or not rendered.startswith(self._rendered):
            raise InputError(
                "this model's chat template rewrites earlier turns, so its cache cannot be continued; "
                "reset the conversation before each question."
            )
        rest = rendered[start:].removeprefix(self._end_of_turn)
        is_beginning = not self._token_ids
        return rendered, self._plain.encode(rest, add_special_tokens=is_beginning and not self._has_template)

    def _check_room(self, num_tokens: int) -> None:
        """Refuse a conversation that leaves no room for an answer."""
        context = self.loaded.context_length
        if num_tokens >= context:
            raise InputError(
                f"the conversation has {num_tokens} tokens and leaves no room for an answer in the {context} that "
                "the model was made for; give a shorter text or another model."
            )

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
