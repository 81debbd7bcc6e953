"""What all commands share: consoles, bars, errors, and the reading of texts and models."""

import errno
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial, wraps
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, TextIO, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

from rocketkv.errors import InputError, RocketKVError

if TYPE_CHECKING:
    from rocketkv.bench.timing import OnRound
    from rocketkv.hf.models import LoadedModel

Item = TypeVar("Item")

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def report_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Print an expected error as one sentence and exit with 2; a traceback is for bugs only."""

    @wraps(command)
    def wrapped(**given: object) -> None:
        try:
            command(**given)
        except RocketKVError as error:
            print_error(error)
            raise typer.Exit(2) from None
        except BrokenPipeError:  # the reader has closed the pipe, as `head` does
            raise typer.Exit(1) from None
        except OSError as error:  # our own files raise a RocketKVError, so this error is mostly a stream's
            print_error(explain(error))
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            err.print("interrupted")
            raise typer.Exit(130) from None

    return wrapped


def print_error(error: RocketKVError) -> None:
    """Print one sentence on standard error."""
    err.print("error:", str(error), style="red", markup=False, soft_wrap=True)


def show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print one sentence on standard error, in the place of Python's own report of a warning."""
    err.print("warning:", str(message), style="yellow", markup=False, soft_wrap=True)


def explain(error: OSError) -> InputError:
    """Return an InputError that says what an error of the operating system means for the command."""
    if error.filename is None:
        return InputError(f"standard output cannot be written ({error.strerror or error}); send it somewhere else.")
    return InputError(f"{error.filename} cannot be used ({error.strerror}); see that it can be read and written.")


def passing_bar(*columns: ProgressColumn) -> Progress:
    """Return a bar on standard error that goes away when it is done, and is not shown where that is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *columns,
        TimeElapsedColumn(),
        console=err,
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def lasting_bar() -> Progress:
    """Return a bar on standard error that shows the time left, and stays."""
    return Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=err)


STANDARD_INPUT = Path("-")


def read_text(path: Path) -> str:
    """Return the text of a file, or of standard input if the path is `-`.

    Raises:
        InputError: there is no such file, or it is not UTF-8 text, cannot be read or is empty.
    """
    name = "standard input" if str(path) == "-" else str(path)
    try:
        content = _standard_input().buffer.read() if path == STANDARD_INPUT else path.read_bytes()
        text = content.decode("utf-8").strip().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first."
        ) from None
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror}); give the path of a text file.") from None
    if not text:
        raise InputError(f"{name} is empty; give a file with text.")
    return text


def read_line(prompt: str) -> str | None:
    """Return the next line of standard input, stripped; None at its end.

    Raises:
        InputError: standard input is closed or cannot be read.
    """
    if _standard_input().isatty():
        with suppress(ImportError):  # Windows has the arrow keys without it
            import readline  # noqa: F401  # `input` then lets the arrow keys edit a line and bring back earlier ones
    try:
        return input(prompt).strip()
    except EOFError:
        return None
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.ENOSPC):  # this ends the line of the prompt on standard output
            raise
        raise InputError(
            f"standard input cannot be read ({error.strerror}); give a terminal, a file or a pipe."
        ) from None


def _standard_input() -> TextIO:
    if sys.stdin is None:
        raise InputError("standard input is closed, from which the command was to read; leave it open or give a file.")
    return sys.stdin


@contextmanager
def deferring_interrupts() -> Iterator[Callable[[], bool]]:
    """Defer the first Ctrl-C inside the block, and yield a function that says whether it came."""
    noted = Event()

    def note(*_: object) -> None:
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def quieten() -> None:
    """Switch the libraries' own bars and warnings off."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub_logging.get_logger("huggingface_hub").setLevel("ERROR")


def load_model(
    name: str, dtype: str, weight_dtype: str | None = None, *, fast: bool = False, device: str = "cpu"
) -> "LoadedModel":
    """Load a model onto a device, and show a spinner meanwhile.

    Raises:
        InputError: there is no such model, or no such device; or the device has no products with such weights.
    """
    from rocketkv.hf.models import load

    quieten()
    _check_device(device, weight_dtype)
    with err.status(f"loading {name}"):
        loaded = load(name, dtype, weight_dtype)
        loaded.model.to(device)
    if fast:
        import rocketkv

        rocketkv.compile(loaded.model)
    return loaded


def _check_device(device: str, weight_dtype: str | None) -> None:
    """Refuse a device that is not there, and weights in few bits elsewhere than on the CPU."""
    import torch

    at_hand = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if device not in (*at_hand, *(["cuda"] if len(at_hand) > 1 else [])):
        raise InputError(f"--device {device} is not there; choose from {', '.join(at_hand)}.")
    if weight_dtype is not None and device != "cpu":
        raise InputError(f"--weight-dtype {weight_dtype} is for CPUs; leave it out, or --device {device}.")


@contextmanager
def counted(title: str, items: Sequence[Item]) -> Iterator[Iterator[tuple[Item, "OnRound"]]]:
    """Yield the items behind a bar on standard error, each with the function that tells the bar of its rounds."""
    progress = passing_bar()
    task = progress.add_task(title, total=len(items))

    def on_round(name: str, number: int) -> None:
        progress.update(task, description=f"{name}, round {number}")

    def each() -> Iterator[tuple[Item, "OnRound"]]:
        for done, item in enumerate(items):
            name = f"{title} {item}"
            progress.update(task, completed=done, description=name)
            yield item, partial(on_round, name)

    with progress:
        yield each()
