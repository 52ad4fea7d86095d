"""The order of a stream's operations: those of one session wait for each other, others do not."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from timernn.v1 import time_rnn_service_pb2 as pb


class StreamOperation:
    """One operation from the moment it was read until it is answered.

    Attributes:
        tag: The client's.
        kind: Which field of `Operation` it came in; empty for none.
        request: What came in it.
        lanes: The sessions that it belongs to.
        waiting_for: In how many lanes another is before it.
        size_bytes: Its part of the message it came in.
        expected_bytes: The most that its answer can have, once it is started.
        refusal: Why it is not even tried.
        task: What it runs as, if it is one.
        started_at: When it was started, in the loop's seconds.
        is_overdue: Whether it was given up for its deadline.
    """

    __slots__ = (
        "expected_bytes",
        "is_admitted",
        "is_overdue",
        "kind",
        "lanes",
        "refusal",
        "request",
        "size_bytes",
        "started_at",
        "tag",
        "task",
        "waiting_for",
    )

    def __init__(self, operation: pb.Operation, size_bytes: int, max_names: int) -> None:
        kind = operation.WhichOneof("operation")
        self.tag = operation.tag
        self.kind = kind or ""
        self.request: Any = getattr(operation, kind) if kind else None
        self.lanes = _lanes_of(self.kind, self.request, max_names)
        self.waiting_for = 0
        self.size_bytes = size_bytes
        self.expected_bytes = 0
        self.refusal: Exception | None = None
        self.is_admitted = False
        self.task: asyncio.Task[Any] | None = None
        self.started_at = 0.0
        self.is_overdue = False


class Lanes:
    """Queues of operations, one a session.

    An operation that belongs to several sessions stands in the queue of each and is ready once it is
    first in all of them. It can wait for no later one, so nothing ever waits in a circle.
    """

    __slots__ = ("_behind",)

    def __init__(self) -> None:
        # Of each lane those behind the first; mostly there is none.
        self._behind: dict[str, deque[StreamOperation] | None] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._behind

    def add(self, operation: StreamOperation) -> bool:
        """Put an operation last; tell whether it is ready."""
        behind = self._behind
        for name in operation.lanes:
            if name not in behind:
                behind[name] = None
                continue
            waiting = behind[name]
            if waiting is None:
                waiting = behind[name] = deque()
            waiting.append(operation)
            operation.waiting_for += 1
        return not operation.waiting_for

    def remove(self, operation: StreamOperation) -> list[StreamOperation]:
        """Take out an operation that was ready; return those that are ready now."""
        ready = []
        for name in operation.lanes:
            waiting = self._behind[name]
            if not waiting:
                del self._behind[name]
                continue
            following = waiting.popleft()
            following.waiting_for -= 1
            if not following.waiting_for:
                ready.append(following)
        return ready


def _lanes_of(kind: str, request: Any, max_names: int) -> Sequence[str]:
    """Return the names of the lanes; an operation that names more than it may is refused anyway."""
    if kind == "forward":
        return (request.session_id,) if request.session_id else ()
    if kind == "backward":
        named = {each.session_id for each in request.update.contributions[:max_names]}
        return tuple(named | {request.session_id})
    if kind in ("update", "discard_gradients"):
        named = {each.session_id for each in request.contributions[:max_names]}
        # A colon is in no session's name.
        return tuple(named) or (f"model:{request.model_id}",)
    return ()
