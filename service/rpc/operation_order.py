"""The order of the operations on one stream: those of one session run one after another.

The domain keeps an order as well (`domain/recurrence.py`): of the chunks of a session, whichever calls
they came in. This one is of one stream and of all kinds of operations: an Update waits for the chunks of
every session that it names, and a chunk is decoded only when the one before it is answered, since its
empty previous_token stands for that answer's.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence
    from contextvars import Context

    from timernn.v1 import time_rnn_service_pb2 as pb


class StreamOperation:
    """One operation from when it was read until it is answered.

    Attributes:
        tag: Chosen by the client; stands in the answer.
        field: The field of `Operation` that it came in; empty for none.
        request: The message in that field.
        keys: The names of the sessions in whose order it stands, or one name for its model.
        waiting_for: Of how many keys another operation is before it.
        request_bytes: Its part of the message that it came in, once it is counted.
        expected_bytes: The most bytes that its answer can have, once it is started.
        refusal: Why it is not even tried.
        is_admitted: Whether it counts as an operation in work.
        task: What it runs as, if it is one.
        started_at: When it was started, by `time.perf_counter`, in seconds.
        context: What is done for it runs in this one, so that observers know what it belongs to.
        is_overdue: Whether its task was cancelled because it took too long.
    """

    __slots__ = (
        "_message",
        "context",
        "expected_bytes",
        "field",
        "is_admitted",
        "is_overdue",
        "keys",
        "refusal",
        "request",
        "request_bytes",
        "started_at",
        "tag",
        "task",
        "waiting_for",
    )

    def __init__(self, operation: pb.Operation, max_names: int, context: Context) -> None:
        field = operation.WhichOneof("operation")
        self._message = operation
        self.context = context
        self.tag = operation.tag
        self.field = field or ""
        self.request: Any = getattr(operation, field) if field else None
        self.keys = _keys_of(self.field, self.request, max_names)
        self.waiting_for = 0
        self.request_bytes = 0
        self.expected_bytes = 0
        self.refusal: Exception | None = None
        self.is_admitted = False
        self.task: asyncio.Task[Any] | None = None
        self.started_at = 0.0
        self.is_overdue = False

    def headers(self) -> Sequence[tuple[str, str]]:
        """Return where its trace began, as the metadata of a unary call would say it."""
        message = self._message
        return ("traceparent", message.traceparent), ("tracestate", message.tracestate)


class OperationOrder:
    """Queues of operations, one per key.

    An operation with several keys stands in the queue of each and is ready once it is first in all of
    them. It never waits for one that was read later, so no two can wait for each other.
    """

    __slots__ = ("_behind",)

    def __init__(self) -> None:
        # Per key with an operation: those behind the first; None while there are none, as mostly.
        self._behind: dict[str, deque[StreamOperation] | None] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._behind

    def add(self, operation: StreamOperation) -> bool:
        """Put an operation last; return whether it is ready."""
        behind = self._behind
        for key in operation.keys:
            if key not in behind:
                behind[key] = None
                continue
            waiting = behind[key]
            if waiting is None:
                waiting = behind[key] = deque()
            waiting.append(operation)
            operation.waiting_for += 1
        return not operation.waiting_for

    def remove(self, operation: StreamOperation) -> list[StreamOperation]:
        """Take out an operation that was ready; return those that are ready now."""
        ready = []
        for key in operation.keys:
            waiting = self._behind[key]
            if not waiting:
                del self._behind[key]
                continue
            following = waiting.popleft()
            following.waiting_for -= 1
            if not following.waiting_for:
                ready.append(following)
        return ready


def _keys_of(field: str, request: Any, max_names: int) -> Sequence[str]:
    """Return the keys; of an operation that names more sessions than it may, which is refused, some."""
    if field == "forward":
        return (request.session_id,) if request.session_id else ()
    if field == "backward":
        named = {each.session_id for each in request.update.contributions[:max_names]}
        return tuple(named | {request.session_id})
    if field in ("update", "discard_gradients"):
        named = {each.session_id for each in request.contributions[:max_names]}
        # A colon is in no session's name.
        return tuple(named) or (f"model:{request.model_id}",)
    return ()
