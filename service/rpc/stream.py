"""TimeRnnService.Stream: many operations for many sessions over one call.

One task reads, one writes. Between them a chunk has no task of its own: the domain is given a callback.
Answers that are ready together leave in one message.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextvars import copy_context
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Final

import grpc.aio

from service.domain.errors import bad_field
from service.rpc import audit
from service.rpc.errors import (
    code_of,
    idle_stream,
    refusal_of,
    refusal_to_status,
)
from service.rpc.histories import Histories
from service.rpc.operation_order import OperationOrder, StreamOperation
from service.rpc.stream_budget import StreamBudget
from timernn.v1 import time_rnn_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Mapping

    from service.rpc.codec import Codec
    from service.rpc.dispatcher import Dispatcher, Operation
    from service.rpc.gate import RpcCall
    from service.settings import Limits
    from service.telemetry import Observer

METHOD: Final = "/timernn.v1.TimeRnnService/Stream"
_FORWARD: Final = "forward"


@dataclass(frozen=True, slots=True)
class StreamRules:
    """How long things may take on a stream, in seconds.

    Attributes:
        deadline_s: One operation.
        idle_s: Nothing in work and nothing coming; then the stream ends with IDLE_STREAM.
        quiet_s: Nothing has come; the stream may have half of a message, so that only some may be quiet.
        age_s: A stream; then the client is asked to open another, so that streams spread over
            replicas again and none is cut off when its connection reaches its age.
        goodbye_s: For the client to half-close after the message `draining`.
        sweep_s: Between two checks of deadlines, idleness and age.
    """

    deadline_s: float = 60.0
    idle_s: float = 300.0
    quiet_s: float = 30.0
    age_s: float = 300.0
    goodbye_s: float = 1.0
    sweep_s: float = 1.0


class _State(Enum):
    """How far a stream has come; it only goes on, never back."""

    OPEN = 0  # operations are accepted
    ENDING = 1  # none is accepted; the stream ends when those accepted are answered
    DRAINING = 2  # the same, and the client is asked to open another stream
    CLOSED = 3  # nothing is answered any more


# Looking a member up in an Enum is a call of a Python function up to Python 3.11.
_OPEN, _CLOSED = _State.OPEN, _State.CLOSED


class Streams:
    """The open streams of a server, and what they share.

    Attributes:
        dispatcher: Runs their operations.
        codec: Parses what comes, and serializes answers.
        observer: Sees each operation end.
        limits: The limits in force.
        rules: How long things may take.
        open: The streams.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        codec: Codec,
        *,
        observer: Observer,
        limits: Limits,
        rules: StreamRules,
    ) -> None:
        self.dispatcher = dispatcher
        self.codec = codec
        self.observer = observer
        self.limits = limits
        self.rules = rules
        self.open: set[OperationStream] = set()
        self._quiet: dict[OperationStream, None] = {}  # the one that is so for longest first
        self._quiet_limit = max(1, limits.request_bytes_in_flight // 2 // limits.message_bytes)

    @cached_property
    def operations(self) -> Mapping[str, Operation]:
        """Return what each field of the message `Operation` holds, once the table is complete."""
        fields: Any = pb.Operation.DESCRIPTOR.oneofs_by_name["operation"].fields
        return {field.name: self.dispatcher.operation_of(field.message_type) for field in fields}

    async def serve(self, call: RpcCall) -> None:
        """Serve one stream of operations."""
        stream = OperationStream(call, self)
        self.open.add(stream)
        try:
            await stream.run()
        finally:
            self.open.discard(stream)
            self._quiet.pop(stream, None)

    def note(self, stream: OperationStream, *, is_quiet: bool) -> None:
        """Note whether a stream is quiet; one too many asks the client of the first to move.

        What of a message has come cannot be seen, so a quiet stream may hold nearly the largest.
        """
        if not is_quiet:
            self._quiet.pop(stream, None)
            return
        self._quiet[stream] = None
        while len(self._quiet) > self._quiet_limit:
            first = next(iter(self._quiet))
            del self._quiet[first]
            first.drain()

    def drain(self) -> None:
        """Ask every stream to end once it has answered what it accepted."""
        for stream in list(self.open):
            stream.drain()


class OperationStream:
    """One call of Stream.

    Attributes:
        budget: What it holds.
    """

    def __init__(self, call: RpcCall, streams: Streams) -> None:
        self._call = call
        self._streams = streams
        self._order = OperationOrder()
        self._histories = Histories(streams.limits.replay_window + 1, self._order)
        self._startable: deque[StreamOperation] = deque()
        self._started: set[StreamOperation] = set()
        self._answers: deque[bytes] = deque()
        self.budget = StreamBudget(call.share, streams.limits)

        self._wake_writer = asyncio.Event()  # an answer, or the end
        self._wake_reader = asyncio.Event()  # room, or the end
        self._is_starting = False  # an operation may be answered while it is started
        self._state = _OPEN
        self._failure: Exception | None = None
        self._is_used = False  # since the last sweep
        self._born = self._last_used = self._last_read = time.perf_counter()
        self._context = copy_context()

    async def run(self) -> None:
        """Serve until the client half-closes, fails or goes away, or the server drains."""
        # Not cancelled at the end: gRPC ends its read with the call, and a read that is cancelled
        # leaks (grpc/grpc#43360).
        self._reader = asyncio.create_task(self._read(), name="stream reader")
        self._schedule_sweep()
        try:
            # A task of its own: what wakes it would otherwise pass through all that awaits this one.
            await asyncio.create_task(self._write(), name="stream writer")
            if self._failure:
                raise self._failure
            if self._state is _State.DRAINING:
                await self._say_goodbye()
        finally:
            self._sweeper.cancel()
            self._close()

    def drain(self) -> None:
        """Accept nothing more; answer what was accepted, ask the client to move, and end."""
        self._end(_State.DRAINING)

    def _end(self, state: _State = _State.ENDING, failure: Exception | None = None) -> None:
        """Go on to a later state; the first failure of an open stream is what it ends with."""
        if self._state is _OPEN:
            self._failure = failure
        if state.value > self._state.value:
            self._state = state
        self._wake_writer.set()
        self._wake_reader.set()

    async def _say_goodbye(self) -> None:
        """Ask the client to move, and wait a moment until it has.

        The library of a client that writes into an ended call reports INTERNAL.
        """
        await self._call.context.write(pb.StreamResponse(draining=True).SerializeToString())
        await asyncio.wait({self._reader}, timeout=self._streams.rules.goodbye_s)

    # --- reading ----------------------------------------------------------------------------------

    async def _read(self) -> None:
        """Accept what comes; once the stream is ending, drop it until the client has gone."""
        context = self._call.context
        try:
            while self._state is not _CLOSED:
                if self._state is _OPEN and self.budget.is_full(self._wake_reader.set):
                    self._wake_reader.clear()
                    await self._wake_reader.wait()
                    continue
                if pause_s := self.budget.take_pause_s():
                    await asyncio.sleep(pause_s)
                    continue
                raw = await context.read()
                if raw is grpc.aio.EOF:
                    break
                if self._state is _OPEN:
                    self._accept(raw)
        except grpc.aio.BaseError:
            pass  # the call is over
        except Exception as error:  # noqa: BLE001 - the writer raises it
            self._end(failure=error)
        self._end()

    def _accept(self, raw: bytes) -> None:
        self._is_used = True
        operations = self._streams.codec.parse(pb.StreamRequest, raw).operations
        limits = self._streams.limits
        count, limit = len(operations), limits.operations_per_message
        if count > limit:
            raise bad_field("operations", f"must be at most {limit} a message, got {count}")
        max_names = limits.contributions_per_model
        for operation in operations[:]:  # a slice: the end of a field's iterator is an exception
            context = self._context.copy()
            self._enqueue(StreamOperation(operation, max_names, context), len(raw) // count)
        self._start_ready()

    def _enqueue(self, operation: StreamOperation, request_bytes: int) -> None:
        try:
            self.budget.read(operation, request_bytes)
        except Exception as error:  # noqa: BLE001 - answered in the operation's turn
            operation.refusal = error.with_traceback(None)  # whose frames hold the operation
        if not operation.field:
            operation.refusal = bad_field("operation", "required")
        if self._order.add(operation):
            self._startable.append(operation)

    # --- an operation -----------------------------------------------------------------------------

    def _start_ready(self) -> None:
        """Start what can be started, unless the client does not take its answers."""
        if self._is_starting:
            return
        self._is_starting = True
        while self._startable and self.budget.has_room():
            self._start(self._startable.popleft())
        self._is_starting = False

    def _start(self, operation: StreamOperation) -> None:
        operation.started_at = time.perf_counter()
        self._started.add(operation)
        streams, context = self._streams, operation.context
        row = streams.operations.get(operation.field)
        if row is not None:
            context.run(streams.observer.operation_started, row.kind, operation.headers)
        if operation.refusal:
            self._finish(operation, operation.refusal)
            return
        try:
            operation.task = context.run(
                streams.dispatcher.begin,
                streams.operations[operation.field],
                operation.request,
                principal=self._call.share.principal,
                complete=self._complete,
                admit=partial(self.budget.start, operation),
                on_done=partial(self._finish, operation),
            )
        except Exception as error:  # noqa: BLE001 - answered on the stream
            self._finish(operation, error)

    def _complete(self, request: Any) -> None:
        """Fill in the previous_token that a chunk leaves out, as this stream has answered it."""
        if type(request) is not pb.ForwardRequest or request.previous_token:
            return
        if session_id := request.session_id:
            token = self._histories.previous_token(session_id, request.epoch, request.chunk_seq)
            request.previous_token = token

    def _finish(self, operation: StreamOperation, outcome: Any) -> None:
        """Answer an operation with its result or its error, unless it was given up."""
        if self._state is _CLOSED or operation not in self._started:
            return
        self._started.remove(operation)
        if isinstance(outcome, BaseException):
            self._answer_error(operation, outcome)
            return
        try:
            raw = self._encode(operation, outcome)
        except Exception as failure:  # noqa: BLE001 - answered on the stream
            self._answer_error(operation, failure)
            return
        size = len(raw)
        self._observe(operation, "OK", "OK", size)
        self._answer(operation, raw, size)

    def _encode(self, operation: StreamOperation, result: Any) -> bytes:
        """Return the bytes of a StreamResponse with one result; joined they are one with many."""
        field = operation.field
        response = pb.StreamResponse()
        answer = response.results.add()
        answer.tag = operation.tag
        if field == _FORWARD and result.session_id:
            self._histories.answered(result)
        self._streams.operations[field].behaviour.encode(getattr(answer, field), result)
        return self._streams.codec.serialize(response)

    def _answer_error(self, operation: StreamOperation, error: BaseException) -> None:
        if operation.is_overdue and isinstance(error, asyncio.CancelledError):
            error = TimeoutError()
        if operation.field == _FORWARD and operation.request.session_id:
            request = operation.request
            self._histories.failed(request.session_id, request.epoch, request.chunk_seq)
        refusal = refusal_of(error, METHOD)
        self._observe(operation, refusal.reason, code_of(refusal).name)
        response = pb.StreamResponse()
        answer = response.results.add()
        answer.tag = operation.tag
        answer.error.CopyFrom(refusal_to_status(refusal))
        raw = response.SerializeToString()
        self._answer(operation, raw, len(raw))

    def _answer(self, operation: StreamOperation, raw: bytes, size: int) -> None:
        self.budget.answered(operation, size)
        self._answers.append(raw)
        if ready := self._order.remove(operation):
            self._startable.extend(ready)
        if self._startable:
            self._start_ready()
        self._wake_writer.set()

    def _observe(
        self, operation: StreamOperation, outcome: str, code: str, answer_bytes: int = 0
    ) -> None:
        if not operation.field:
            return
        row = self._streams.operations[operation.field]
        # Whose callback this is may be another stream's: chunks of several are committed together. A copy:
        # an operation may end while it is begun, and no context is entered twice.
        operation.context.copy().run(
            self._streams.observer.operation_ended,
            row.kind,
            outcome=outcome,
            code=code,
            duration_s=time.perf_counter() - operation.started_at,
            request_bytes=operation.request_bytes,
            answer_bytes=answer_bytes,
        )
        if row.is_audited:
            audit.operation_ended(
                row.kind,
                principal=self._call.share.principal,
                peer=self._call.context.peer(),
                outcome=outcome,
                request=operation.request,
            )

    # --- writing ----------------------------------------------------------------------------------

    async def _write(self) -> None:
        """Write answers as they come until nothing more can come."""
        budget = self.budget
        while self._state is _OPEN or budget.operations:
            if not self._answers:
                self._wake_writer.clear()
                await self._wake_writer.wait()
                continue
            count, frame = 1, self._answers.popleft()
            if self._answers:
                count, frame = self._join(frame)
            await self._call.context.write(frame)
            budget.written(count, len(frame))
            self._wake_reader.set()
            if self._startable:
                self._start_ready()

    def _join(self, first: bytes) -> tuple[int, bytes]:
        """Take as many answers as fit into one message with the first; return their number and bytes."""
        answers, parts, size = self._answers, [first], len(first)
        while answers and size + len(answers[0]) <= self._streams.limits.message_bytes:
            size += len(answers[0])
            parts.append(answers.popleft())
        return len(parts), b"".join(parts)

    # --- ends -------------------------------------------------------------------------------------

    def _schedule_sweep(self) -> None:
        loop = asyncio.get_running_loop()
        self._sweeper = loop.call_later(self._streams.rules.sweep_s, self._sweep)

    def _sweep(self) -> None:
        """Give up what is overdue; end the stream when it is idle or old."""
        now, rules = time.perf_counter(), self._streams.rules
        if self._is_used:
            self._last_read = now
        is_quiet = self._state is _OPEN and now - self._last_read > rules.quiet_s
        self._streams.note(self, is_quiet=is_quiet)
        for operation in [
            each for each in self._started if now - each.started_at > rules.deadline_s
        ]:
            self._give_up(operation)
        if self._is_used or self.budget.operations:
            self._is_used, self._last_used = False, now
        elif now - self._last_used > rules.idle_s:
            self._end(failure=idle_stream(rules.idle_s))
        if now - self._born > rules.age_s:
            self.drain()
        self._schedule_sweep()

    def _give_up(self, operation: StreamOperation) -> None:
        """Answer what took too long; a task is asked to end first, a chunk goes on to its end."""
        if operation.task is None:
            self._finish(operation, TimeoutError())
        else:
            operation.is_overdue = True
            operation.task.cancel()

    def _close(self) -> None:
        """Cancel what still runs, whatever the stream ended with; the share is its caller's."""
        self._end(_CLOSED)
        for operation in self._started:
            self._observe(operation, "CANCELLED", "CANCELLED")
            if operation.task:
                operation.task.cancel()
