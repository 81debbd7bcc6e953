"""Encoding of text as text: no part of a document or a question is read as one of the tokens that rule a chat."""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rocketkv.errors import InputError

ESCAPE = "\U000f0000"  # from a private plane, where no script has letters; in a text it is escaped by itself


class PlainText:
    """Encodes text so that special tokens come from the chat template alone.

    A special token that is written out in a text, such as `<|im_end|>`, is hidden behind private characters before the
    template is put around the text. Stretches of text with such a token are then encoded without a look for special
    tokens; the other stretches are each encoded in one piece, template and all.

    Args:
        tokenizer: the model's tokenizer.

    Attributes:
        tokenizer: as given.
        document: two private characters that stand for a text whose tokens are known already.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._special = list(dict.fromkeys([*tokenizer.all_special_tokens, *added]))
        longest_first = sorted(self._special, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # without any: matches nothing
        self._hidden = {text: ESCAPE + chr(ord(ESCAPE) + 1 + i) for i, text in enumerate([ESCAPE, *self._special])}
        self.document = ESCAPE + chr(ord(ESCAPE) + 1 + len(self._hidden))
        self._shown = {hidden: text for text, hidden in self._hidden.items()}

    @property
    def start(self) -> list[int]:
        """The token ids that the tokenizer puts before a text, such as a first token; perhaps none."""
        text, alone = (self.tokenizer("a", add_special_tokens=added).input_ids for added in (True, False))
        return list(text[: text.index(alone[0])])

    def hide(self, text: str) -> str:
        """Return the text with every special token, and every `ESCAPE`, as two private characters."""
        text = text.replace(ESCAPE, self._hidden[ESCAPE])
        return self._control.sub(lambda found: self._hidden[found[0]], text)

    def show(self, text: str) -> str:
        """Return the text that `hide` was given."""
        return re.sub(f"{ESCAPE}.", lambda found: self._shown[found[0]], text, flags=re.DOTALL)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Return the token ids of a hidden text, or a part of one, with or without the chat template around it.

        Args:
            text: the text as `hide` returned it.
            add_special_tokens: whether to add the tokens that the tokenizer puts around a text, such as a first one.
        """
        token_ids: list[int] = []
        parts = re.split(f"({self._control.pattern})", text)
        for is_hidden, stretch in groupby(parts, key=lambda part: ESCAPE in part):
            token_ids += self.tokenizer(
                self.show("".join(stretch)),
                add_special_tokens=add_special_tokens and not token_ids,
                split_special_tokens=is_hidden,
            ).input_ids
        return token_ids

    def render(self, messages: Sequence[Mapping[str, str]], system: str | None) -> str:
        """Return a conversation in the model's chat template, or as a text to continue if the model has none.

        Args:
            messages: hidden texts by role, `user` and `assistant` in turn.
            system: the system prompt, not hidden yet; None leaves the template's own.

        Raises:
            InputError: the template refuses the conversation, or leaves the system prompt out.
        """
        if self.tokenizer.chat_template is None:  # a base model continues a text
            return "".join(
                f"{m['content']}\n\nAnswer:" if m["role"] == "user" else f" {m['content']}\n\n" for m in messages
            )
        if system is not None:
            messages = [{"role": "system", "content": self.hide(system)}, *messages]
        try:
            rendered = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise InputError(f"the model's chat template refuses this conversation ({error}).") from None
        if system is not None and self.hide(system.strip()) not in rendered:
            raise InputError("the model's chat template leaves the system prompt out; put it into the text instead.")
        return rendered
