"""Planted facts: a sentence with a number is hidden in prose and asked for, in chat form, as in RULER's single needle.

One prefill serves all: a prompt's text runs through the model once, into an archive; every method then takes in the
last `window_size` tokens itself, which is all that stage 1 looks at, and decodes as it would have alone.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import torch

from rocketkv.config import RocketKVConfig
from rocketkv.errors import InputError
from rocketkv.eval.methods import method_config
from rocketkv.hf import RocketKVCache, enable
from rocketkv.models import LoadedModel

KEYS = (
    "amber",
    "basalt",
    "cedar",
    "dahlia",
    "ember",
    "falcon",
    "garnet",
    "harbor",
    "indigo",
    "juniper",
    "kestrel",
    "lagoon",
)
NEEDLE = "One of the special magic numbers for {key} is: {number}."
QUESTION = "What is the special magic number for {key} mentioned in the provided text?"
PREFIX = "The special magic number for {key} mentioned in the provided text is"
NEW_TOKENS = 12


@dataclass(frozen=True)
class Method:
    """A method at a budget with its pins, `None` for the defaults."""

    name: str
    token_budget: int
    pins: tuple[int, int] | None = None

    @property
    def label(self) -> str:
        """How tables and records name it."""
        return self.name if self.pins is None else f"{self.name} {self.pins[0]}/{self.pins[1]}"

    def config(self) -> RocketKVConfig:
        """Its configuration, multi-turn, so that it can start from a shared prefill."""
        pins = {} if self.pins is None else {"sink_tokens": self.pins[0], "recent_tokens": self.pins[1]}
        return method_config(self.name, self.token_budget, mode="multi_turn", **pins)


@dataclass(frozen=True)
class Row:
    """One case under one method: what a record file holds, a JSON object a line.

    `source` names model, text and number of cases: results of another source are not resumed.
    """

    source: str
    length: int
    case: int
    depth: float
    method: str
    token_budget: int
    found: bool
    answer: str


def default_text() -> str:
    """Prose that every Python install has: the topics of its help system, about half a megabyte."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def take_prose(loaded: LoadedModel, text: str, length: int, generator: random.Random) -> str:
    """`length` tokens of `text` from a random place on.

    Raises:
        InputError: the text is too short.
    """
    start = generator.randrange(max(1, len(text) - 8 * length))
    ids = loaded.tokenizer(text[start : start + 8 * length], add_special_tokens=False).input_ids
    if len(ids) < length:
        raise InputError(f"the text has {len(ids)} tokens, fewer than length={length}; give a longer one.")
    return str(loaded.tokenizer.decode(ids[:length]))


def make_prompt(loaded: LoadedModel, text: str, length: int, case: int, cases: int) -> tuple[list[int], str, float]:
    """One case's prompt of about `length` tokens of text, the number to find and its depth from 0 to 1.

    Raises:
        InputError: the text is too short or the prompt too long for the model.
    """
    tokenizer = loaded.tokenizer
    generator = random.Random(1000 * length + case)
    key, number = generator.choice(KEYS), str(generator.randrange(1_000_000, 10_000_000))
    depth = case / max(1, cases - 1)
    words = take_prose(loaded, text, length, generator).split(" ")
    place = int(depth * len(words))
    prose = " ".join([*words[:place], NEEDLE.format(key=key, number=number), *words[place:]])
    content = (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the number afterwards.\n\n{prose}\n\n{QUESTION.format(key=key)}"
    )
    rendered = content + "\n\n"
    if tokenizer.chat_template is not None:
        message = {"role": "user", "content": content}
        rendered = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(rendered + PREFIX.format(key=key), add_special_tokens=False).input_ids
    if len(prompt) + NEW_TOKENS > loaded.context_length:
        raise InputError(f"length={length} does not fit in the model's {loaded.context_length} tokens; give less.")
    return prompt, number, depth


def prefill_shared(loaded: LoadedModel, prompt: Sequence[int], window_size: int) -> RocketKVCache:
    """A cache that has seen all of `prompt` but its last `window_size` tokens, uncompressed, to fork from."""
    config = method_config("full", token_budget=1, mode="multi_turn")
    cache = RocketKVCache(loaded.model.config, config)
    with torch.inference_mode():
        loaded.model(input_ids=torch.tensor([prompt[:-window_size]]), past_key_values=cache, logits_to_keep=1)
    return cache


def answer(loaded: LoadedModel, prompt: Sequence[int], cache: RocketKVCache) -> str:
    """Greedy continuation of `prompt`, whose first tokens `cache` has seen."""
    input_ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = loaded.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            past_key_values=cache,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=loaded.tokenizer.eos_token_id,
        )
    return str(loaded.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))


def describe_source(model: str, text: str, cases: int) -> str:
    """What a result depends on beside the method: model, text and number of cases."""
    return f"{model}, text {sha256(text.encode()).hexdigest()[:8]}, {cases} cases"


def run(
    loaded: LoadedModel,
    text: str,
    lengths: Sequence[int],
    methods: Sequence[Method],
    cases: int,
    *,
    source: str,
    done: Sequence[Row],
) -> Iterator[Row]:
    """Run what is not `done` for this `source`, case by case; yields each result as it comes.

    Raises:
        InputError: see `make_prompt`.
    """
    enable(loaded.model)
    finished = {(row.length, row.case, row.method, row.token_budget) for row in done if row.source == source}
    for length in lengths:
        for case in range(cases):
            missing = [m for m in methods if (length, case, m.label, m.token_budget) not in finished]
            if not missing:
                continue
            prompt, number, depth = make_prompt(loaded, text, length, case, cases)
            shared = prefill_shared(loaded, prompt, window_size=missing[0].config().window_size)
            for method in missing:
                reply = answer(loaded, prompt, shared.fork(method.config()))
                yield Row(
                    source, length, case, round(depth, 3), method.label, method.token_budget, number in reply, reply
                )


def read_rows(path: Path) -> list[Row]:
    """The results in a record file, none if it is new; a torn last line, as a killed run leaves it, is dropped.

    Raises:
        InputError: the file cannot be read and written, or a line is no result.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
        whole, newline, torn = path.read_text(encoding="utf-8").rpartition("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InputError(f"{path} cannot be used ({reason}); give the path of a file of results.") from None
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            rows.append(Row(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}, line {number} is no result ({error}); give another file.") from None
    if torn and not torn.startswith("{"):
        raise InputError(f"{path} ends in what is no result ({torn[:20]!r}); give another file.")
    if torn:
        path.write_text(whole + newline, encoding="utf-8")
    return rows


def append_row(path: Path, row: Row) -> None:
    """Add a result to a record file at once, so that a killed run loses at most the case it was in."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")


@dataclass(frozen=True)
class Summary:
    """How a method did at a length: `found` of `cases`; and of the `full` that the full cache found, `kept`."""

    length: int
    method: str
    token_budget: int
    cases: int
    found: int
    full: int | None
    kept: int | None


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """One line per length, budget and method, in order of first appearance; `full` is known where it was run."""
    full = {(row.length, row.case): row.found for row in rows if row.method == "full"}
    groups: dict[tuple[int, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.length, row.method, row.token_budget), []).append(row)
    summaries = []
    for (length, method, token_budget), group in groups.items():
        both = [row for row in group if full.get((row.length, row.case))]
        known = all((row.length, row.case) in full for row in group)
        summaries.append(
            Summary(
                length,
                method,
                token_budget,
                cases=len(group),
                found=sum(row.found for row in group),
                full=len(both) if known else None,
                kept=sum(row.found for row in both) if known else None,
            )
        )
    return summaries
