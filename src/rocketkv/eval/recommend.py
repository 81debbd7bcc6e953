"""Measures which token budget a model needs on a text, beside the oracle, and puts the result into a sentence."""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from rocketkv.errors import InputError
from rocketkv.eval.run.fidelity import predict
from rocketkv.eval.run.methods import make_arms
from rocketkv.eval.run.runner import OnProgress
from rocketkv.hf.models import LoadedModel
from rocketkv.hf.switch import enable
from rocketkv.hf.text import PlainText

ORACLE = "exact_topk"
BUDGETS = (128, 256, 512, 1024)  # the budgets in tokens, if the user gives none
LENGTH = 4096  # the most tokens of a prompt, if the user gives no length
SAMPLES = 2  # the most passages, if the user gives no number
PLATEAU = 0.01  # the least gain in agreement for which a larger budget is named
LARGE_GAP = 0.05  # the least gap in agreement between the oracle and ours ...
LARGE_RATIO = 3.0  # ... and the least ratio of KL divergences that together make a warning


class Measured(NamedTuple):
    """The figures of our method and of the oracle at one budget, as means over all decoded tokens.

    Attributes:
        token_budget: the budget in tokens.
        agreement: the share of the full cache's next tokens that our method predicts, too, 0 to 1.
        oracle_agreement: the same share for the oracle.
        kl: the KL divergence of our predictions from the full cache's, in nats, >= 0.
        oracle_kl: the same divergence for the oracle.
        read_fraction: the bytes that our last decode step read, as a fraction of those that a full cache reads.
    """

    token_budget: int
    agreement: float
    oracle_agreement: float
    kl: float
    oracle_kl: float
    read_fraction: float


class Passages(NamedTuple):
    """Passages of one text, in token ids.

    Attributes:
        length: the number of tokens of each passage to prefill.
        token_ids: for each passage `length` tokens to prefill, then those to decode, and one more to predict.
    """

    length: int
    token_ids: list[list[int]]


def cut_passages(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    context_length: int,
    new_tokens: int,
    length: int | None = None,
    samples: int | None = None,
) -> Passages:
    """Cut passages out of a text at even distances, so that no token to decode is in two of them.

    Each passage begins with the token that the tokenizer puts before a text, if there is one.

    Args:
        tokenizer: the model's tokenizer.
        text: the text to cut.
        context_length: the number of tokens that the model was made for.
        new_tokens: the number of tokens to decode after each prompt, >= 1.
        length: the number of tokens of a prompt, >= 2; None takes all that text and model allow, at most `LENGTH`.
        samples: the number of passages, >= 1; None takes all that the text has room for, at most `SAMPLES`.

    Raises:
        InputError: the text is too short, or the length too long for the model.
    """
    plain = PlainText(tokenizer)
    start, token_ids = plain.start, plain.encode(plain.hide(text))
    room = len(token_ids) + len(start) - new_tokens - 1  # the tokens of the longest prompt that fits
    most = context_length - new_tokens
    wanted = length or min(LENGTH, most, room)
    if wanted > most:
        raise InputError(
            f"length={wanted} and {new_tokens} tokens to decode do not fit in the model's {context_length} tokens; "
            f"give a length of {most} or less."
        )
    if wanted < 2 or wanted > room:
        raise InputError(
            f"the text has {len(token_ids)} tokens, too few for a prompt of {max(wanted, 2)} and {new_tokens} tokens "
            "to decode; give a longer text, or less --length or --new-tokens."
        )
    spare = room - wanted
    places = spare // new_tokens + 1
    if (samples or 1) > places:
        raise InputError(
            f"the text has room for {places} passages of {wanted} and {new_tokens} tokens, not for {samples}; "
            "give fewer --samples or a shorter --length."
        )
    count = samples or min(SAMPLES, places)
    size = wanted - len(start) + new_tokens + 1
    firsts = [spare * number // max(1, count - 1) for number in range(count)]
    return Passages(wanted, [start + token_ids[first : first + size] for first in firsts])


def measure(
    loaded: LoadedModel, passages: Passages, method: str, budgets: Sequence[int], on_progress: OnProgress
) -> list[Measured]:
    """Measure a method and the oracle at every budget, from one prefill per passage.

    Args:
        loaded: the model, which is then enabled, and its tokenizer.
        passages: the texts to predict.
        method: a name of `rocketkv.eval.run.methods.METHODS`, with options after it or not.
        budgets: the token budgets, each once.
        on_progress: a function that is called with the work done and all of the work.

    Returns:
        The means over all passages, by rising budget.
    """
    enable(loaded.model)
    arms = make_arms([method, ORACLE], sorted(budgets))
    count = len(passages.token_ids)
    found = []
    for number, token_ids in enumerate(passages.token_ids):

        def on_step(done: float, total: float, number: int = number) -> None:
            on_progress(round(number * total + done), round(count * total))

        found.append(predict(loaded, token_ids, passages.length, arms, on_step))
    measured = []
    by_arm = list(zip(*found, strict=True))
    for arm, ours, oracle in zip(arms[::2], by_arm[::2], by_arm[1::2], strict=True):
        assert arm.token_budget is not None
        measured.append(
            Measured(
                token_budget=arm.token_budget,
                agreement=sum(one.agreement for one in ours) / count,
                oracle_agreement=sum(one.agreement for one in oracle) / count,
                kl=sum(one.kl for one in ours) / count,
                oracle_kl=sum(one.kl for one in oracle) / count,
                read_fraction=sum(one.held.read_bytes / one.held.full_read_bytes for one in ours) / count,
            )
        )
    return measured


def find_budget(measured: Sequence[Measured], target: float) -> int | None:
    """Return the smallest budget whose agreement is `target` or more; None if there is none."""
    return next((one.token_budget for one in measured if one.agreement >= target), None)


def advise(measured: Sequence[Measured], target: float) -> str:
    """Return one line of advice.

    Args:
        measured: the figures of at least one budget, by rising budget.
        target: the agreement to reach, 0 to 1.
    """
    chosen = find_budget(measured, target)
    if chosen is None:
        best = max(one.agreement for one in measured)
        nearest = next(one for one in measured if one.agreement >= best - PLATEAU)
        advice = (
            f"no budget measured keeps {100 * target:g}% of the full cache's next tokens; "
            f"t = {nearest.token_budget} keeps {nearest.agreement:.1%}"
        )
        if nearest is measured[-1]:
            return f"{advice}: try larger --budgets, or a lower --target."
        return f"{advice}, and larger budgets gain less than {PLATEAU:.0%} on that."
    place = [one.token_budget for one in measured].index(chosen)
    kept = f"keeps {measured[place].agreement:.1%} of the full cache's next tokens"
    if place == 0:
        return f"t = {chosen}, the smallest budget measured, {kept}."
    below = measured[place - 1]
    return f"t = {chosen} {kept}; below that it falls: t = {below.token_budget} keeps {below.agreement:.1%}."


def warn(measured: Sequence[Measured]) -> str | None:
    """Return one sentence, about the largest gap, if the oracle keeps far more than ours at some budget."""
    failing = [
        one
        for one in measured
        if one.oracle_agreement - one.agreement > LARGE_GAP and one.kl > LARGE_RATIO * one.oracle_kl
    ]
    if not failing:
        return None
    worst = max(failing, key=lambda one: one.oracle_agreement - one.agreement)
    return (
        f"at t = {worst.token_budget} the oracle keeps {worst.oracle_agreement:.1%} and ours {worst.agreement:.1%}: "
        "our method loses tokens that this model needs; compare with --kv-dtype int8 or another --selection "
        "(exact: the loss of stage 1 alone), or report it."
    )
