"""Write down who asked what when, and what came back: the raw material of every proof.

An operation that failed without a clear answer may have happened, may happen later, or never; its
return time is infinity, and the checker (`linearizability`) has to allow for each.
"""

import contextlib
import json
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

Ask = TypeVar("Ask")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Refused:
    """An answer that says no: the reason, and its metadata.

    Attributes:
        reason: As in `google.rpc.ErrorInfo`.
        expected_seq: The chunk that comes next, where a gap was refused.
        counted: Whether a contribution had been counted before, where a tape was missing.
    """

    reason: str
    expected_seq: int | None = None
    counted: bool = False


@dataclass(frozen=True, slots=True)
class Operation(Generic[Ask, Answer]):
    """One call, seen from its caller.

    Attributes:
        client: Who called.
        key: What it is about; histories of different keys are checked apart.
        ask: What was asked.
        answer: What came back, None where the outcome is unknown.
        call_time: When it was called, in seconds of the monotonic clock.
        return_time: When the answer was there; infinity where the outcome is unknown.
    """

    client: str
    key: str
    ask: Ask
    answer: Answer | None
    call_time: float
    return_time: float = math.inf

    def __post_init__(self) -> None:
        """Refuse an operation that ends before it begins."""
        if self.return_time < self.call_time:
            raise ValueError(f"returned before it was called: {self}")
        if (self.answer is None) != (self.return_time == math.inf):
            raise ValueError(f"an unknown outcome returns at infinity, a known one earlier: {self}")


@dataclass(slots=True)
class Pending(Generic[Answer]):
    """An operation under way: say `returned` or `forget`; otherwise its outcome is unknown."""

    answer: Answer | None = None
    return_time: float = math.inf
    is_forgotten: bool = False
    _clock: Callable[[], float] = field(default=time.monotonic, repr=False)

    def returned(self, answer: Answer) -> None:
        """Note the answer, a refusal among them, at the time when it is there."""
        self.return_time, self.answer = self._clock(), answer

    def forget(self) -> None:
        """Leave the operation out: it was certainly never sent."""
        self.is_forgotten = True


class Recorder(Generic[Ask, Answer]):
    """Collects operations from any number of threads and tasks."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start empty; the system-wide monotonic clock lets processes share a time line."""
        self._clock = clock
        self._lock = threading.Lock()
        self._operations: list[Operation[Ask, Answer]] = []

    @contextlib.contextmanager
    def calling(self, client: str, key: str, ask: Ask) -> Iterator[Pending[Answer]]:
        """Record the call made in the body, whichever way the body is left.

        Yields:
            Called with the answer. An exception passes through.
        """
        pending, call_time = Pending[Answer](_clock=self._clock), self._clock()
        try:
            yield pending
        finally:
            if not pending.is_forgotten:
                self.add(
                    Operation(client, key, ask, pending.answer, call_time, pending.return_time)
                )

    def add(self, operation: Operation[Ask, Answer]) -> None:
        """Add an operation recorded elsewhere."""
        with self._lock:
            self._operations.append(operation)

    def histories(self) -> dict[str, list[Operation[Ask, Answer]]]:
        """Return the operations so far, key by key, in the order of their calls."""
        with self._lock:
            operations = list(self._operations)
        return by_key(operations)

    def __len__(self) -> int:
        """Return how many operations have been recorded."""
        return len(self._operations)


def by_key(
    operations: Iterable[Operation[Ask, Answer]],
) -> dict[str, list[Operation[Ask, Answer]]]:
    """Sort operations by key and, within one, by the time of the call."""
    histories: defaultdict[str, list[Operation[Ask, Answer]]] = defaultdict(list)
    for operation in sorted(operations, key=lambda o: o.call_time):
        histories[operation.key].append(operation)
    return dict(histories)


def write_history(path: Path, operations: Iterable[Operation[Ask, Answer]]) -> None:
    """Write operations of dataclass asks and answers to a file, one line each, to be read."""
    with path.open("w") as lines:
        for operation in operations:
            names = {
                "op": type(operation.ask).__name__,
                "outcome": type(operation.answer).__name__ if operation.answer else "Unknown",
            }
            lines.write(json.dumps(names | asdict(operation), default=str) + "\n")
