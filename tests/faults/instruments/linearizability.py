"""Decide whether a history could have come from one object that does one thing at a time.

The search of Wing and Gong ("Testing and verifying concurrent objects", 1993) with the cache of
Lowe ("Testing for linearizability", 2017): try to put the operations into one order that keeps
"A returned before B was called" and that a sequential model accepts, remembering every pair of
(operations done, state) that led nowhere. Operations of unknown outcome may be used or not; two
that asked the same are interchangeable, and a way that used fewer of them leaves more open. Without
these two cuts each lost answer doubles the search.
"""

import time
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Generic, Protocol, TypeVar

from instruments.history import Answer, Ask, Operation

S = TypeVar("S", bound=Hashable)
Ask_contra = TypeVar("Ask_contra", contravariant=True)
Answer_contra = TypeVar("Answer_contra", contravariant=True)


class SequentialModel(Protocol[S, Ask_contra, Answer_contra]):
    """What one object does when asked one thing after another."""

    def initial(self) -> S:
        """Return the state before the first operation."""
        ...

    def step(self, state: S, ask: Ask_contra, answer: Answer_contra | None) -> Iterable[S]:
        """Return every state in which `ask` may leave the object when it answers `answer`.

        None is an answer that nobody saw. No state at all means: this cannot be the answer here.
        """
        ...


class Outcome(Enum):
    """How a check ended; only `OK` is a pass."""

    OK = "ok"
    VIOLATION = "violation"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Verdict(Generic[Ask, Answer]):
    """The outcome of a check.

    Attributes:
        outcome: How it ended.
        explained: The longest run of operations that has an order.
        stuck: The operations that might have come next, none of which the model accepts.
        states: How many pairs of (operations done, state) were visited.
    """

    outcome: Outcome
    explained: tuple[Operation[Ask, Answer], ...]
    stuck: tuple[Operation[Ask, Answer], ...]
    states: int

    def __str__(self) -> str:
        """Show the end of the longest explanation and what does not follow from it."""
        lines = [f"{self.outcome.value} after {len(self.explained)} operations; the last:"]
        lines += [f"  {_line(operation)}" for operation in self.explained[-5:]]
        lines += ["none of these can come next:", *(f"  {_line(o)}" for o in self.stuck)]
        return lines[0] if self.outcome is Outcome.OK else "\n".join(lines)


def check(
    history: Iterable[Operation[Ask, Answer]],
    model: SequentialModel[S, Ask, Answer],
    *,
    time_limit_s: float = 30.0,
) -> Verdict[Ask, Answer]:
    """Search an order of `history` that `model` accepts.

    Args:
        history: Operations on one object.
        model: What the object should do.
        time_limit_s: After how long to give up, in seconds.

    Returns:
        `OK` with a complete order, `VIOLATION` when there is none, `UNKNOWN` when time was up.
    """
    return _Search(sorted(history, key=lambda o: o.call_time), model).run(time_limit_s)


class _Search(Generic[S, Ask, Answer]):
    """A depth-first walk over (operations done, state); done is a set of bits."""

    def __init__(
        self,
        operations: Sequence[Operation[Ask, Answer]],
        model: SequentialModel[S, Ask, Answer],
    ) -> None:
        self._operations = operations
        self._model = model
        # Operations of unknown outcome need not be in the order at all.
        self._required = sum(1 << i for i, o in enumerate(operations) if o.answer is not None)
        self._twins = _earlier_twins(operations)
        # Known operations done and state, with the sets of unknown ones that were used to get there.
        self._seen: defaultdict[tuple[int, S], list[int]] = defaultdict(list)
        self._states = 0
        self._path: list[int] = []
        self._best: tuple[tuple[int, ...], int] = ((), 0)

    def run(self, time_limit_s: float) -> Verdict[Ask, Answer]:
        """Walk until an order is found, all are tried, or time is up."""
        deadline = time.monotonic() + time_limit_s
        if not self._required:
            return self._verdict(Outcome.OK)
        stack = [self._moves(0, self._model.initial())]
        while stack:
            move = next(stack[-1], None)
            if move is None:
                stack.pop()
                del self._path[-1:]
                continue
            index, done, state = move
            self._path.append(index)
            self._note(done)
            if done & self._required == self._required:
                return self._verdict(Outcome.OK)
            if time.monotonic() > deadline:
                return self._verdict(Outcome.UNKNOWN)
            stack.append(self._moves(done, state))
        return self._verdict(Outcome.VIOLATION)

    def _moves(self, done: int, state: S) -> Iterator[tuple[int, int, S]]:
        """Yield every operation that may come next with the state after it."""
        for index in self._candidates(done):
            operation = self._operations[index]
            for after in self._model.step(state, operation.ask, operation.answer):
                if operation.answer is None and after == state:
                    continue  # what changed nothing and returned nothing need not have happened
                if self._is_new(done | 1 << index, after):
                    yield index, done | 1 << index, after

    def _is_new(self, done: int, state: S) -> bool:
        """Return whether nobody got here before with the same or fewer unknown operations used."""
        used = done & ~self._required
        visits = self._seen[done & self._required, state]
        if any(earlier & used == earlier for earlier in visits):
            return False
        visits.append(used)
        self._states += 1
        return True

    def _candidates(self, done: int) -> list[int]:
        """Return what was called before anything undone returned; known outcomes first."""
        found, bound = [], float("inf")
        index = (~done & (done + 1)).bit_length() - 1  # the first bit that is not set
        while index < len(self._operations) and self._operations[index].call_time <= bound:
            if not done >> index & 1:
                bound = min(bound, self._operations[index].return_time)
                twin = self._twins.get(index)
                if twin is None or done >> twin & 1:
                    found.append(index)
            index += 1
        return sorted(found, key=lambda i: self._operations[i].return_time)

    def _note(self, done: int) -> None:
        if (done & self._required).bit_count() > (self._best[1] & self._required).bit_count():
            self._best = (tuple(self._path), done)

    def _verdict(self, outcome: Outcome) -> Verdict[Ask, Answer]:
        path, done = self._best
        stuck = [] if outcome is Outcome.OK else self._candidates(done)
        return Verdict(
            outcome,
            tuple(self._operations[i] for i in path),
            tuple(self._operations[i] for i in stuck),
            self._states,
        )


def _earlier_twins(operations: Sequence[Operation[Ask, Answer]]) -> dict[int, int]:
    """Map each operation of unknown outcome to the one before it that asked the same.

    Either may stand for the other, so that the earlier one is always taken first.
    """
    last: dict[Ask, int] = {}
    twins = {}
    for index, operation in enumerate(operations):
        if operation.answer is None:
            if operation.ask in last:
                twins[index] = last[operation.ask]
            last[operation.ask] = index
    return twins


def _line(operation: Operation[Ask, Answer]) -> str:
    end = f"{operation.return_time:.6f}" if operation.answer is not None else "…"
    answer = operation.answer if operation.answer is not None else "unknown"
    return f"[{operation.call_time:.6f}, {end}] {operation.client}: {operation.ask} -> {answer}"
