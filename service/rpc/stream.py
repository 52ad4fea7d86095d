"""TimeRnnService.Stream: many operations for many sessions over one call.

One task reads, one writes; between them a chunk is a callback that the domain is given, with no task of
its own. Answers that are ready together leave in one message. What a stream may hold is
bounded three ways: operations unanswered, bytes of requests, and bytes of answers not yet taken by
the client. At a bound nothing more is read, and at the last one nothing more is started.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc.aio

from service.domain.errors import bad_field
from service.rpc.errors import idle_stream, message_too_large, status_of
from service.rpc.histories import Histories
from service.rpc.lanes import Lanes, StreamOperation
from service.rpc.time_rnn_messages import fill_backward, fill_discard, fill_forward, fill_update
from timernn.v1 import time_rnn_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.rpc.admission import Admission
    from service.rpc.auth import Context
    from service.rpc.gate import Gate
    from service.rpc.operations import Operations
    from service.settings import Limits

METHOD = "/timernn.v1.TimeRnnService/Stream"


@dataclass(frozen=True, slots=True)
class StreamRules:
    """How long things may take on a stream, in seconds.

    Attributes:
        deadline_s: One operation.
        idle_s: Nothing in work and nothing coming; then the stream ends with IDLE_STREAM.
        age_s: A stream; then the client is asked to open another, so that streams spread over
            replicas again and none is cut off when its connection reaches its age.
        goodbye_s: For the client to half-close after it was told to go.
        sweep_s: Between two looks at deadlines, idleness and age.
    """

    deadline_s: float = 60.0
    idle_s: float = 300.0
    age_s: float = 300.0
    goodbye_s: float = 1.0
    sweep_s: float = 1.0


class OperationStream:
    """One call of Stream."""

    def __init__(
        self,
        context: Context,
        operations: Operations,
        gate: Gate,
        limits: Limits,
        rules: StreamRules,
    ) -> None:
        self._context = context
        self._operations = operations
        self._gate = gate
        self._admission: Admission = gate.admission
        self._limits = limits
        self._rules = rules
        self._loop = asyncio.get_running_loop()

        self._lanes = Lanes()
        self._histories = Histories(limits.replay_window + 1, self._lanes)
        self._startable: deque[StreamOperation] = deque()
        self._started: set[StreamOperation] = set()
        self._answers: deque[bytes] = deque()
        self._in_flight = 0  # read and not yet written
        self._admitted = 0
        self._request_bytes = 0
        self._answer_bytes = 0
        self._expected_bytes = 0  # of the answers of what was started, at most

        self._wake = asyncio.Event()  # for the writer: an answer, or the end
        self._room = asyncio.Event()  # for the reader
        self._is_starting = False
        self._is_ending = False  # nothing more is accepted
        self._is_draining = False
        self._is_closed = False
        self._failure: Exception | None = None
        self._born = self._last_read = self._loop.time()

    async def run(self) -> None:
        """Serve until the client half-closes, fails or goes away, or the server drains."""
        # Not cancelled at the end: gRPC ends its read with the call, and a read that is cancelled
        # leaks (grpc/grpc#43360).
        self._reader = asyncio.create_task(self._read(), name="stream reader")
        self._sweeper = self._loop.call_later(self._rules.sweep_s, self._sweep)
        try:
            await self._write()
            if self._failure:
                raise self._failure
            if self._is_draining:
                await self._say_goodbye()
        finally:
            self._sweeper.cancel()
            self._close()

    def drain(self) -> None:
        """Accept nothing more; answer what was accepted, say so, and end."""
        self._is_draining = True
        self._end()

    def _end(self, failure: Exception | None = None) -> None:
        if not self._is_ending:
            self._is_ending = True
            self._failure = failure
        self._wake.set()
        self._room.set()

    async def _say_goodbye(self) -> None:
        """Ask the client to go, and give it a moment: a write after the end fails it confusingly."""
        await self._context.write(pb.StreamResponse(draining=True).SerializeToString())
        await asyncio.wait({self._reader}, timeout=self._rules.goodbye_s)

    async def _read(self) -> None:
        """Accept what comes; once the stream is ending, let it pass until the client has gone."""
        try:
            while not self._is_closed:
                if not self._is_ending and self._is_full():
                    await self._wait_for_room()
                    continue
                raw = await self._context.read()
                if raw is grpc.aio.EOF:
                    break
                if not self._is_ending:
                    self._accept(raw)
        except grpc.aio.BaseError:
            pass  # the call is over
        except Exception as error:  # noqa: BLE001 - told to the client by the writer
            self._end(error)
        self._end()

    async def _wait_for_room(self) -> None:
        self._room.clear()
        await self._room.wait()

    def _is_full(self) -> bool:
        return (
            self._in_flight >= self._limits.stream_operations_in_flight
            or self._request_bytes >= self._limits.message_bytes
            or self._answer_bytes >= self._limits.message_bytes
        )

    def _accept(self, raw: bytes) -> None:
        self._last_read = self._loop.time()
        operations = self._gate.parse(pb.StreamRequest, raw).operations
        count, limit = len(operations), self._limits.operations_per_message
        if count > limit:
            raise bad_field("operations", f"must be at most {limit} a message, got {count}")
        max_names = self._limits.contributions_per_model
        for operation in operations[:]:  # a slice: the end of a field's iterator is an exception
            self._enqueue(StreamOperation(operation, len(raw) // count, max_names))
        self._start_ready()

    def _enqueue(self, operation: StreamOperation) -> None:
        self._in_flight += 1
        try:
            self._admission.add_bytes(operation.size_bytes)
        except Exception as error:  # noqa: BLE001 - answered in the operation's turn
            operation.refusal = error
        else:
            self._request_bytes += operation.size_bytes
        if self._lanes.add(operation):
            self._startable.append(operation)

    def _start_ready(self) -> None:
        """Start what can be started, unless the client leaves its answers lying."""
        if self._is_starting:
            return
        self._is_starting = True
        while self._startable and self._has_room():
            self._start(self._startable.popleft())
        self._is_starting = False

    def _has_room(self) -> bool:
        """Tell whether the answers that wait, and those to come, leave room for another."""
        return self._answer_bytes + self._expected_bytes < self._limits.message_bytes

    def _start(self, operation: StreamOperation) -> None:
        if operation.refusal:
            self._answer_error(operation, operation.refusal)
            return
        operation.started_at = self._loop.time()
        self._started.add(operation)
        try:
            # Admitted only now: what waits here for its session, or for a client that does not read,
            # must take nobody else's place.
            self._operations.submit(operation, self._histories, self._admit, self._told)
        except Exception as error:  # noqa: BLE001 - answered on the stream
            self._told(operation, error)

    def _admit(self, operation: StreamOperation, answer_bytes: int) -> None:
        held_bytes = self._request_bytes + self._expected_bytes
        self._admission.enter(answer_bytes, held_bytes)
        self._admitted += 1
        operation.is_admitted = True
        operation.expected_bytes = answer_bytes
        self._expected_bytes += answer_bytes

    def _told(self, operation: StreamOperation, outcome: Any) -> None:
        """Answer an operation with its result or its error, unless it was given up."""
        if self._is_closed or operation not in self._started:
            return
        self._started.remove(operation)
        if isinstance(outcome, asyncio.CancelledError) and operation.is_overdue:
            outcome = TimeoutError()
        if isinstance(outcome, BaseException):
            self._answer_error(operation, outcome)
            return
        try:
            raw = self._encode(operation, outcome)
        except Exception as failure:  # noqa: BLE001 - answered on the stream
            self._answer_error(operation, failure)
            return
        self._answer(operation, raw)

    def _encode(self, operation: StreamOperation, result: Any) -> bytes:
        """Return the bytes of a StreamResponse with one result; joined they are one with many."""
        response = pb.StreamResponse()
        answer = response.results.add()
        answer.tag = operation.tag
        if operation.kind == "forward":
            if result.session_id:
                self._histories.answered(
                    result.session_id, result.epoch, result.chunk_seq, result.token
                )
            fill_forward(answer.forward, result)
        else:
            _FILL[operation.kind](getattr(answer, operation.kind), result)
        raw = response.SerializeToString()
        if len(raw) > self._limits.message_bytes:
            raise message_too_large("answer", len(raw), self._limits.message_bytes)
        return raw

    def _answer_error(self, operation: StreamOperation, error: BaseException) -> None:
        if operation.kind == "forward" and operation.request.session_id:
            request = operation.request
            self._histories.failed(request.session_id, request.epoch, request.chunk_seq)
        response = pb.StreamResponse()
        answer = response.results.add()
        answer.tag = operation.tag
        answer.error.CopyFrom(status_of(error, METHOD))
        self._answer(operation, response.SerializeToString())

    def _answer(self, operation: StreamOperation, raw: bytes) -> None:
        if operation.refusal is None:
            held = operation.size_bytes + operation.expected_bytes
            self._admission.leave(held, int(operation.is_admitted))
            self._expected_bytes -= operation.expected_bytes
            self._admitted -= operation.is_admitted
            self._request_bytes -= operation.size_bytes
        self._answers.append(raw)
        self._answer_bytes += len(raw)
        self._startable.extend(self._lanes.remove(operation))
        if self._startable:
            self._start_ready()
        self._wake.set()

    async def _write(self) -> None:
        """Write answers as they come until nothing more can come."""
        while not (self._is_ending and not self._in_flight):
            if not self._answers:
                self._wake.clear()
                await self._wake.wait()
                continue
            count, frame = self._take_frame()
            await self._context.write(frame)
            self._answer_bytes -= len(frame)
            self._in_flight -= count
            self._room.set()
            self._start_ready()

    def _take_frame(self) -> tuple[int, bytes]:
        """Take as many answers as fit into one message, at least one."""
        answers = self._answers
        parts = [answers.popleft()]
        size = len(parts[0])
        while answers and size + len(answers[0]) <= self._limits.message_bytes:
            size += len(answers[0])
            parts.append(answers.popleft())
        return len(parts), parts[0] if len(parts) == 1 else b"".join(parts)

    def _sweep(self) -> None:
        """Give up what is overdue; end the stream when it is idle or old."""
        now = self._loop.time()
        for operation in [
            each for each in self._started if now - each.started_at > self._rules.deadline_s
        ]:
            self._give_up(operation)
        if not self._in_flight and now - self._last_read > self._rules.idle_s:
            self._end(idle_stream(self._rules.idle_s))
        if now - self._born > self._rules.age_s:
            self.drain()
        self._sweeper = self._loop.call_later(self._rules.sweep_s, self._sweep)

    def _give_up(self, operation: StreamOperation) -> None:
        """Answer what took too long; a task is asked to end first, a chunk is carried to its end."""
        if operation.task is None:
            self._told(operation, TimeoutError())
        else:
            operation.is_overdue = True
            operation.task.cancel()

    def _close(self) -> None:
        """Give back what is held, whatever the stream ended with."""
        self._is_closed = True
        self._end()
        self._admission.leave(self._request_bytes + self._expected_bytes, self._admitted)
        for operation in self._started:
            if operation.task:
                operation.task.cancel()


_FILL: dict[str, Callable[[Any, Any], None]] = {
    "backward": fill_backward,
    "update": fill_update,
    "discard_gradients": fill_discard,
}
