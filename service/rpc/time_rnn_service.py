"""timernn.v1.TimeRnnService."""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.domain.types import SessionKey
from service.rpc.answers import AnswerSizes
from service.rpc.fields import check_id
from service.rpc.operations import Operations
from service.rpc.stream import OperationStream, StreamRules
from service.rpc.time_rnn_messages import (
    OperationReader,
    fill_backward,
    fill_discard,
    fill_forward,
    fill_update,
    waiting_to_proto,
)
from timernn.v1 import time_rnn_service_pb2 as pb

if TYPE_CHECKING:
    from service.domain.use_cases import UseCases
    from service.rpc.gate import Call, Gate
    from service.settings import Limits


class TimeRnnService:
    """Decodes, checks, calls the domain, encodes."""

    def __init__(
        self,
        use_cases: UseCases,
        gate: Gate,
        limits: Limits,
        rules: StreamRules | None = None,
    ) -> None:
        self._use_cases = use_cases
        self._gate = gate
        self._limits = limits
        self._rules = rules or StreamRules(deadline_s=limits.default_deadline_ms / 1000)
        self._reader = OperationReader(limits)
        self._sizes = AnswerSizes(use_cases.recurrence, limits.message_bytes)
        self._streams: set[OperationStream] = set()

    async def forward(self, call: Call, request: pb.ForwardRequest) -> pb.ForwardResponse:
        """Apply one chunk."""
        wanted = self._reader.forward(request)
        call.ticket.reserve(self._sizes.forward(call.tenant, wanted))
        response = pb.ForwardResponse()
        fill_forward(response, await self._use_cases.recurrence.forward(call.tenant, wanted))
        return response

    async def backward(self, call: Call, request: pb.BackwardRequest) -> pb.BackwardResponse:
        """Leave one contribution."""
        wanted = self._reader.backward(request)
        call.ticket.reserve(self._sizes.backward(call.tenant, wanted))
        response = pb.BackwardResponse()
        fill_backward(response, await self._use_cases.backpropagation.backward(call.tenant, wanted))
        return response

    async def update(self, call: Call, request: pb.UpdateRequest) -> pb.UpdateResponse:
        """Make one optimizer step."""
        wanted = self._reader.update(request)
        response = pb.UpdateResponse()
        fill_update(response, await self._use_cases.updates.update(call.tenant, wanted))
        return response

    async def discard_gradients(
        self, call: Call, request: pb.DiscardGradientsRequest
    ) -> pb.DiscardGradientsResponse:
        """Drop contributions and tapes."""
        wanted = self._reader.discard(request)
        response = pb.DiscardGradientsResponse()
        fill_discard(response, await self._use_cases.waiting.discard(call.tenant, wanted))
        return response

    async def list_waiting(
        self, call: Call, request: pb.ListWaitingRequest
    ) -> pb.ListWaitingResponse:
        """List the tapes and contributions of a session that wait."""
        session_id = check_id("session_id", request.session_id)
        return waiting_to_proto(
            await self._use_cases.waiting.list_waiting(SessionKey(call.tenant, session_id))
        )

    async def stream(self, call: Call) -> None:
        """Serve one stream of operations."""
        operations = Operations(call.tenant, self._reader, self._sizes, self._use_cases)
        stream = OperationStream(call.context, operations, self._gate, self._limits, self._rules)
        self._streams.add(stream)
        try:
            await stream.run()
        finally:
            self._streams.discard(stream)

    def drain(self) -> None:
        """Ask every stream to end once it has answered what it accepted."""
        for stream in list(self._streams):
            stream.drain()
