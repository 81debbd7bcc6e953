"""The suite of your own samples, in the schema of `rocketkv.eval.data.samples`.

Each sample is judged by the suite and the task that the sample names.
"""

from collections.abc import Iterator, Mapping, Sequence

from rocketkv.errors import InputError, RocketKVError
from rocketkv.eval.data.samples import Fault, Sample, load_samples
from rocketkv.eval.suites import find_suite
from rocketkv.eval.suites.base import Request


class Rows:
    """The suite; see `Suite`."""

    name = "rows"
    tasks: Sequence[str] = ()  # the tasks are those that the rows name

    def samples(self, request: Request) -> Iterator[Sample | Fault]:
        """Return the first `num_samples` rows of each asked task (or all tasks) and length in the data.

        Raises:
            InputError: there is no data, it cannot be read or, while iterating, has none of an asked task.
        """
        if request.data is None:
            raise InputError("rows needs its data; give --data a .jsonl file in our schema, or a folder of them.")
        return self._take(request, load_samples(request.data))

    def score(self, sample: Sample, turn: int, prediction: str) -> Mapping[str, float]:
        """Score as the sample's own suite judges that task."""
        return find_suite(sample.suite).score(sample, turn, prediction)

    def _take(self, request: Request, found: Iterator[Sample | Fault]) -> Iterator[Sample | Fault]:
        counts: dict[tuple[str, str, int | None], int] = {}
        for sample in found:
            if isinstance(sample, Fault):
                yield sample
                continue
            kind = (sample.suite, sample.task, sample.length)
            if (request.tasks and sample.task not in request.tasks) or counts.get(kind, 0) == request.num_samples:
                continue
            if fault := _unfit(sample):
                yield fault
                continue
            counts[kind] = counts.get(kind, 0) + 1
            yield sample
        if missing := set(request.tasks) - {task for _, task, _ in counts}:
            raise InputError(f"{request.data} has no rows of {', '.join(sorted(missing))}; ask for tasks that it has.")


def _unfit(sample: Sample) -> Fault | None:
    """Say why a sample cannot be judged; None if it can."""
    source = f"{sample.suite}, {sample.task}, {sample.id}"
    if sample.suite == Rows.name:
        return Fault(source, "names the suite 'rows', which judges nothing by itself; name the one that judges it")
    try:
        known = find_suite(sample.suite).tasks
    except InputError as error:
        return Fault(source, str(error))
    if sample.task not in known:
        return Fault(source, f"names a task that {sample.suite} does not have; choose from {', '.join(known)}")
    try:
        for turn in range(len(sample.turns)):
            find_suite(sample.suite).score(sample, turn, "")
    except (RocketKVError, LookupError, ValueError) as error:
        return Fault(source, f"cannot be judged as {sample.task} of {sample.suite} ({error}); give what that task has")
    return None


SUITE = Rows()
