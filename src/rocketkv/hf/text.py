"""Encoding of text as text: no part of a document or a question is read as one of the tokens that rule a chat."""

import re
from itertools import groupby

from transformers import PreTrainedTokenizerBase

ESCAPE = "\U000f0000"  # from a private plane, where no script has letters; in a text it is escaped by itself


class PlainText:
    """Encodes text so that special tokens come from the chat template alone.

    A special token that is written out in a text, such as `<|im_end|>`, is hidden behind private characters before the
    template is put around the text. Stretches of text with such a token are then encoded without a look for special
    tokens; the other stretches are each encoded in one piece, template and all.

    Args:
        tokenizer: the model's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._special = list(dict.fromkeys([*tokenizer.all_special_tokens, *added]))
        longest_first = sorted(self._special, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # without any: matches nothing
        self._hidden = {text: ESCAPE + chr(ord(ESCAPE) + 1 + i) for i, text in enumerate([ESCAPE, *self._special])}
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
