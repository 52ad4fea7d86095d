"""A stream's operations, handed to the domain as futures."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from service.domain.errors import bad_field
from service.domain.types import NO_TOKEN
from service.rpc.answers import AnswerSizes

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from service.domain.recurrence import Recurrence
    from service.domain.training import Training
    from service.domain.types import Forward
    from service.rpc.histories import Histories
    from service.rpc.lanes import StreamOperation
    from service.rpc.time_rnn_messages import OperationReader


class Operations:
    """Starts operations of one tenant."""

    __slots__ = ("_reader", "_recurrence", "_sizes", "_tenant", "_training")

    def __init__(
        self,
        tenant: str,
        reader: OperationReader,
        recurrence: Recurrence,
        training: Training,
        message_bytes: int,
    ) -> None:
        self._tenant = tenant
        self._reader = reader
        self._recurrence = recurrence
        self._training = training
        self._sizes = AnswerSizes(tenant, recurrence, message_bytes)

    def submit(
        self, operation: StreamOperation, histories: Histories, admit: Callable[[int], None]
    ) -> asyncio.Future[Any]:
        """Check an operation and start it; raise a DomainError when it is refused.

        Args:
            operation: What came.
            histories: What its stream has answered.
            admit: Told the most bytes that the answer can have; refuses, or the operation starts.
        """
        request = operation.request
        match operation.kind:
            case "forward":
                chunk = self._forward(operation, histories)
                admit(self._sizes.forward(chunk))
                return self._recurrence.submit_forward(self._tenant, chunk)
            case "backward":
                wanted = self._reader.backward(request)
                admit(self._sizes.backward(wanted))
                return _task(self._training.backward(self._tenant, wanted))
            case "update":
                step = self._reader.update(request)
                admit(0)
                return _task(self._training.update(self._tenant, step))
            case "discard_gradients":
                discard = self._reader.discard(request)
                admit(0)
                return _task(self._training.discard(self._tenant, discard))
        raise bad_field("operation", "required")

    def _forward(self, operation: StreamOperation, histories: Histories) -> Forward:
        request, token = operation.request, NO_TOKEN
        if operation.lanes and not request.previous_token:
            (session_id,) = operation.lanes
            token = histories.previous_token(session_id, request.epoch, request.chunk_seq)
        return self._reader.forward(request, token)


def _task(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_task(coroutine)
