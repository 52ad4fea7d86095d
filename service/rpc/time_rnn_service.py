"""timernn.v1.TimeRnnService."""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.domain.rules import InputRules
from service.domain.types import SessionKey
from service.rpc.answers import AnswerSizes
from service.rpc.dispatcher import Steps
from service.rpc.time_rnn_messages import (
    OperationReader,
    fill_backward,
    fill_discard,
    fill_forward,
    fill_update,
    waiting_to_proto,
)

if TYPE_CHECKING:
    from service.domain.use_cases import UseCases
    from service.rpc.stream import Streams
    from service.settings import Limits
    from timernn.v1 import time_rnn_service_pb2 as pb


class TimeRnnService:
    """Decodes, calls the domain, encodes.

    Attributes:
        forward: Applies one chunk.
        backward: Leaves one contribution.
        update: Makes one optimizer step.
        discard_gradients: Drops contributions and tapes.
        stream: Serves one stream of operations.
    """

    def __init__(self, use_cases: UseCases, limits: Limits, streams: Streams) -> None:
        recurrence = use_cases.recurrence
        reader, sizes = (
            OperationReader(InputRules(limits)),
            AnswerSizes(recurrence, limits.message_bytes),
        )
        self._waiting = use_cases.waiting
        self.stream = streams.serve
        self.forward = Steps(
            decode=reader.forward,
            answer_bytes=sizes.forward,
            run=recurrence.forward,
            begin=recurrence.begin_forward,
            encode=fill_forward,
        )
        self.backward = Steps(
            decode=reader.backward,
            answer_bytes=sizes.backward,
            run=use_cases.backpropagation.backward,
            encode=fill_backward,
        )
        self.update = Steps(decode=reader.update, run=use_cases.updates.update, encode=fill_update)
        self.discard_gradients = Steps(
            decode=reader.discard, run=use_cases.waiting.discard, encode=fill_discard
        )

    async def list_waiting(
        self, tenant: str, request: pb.ListWaitingRequest
    ) -> pb.ListWaitingResponse:
        """List the tapes and contributions of a session that wait."""
        key = SessionKey(tenant, request.session_id)
        return waiting_to_proto(await self._waiting.list_waiting(key))
