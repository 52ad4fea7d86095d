"""A stream's operations, handed to the domain."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from service.domain.errors import bad_field
from service.domain.types import NO_TOKEN

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from service.domain.types import Forward
    from service.domain.use_cases import UseCases
    from service.rpc.answers import AnswerSizes
    from service.rpc.histories import Histories
    from service.rpc.lanes import StreamOperation
    from service.rpc.time_rnn_messages import OperationReader

    Admit = Callable[[StreamOperation, int], None]
    Told = Callable[[StreamOperation, Any], None]


class Operations:
    """Starts operations of one tenant."""

    __slots__ = ("_reader", "_sizes", "_tenant", "_use_cases")

    def __init__(
        self,
        tenant: str,
        reader: OperationReader,
        sizes: AnswerSizes,
        use_cases: UseCases,
    ) -> None:
        self._tenant = tenant
        self._reader = reader
        self._sizes = sizes
        self._use_cases = use_cases

    def submit(
        self, operation: StreamOperation, histories: Histories, admit: Admit, told: Told
    ) -> None:
        """Check an operation and start it; raise a DomainError when it is refused.

        Args:
            operation: What came; it gets the task that it runs as, if it is one.
            histories: What its stream has answered.
            admit: Told the operation and the most bytes that its answer can have; it may refuse.
            told: Called with the operation and what came of it, unless it was refused.
        """
        request = operation.request
        if operation.kind == "forward":
            chunk = self._forward(operation, histories)
            admit(operation, self._sizes.forward(self._tenant, chunk))
            self._use_cases.recurrence.begin_forward(self._tenant, chunk, partial(told, operation))
            return
        steps: Coroutine[Any, Any, Any]
        match operation.kind:
            case "backward":
                wanted = self._reader.backward(request)
                admit(operation, self._sizes.backward(self._tenant, wanted))
                steps = self._use_cases.backpropagation.backward(self._tenant, wanted)
            case "update":
                update = self._reader.update(request)
                admit(operation, 0)
                steps = self._use_cases.updates.update(self._tenant, update)
            case "discard_gradients":
                discard = self._reader.discard(request)
                admit(operation, 0)
                steps = self._use_cases.waiting.discard(self._tenant, discard)
            case _:
                raise bad_field("operation", "required")
        operation.task = asyncio.get_running_loop().create_task(steps)
        operation.task.add_done_callback(lambda done: told(operation, _outcome_of(done)))

    def _forward(self, operation: StreamOperation, histories: Histories) -> Forward:
        request, token = operation.request, NO_TOKEN
        if operation.lanes and not request.previous_token:
            (session_id,) = operation.lanes
            token = histories.previous_token(session_id, request.epoch, request.chunk_seq)
        return self._reader.forward(request, token)


def _outcome_of(done: asyncio.Task[Any]) -> Any:
    """Return a task's result, or what it ended with instead."""
    return asyncio.CancelledError() if done.cancelled() else done.exception() or done.result()
