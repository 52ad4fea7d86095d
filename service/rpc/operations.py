"""A stream's operations, handed to the domain as futures."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from service.domain.errors import bad_field
from service.rpc.answers import AnswerSizes

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from service.domain.recurrence import Recurrence
    from service.domain.training import Training
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

    def answer_bytes(self, operation: StreamOperation) -> int:
        """Return the most bytes that an operation's answer can have."""
        return self._sizes.most_bytes(operation.kind, operation.request)

    def submit(self, operation: StreamOperation, histories: Histories) -> asyncio.Future[Any]:
        """Check an operation and start it; raise a DomainError when it is refused."""
        request = operation.request
        match operation.kind:
            case "forward":
                return self._forward(operation, histories)
            case "backward":
                wanted = self._reader.backward(request)
                return _task(self._training.backward(self._tenant, wanted))
            case "update":
                return _task(self._training.update(self._tenant, self._reader.update(request)))
            case "discard_gradients":
                return _task(self._training.discard(self._tenant, self._reader.discard(request)))
        raise bad_field("operation", "required")

    def _forward(self, operation: StreamOperation, histories: Histories) -> asyncio.Future[Any]:
        request, token = operation.request, b""
        if operation.lanes and not request.previous_token:
            (session_id,) = operation.lanes
            token = histories.previous_token(session_id, request.epoch, request.chunk_seq)
        return self._recurrence.submit_forward(self._tenant, self._reader.forward(request, token))


def _task(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_task(coroutine)
