"""Declares what the runner asks of a suite."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from rocketkv.eval.data.samples import Fault, Sample

__all__ = ["Fault", "Request", "Suite"]


@dataclass(frozen=True)
class Request:
    """Says which samples are wanted.

    Attributes:
        tokenizer: the model's tokenizer, which counts lengths in tokens.
        tasks: the names of the suite's tasks to run; an empty list stands for all.
        lengths: the lengths of the context in tokens; empty takes the suite's. Suites whose data sets them ignore this.
        num_samples: the samples per task, length and depth; None takes as many as the suite publishes or the data has.
        seed: the seed of everything drawn at random.
        data: a file or a folder; None: what the suite can generate by itself.
        haystack: the prose in which needles are hidden.
        parity: True makes samples exactly as published, False in our improved form.
        mode: of the suites whose samples have several turns: `multi_turn`, each turn follows the one before, or
            `multi_request`, each turn follows the context.
    """

    tokenizer: PreTrainedTokenizerBase
    tasks: Sequence[str]
    lengths: Sequence[int]
    num_samples: int | None
    seed: int
    data: Path | None
    haystack: str
    parity: bool
    mode: str = "multi_turn"


class Suite(Protocol):
    """A file of this folder.

    Attributes:
        name: the name that `--suite` takes.
        tasks: all task names, in the suite's own order.
    """

    name: str
    tasks: Sequence[str]

    def samples(self, request: Request) -> Iterator[Sample | Fault]:
        """Make or read samples, the same at every call with the same request.

        Raises:
            InputError: the request makes no sense: an unknown task, data that is missing or is no file of this suite.
        """
        ...

    def score(self, sample: Sample, turn: int, prediction: str) -> Mapping[str, float]:
        """Judge the answer to one turn.

        Args:
            sample: a sample that `samples` made.
            turn: the index into `sample.turns`.
            prediction: the generated text without special tokens and without the answer prefix.

        Returns:
            `score`, from 0 to 1, and further figures by name where a suite has them (`released`, as its released
            scorer would count).
        """
        ...
