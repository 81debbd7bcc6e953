"""Samples x methods x budgets: fit each sample, prefill it once, let every method answer, judge, write down."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rocketkv.errors import InputError, RocketKVError
from rocketkv.eval.data.dialogue import Dialogue, fit
from rocketkv.eval.data.samples import Fault, Sample
from rocketkv.eval.run.generation import Generated, SharedPrefill, stop_ids
from rocketkv.eval.run.journal import Journal, Shard
from rocketkv.eval.run.methods import FULL, Arm
from rocketkv.eval.run.records import Case, Record, digest
from rocketkv.eval.suites.base import Request, Suite
from rocketkv.hf.models import LoadedModel
from rocketkv.hf.switch import enable

BASE_SUITES = (  # suites that work with a model without a chat template
    "niah (tasks code, passkey), ruler, scbench, longbench (trec, triviaqa, samsum, lsht, lcc, repobench-p), fidelity, "
    "and rows with chat=false"
)
OnProgress = Callable[[int, int], None]  # samples done, of how many


@dataclass(frozen=True)
class Plan:
    """Says what to run.

    Attributes:
        suite: the suite that gives samples and judges answers.
        request: the samples that are asked for.
        arms: the methods and their budgets, the full cache first if it is among them.
        max_length: the most tokens of a sample's text; None allows as many as the model was made for.
        shard: the part of the samples to run.
    """

    suite: Suite
    request: Request
    arms: Sequence[Arm]
    max_length: int | None
    shard: Shard


def run(loaded: LoadedModel, plan: Plan, journal: Journal, on_progress: OnProgress) -> None:
    """Run what the journal does not have yet, sample by sample.

    A sample that cannot be evaluated is a fault; the others are evaluated without it.

    Raises:
        InputError: the request makes no sense to the suite, the model has no chat template and a sample needs one, or a
            sample is another than it was in an earlier run.
    """
    found = list(plan.suite.samples(plan.request))[plan.shard.index - 1 :: plan.shard.count]
    chats = sorted({sample.task for sample in found if isinstance(sample, Sample) and sample.chat})
    if chats and loaded.tokenizer.chat_template is None:
        raise InputError(
            f"the model has no chat template, which {plan.suite.name} needs for {', '.join(chats)}; "
            f"a base model takes {BASE_SUITES}."
        )
    enable(loaded.model)
    journal.begin()
    seen: set[Case] = set()
    for number, sample in enumerate(found):
        on_progress(number, len(found))
        if isinstance(sample, Fault):
            journal.note_fault(sample)
            continue
        source = f"{sample.suite}, {sample.task}, {sample.id}"
        if _case(sample) in seen:
            journal.note_fault(Fault(source, "another sample has the same id; give each its own."))
            continue
        seen.add(_case(sample))
        try:
            dialogue = fit(loaded.tokenizer, sample, plan.request.mode, loaded.context_length, plan.max_length)
        except RocketKVError as error:
            journal.note_fault(Fault(source, str(error)))
            continue
        arms = journal.missing(_case(sample), plan.arms, _digest(dialogue))
        if not arms:
            continue
        try:
            records = _evaluate(loaded, plan.suite, sample, dialogue, arms, journal)
        except RocketKVError as error:
            journal.note_fault(Fault(source, str(error)))
        else:
            journal.append(records)
    on_progress(len(found), len(found))


def _evaluate(
    loaded: LoadedModel, suite: Suite, sample: Sample, dialogue: Dialogue, arms: Sequence[Arm], journal: Journal
) -> list[Record]:
    """Evaluate every turn of a sample under every one of `arms`."""
    for turn in range(len(sample.turns)):
        suite.score(sample, turn, "")  # samples that cannot be scored need not be run
    full = {record["turn"]: record["prediction"] for record in journal.of(_case(sample)) if record["method"] == FULL}
    records: list[Record] = []
    for turn, (answers, prefill_s, decode_s) in enumerate(_answer(loaded, sample, dialogue, arms)):
        texts = [loaded.tokenizer.decode(answer.token_ids, skip_special_tokens=True) for answer in answers]
        if arms[0].method == FULL:
            full[turn] = texts[0]
        for arm, answer, text in zip(arms, answers, texts, strict=True):
            records.append(
                {
                    "suite": sample.suite,
                    "task": sample.task,
                    "id": sample.id,
                    "length": sample.length,
                    "depth": sample.depth,
                    "turn": turn,
                    "turns": len(sample.turns),
                    "method": arm.method,
                    "token_budget": arm.token_budget,
                    "prediction": text,
                    "scores": dict(suite.score(sample, turn, text)),
                    "agrees": text == full[turn] if turn in full else None,
                    "prompt": _digest(dialogue),
                    "prompt_tokens": dialogue.prompt_tokens(turn),
                    "new_tokens": len(answer.token_ids),
                    "read_bytes": answer.held.read_bytes if len(answer.token_ids) > 1 else None,  # no token was decoded
                    "kv_bytes": answer.held.kv_bytes,
                    "group_size": loaded.group_size,
                    "prefill_s": round(prefill_s, 4),
                    "decode_s": round(decode_s, 4),
                    "rows": len(arms),
                }
            )
    return records


@torch.inference_mode()
def _answer(
    loaded: LoadedModel, sample: Sample, dialogue: Dialogue, arms: Sequence[Arm]
) -> list[tuple[list[Generated], float, float]]:
    """Turn by turn the answers of all arms, and the seconds of prefill that they shared and of decoding."""
    shared = SharedPrefill(loaded.model, [arm.config() for arm in arms])
    head_s = 0.0
    if dialogue.head:
        shared.take_in(dialogue.head)
        head_s = shared.prefill_s
    answers = []
    for turn, piece in zip(sample.turns, dialogue.pieces, strict=True):
        asked = shared.copy() if dialogue.head else shared
        asked.take_in(piece)
        generated = asked.answer(turn.max_new_tokens, stop_ids(loaded))
        answers.append((generated, head_s + asked.prefill_s, asked.decode_s))
        head_s = 0.0  # the context is prefilled once, for all questions
    return answers


def _digest(dialogue: Dialogue) -> str:
    return digest([dialogue.head, dialogue.pieces])


def _case(sample: Sample) -> Case:
    return Case(sample.task, sample.id, sample.length)
