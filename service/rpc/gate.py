"""Between gRPC and the dispatcher: what every RPC passes, whichever service it is for.

The gate gives a call its deadline, reads and writes its messages as bytes, turns whatever goes wrong
into a status and reports the end; the dispatcher decides who is let in and what is done. The gate
wraps the handlers of a service by the service's descriptor, so a new method cannot forget it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import grpc
import grpc.aio

from service.deadlines import Deadlines
from service.domain.errors import ResourceExhausted
from service.rpc import audit
from service.rpc.errors import (
    DETAILS_KEY,
    OVERLOADED,
    Unauthenticated,
    code_of,
    malformed,
    refusal_of,
    refusal_to_status,
)
from service.rpc.logins import LoginThrottle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator

    from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
    from google.protobuf.message import Message

    from service.domain.errors import DomainError
    from service.rpc.admission import Share, TenantAdmission
    from service.rpc.arrivals import Arrivals
    from service.rpc.auth import Context, Principal
    from service.rpc.codec import Codec
    from service.rpc.dispatcher import Dispatcher, Operation
    from service.telemetry import Observer

    Handler: TypeAlias = Callable[[Context, "Traffic"], Awaitable[bytes | None]]

T = TypeVar("T")

_CANCELLED = grpc.StatusCode.CANCELLED.name
_OK = grpc.StatusCode.OK.name

_LOGGER = logging.getLogger(__name__)


@dataclass(slots=True)
class Traffic:
    """What a call has read and written so far.

    Attributes:
        request_bytes: Of messages read.
        answer_bytes: Of messages written.
        principal: Who calls, once that is known.
        tenant: The bounds of its tenant, if it has any of its own.
        request: The first message read.
        answer: The answer, where there is one and no more.
    """

    request_bytes: int = 0
    answer_bytes: int = 0
    principal: Principal | None = None
    tenant: TenantAdmission | None = None
    request: Message | None = None
    answer: Message | None = None


@dataclass(frozen=True, slots=True)
class RpcCall:
    """One RPC with a stream of messages that was let in.

    Attributes:
        context: gRPC's side of the call.
        share: What the call holds of the replica, and for whom.
    """

    context: Context
    share: Share

    @property
    def tenant(self) -> str:
        """Return whose data the call sees."""
        return self.share.principal.tenant


class Gate:
    """Serves the methods of services over gRPC."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        codec: Codec,
        *,
        observer: Observer,
        default_deadline_s: float,
        arrivals: Arrivals,
        public_arrivals: Arrivals,
    ) -> None:
        self._dispatcher = dispatcher
        self._codec = codec
        self._observer = observer
        self._deadlines = Deadlines(default_deadline_s)
        self._throttle = LoginThrottle()
        self._arrivals = arrivals
        self._public_arrivals = public_arrivals

    def wrap(
        self, service: ServiceDescriptor, servicer: object, *, is_always_served: bool = False
    ) -> grpc.GenericRpcHandler:
        """Return a service's handlers, each behind the gate.

        Args:
            service: The contract.
            servicer: Has an attribute for each of the contract's methods, named in snake case: for a
                unary one what `Dispatcher.register` says; with a streaming answer an async iterator
                `f(call, request)`; with a streaming request `f(call, requests) -> response` over an
                async iterator; with both `f(call) -> None`, which reads and writes bytes on
                `call.context` itself.
            is_always_served: Whether it is served also when the replica is full or drains.
        """
        handlers = {
            method.name: self._handler(method, servicer, is_always_served=is_always_served)
            for method in service.methods
        }
        return grpc.method_handlers_generic_handler(service.full_name, handlers)

    def _handler(
        self, method: MethodDescriptor, servicer: object, *, is_always_served: bool
    ) -> grpc.RpcMethodHandler[Any, Any]:
        operation = self._dispatcher.register(method, servicer, is_always_served=is_always_served)
        build, serve = {
            # gRPC reads the message of a unary request before it asks anybody. As a stream of one message
            # it is read when there is room for it, and a client sees no difference.
            (False, False): (grpc.stream_unary_rpc_method_handler, self._unary),
            (False, True): (grpc.stream_stream_rpc_method_handler, self._server_stream),
            (True, False): (grpc.stream_unary_rpc_method_handler, self._client_stream),
            (True, True): (grpc.stream_stream_rpc_method_handler, self._duplex),
        }[method.client_streaming, method.server_streaming]
        # What an open service is asked is no operation, and a duplex call reports each of its own.
        is_operation = not (is_always_served or serve == self._duplex)
        return build(self._guard(operation, serve(operation), is_operation=is_operation))

    def _guard(
        self, operation: Operation, handler: Handler, *, is_operation: bool
    ) -> Callable[[Any, Context], Awaitable[Any]]:
        """Turn everything that a handler raises into a status, and report how the call ended."""
        method, observer = operation.method, self._observer

        async def guarded(_: object, context: Context) -> Any:
            if _LOGGER.isEnabledFor(logging.DEBUG):
                watched: Any = context  # its stubs declare another kind of callback
                watched.add_done_callback(_log_end_of(method))
            observer.rpc_started(method, context.invocation_metadata)
            began, traffic = time.perf_counter(), Traffic()
            code = outcome = _CANCELLED
            try:
                answer = await handler(context, traffic)
                code = outcome = _OK
            except (Exception, asyncio.CancelledError) as error:
                if _is_over(error):
                    raise
                refusal = refusal_of(error, method)
                code, outcome = code_of(refusal).name, refusal.reason
                # Its frames hold the request, and this one holds it: a cycle, which stays until the
                # garbage collector comes.
                refusal.with_traceback(None)
            else:
                return answer
            finally:
                duration_s = time.perf_counter() - began
                if is_operation:
                    observer.operation_ended(
                        operation.kind,
                        outcome=outcome,
                        code=code,
                        duration_s=duration_s,
                        request_bytes=traffic.request_bytes,
                        answer_bytes=traffic.answer_bytes,
                    )
                observer.rpc_ended(method, code=code, duration_s=duration_s)
                if operation.is_audited and traffic.principal is not None:
                    audit.operation_ended(
                        operation.kind,
                        principal=traffic.principal,
                        peer=context.peer(),
                        outcome=outcome,
                        request=traffic.request,
                        answer=traffic.answer,
                    )
            if isinstance(refusal, Unauthenticated):
                await self._throttle.hold(context.peer())
            elif refusal.reason == OVERLOADED and traffic.tenant is not None:
                await traffic.tenant.hold_refusal(context.time_remaining())
            return await _abort(context, refusal)

        return guarded

    def _bounded(self, context: Context, steps: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
        # A client's own deadline is gRPC's to keep: it cancels the handler.
        is_bounded = context.time_remaining() is not None
        return steps if is_bounded else self._deadlines.bound(steps)

    @contextlib.contextmanager
    def _let_in(self, operation: Operation, context: Context, traffic: Traffic) -> Iterator[Share]:
        """Let a call in that is one operation; without room for its bytes its tenant's rates stay as before."""
        with self._dispatcher.let_in(operation, context) as share:
            traffic.principal, traffic.tenant = share.principal, share.tenant
            share.take(0, operations=1)
            try:
                yield share
            except ResourceExhausted as refusal:
                if refusal.reason == OVERLOADED:
                    share.uncount()
                raise

    def _unary(self, operation: Operation) -> Handler:
        dispatcher, codec = self._dispatcher, self._codec

        async def handle(context: Context, traffic: Traffic) -> bytes:
            with self._let_in(operation, context, traffic) as share:
                request = await self._receive(operation, context, share=share, traffic=traffic)
                steps = dispatcher.call(operation, request, share)
                del request  # its arrays were copied out of it
                traffic.answer = message = await self._bounded(context, steps)
                answer = codec.serialize(message)
                traffic.answer_bytes = len(answer)
                return answer

        return handle

    def _server_stream(self, operation: Operation) -> Handler:
        async def handle(context: Context, traffic: Traffic) -> None:
            with self._let_in(operation, context, traffic) as share:
                request = await self._receive(operation, context, share=share, traffic=traffic)
                messages = operation.behaviour(RpcCall(context, share), request)
                writing = self._write_all(context, messages, traffic)
                # A health watch has no end.
                await (writing if operation.is_always_served else self._bounded(context, writing))

        return handle

    def _client_stream(self, operation: Operation) -> Handler:
        async def handle(context: Context, traffic: Traffic) -> bytes:
            with self._let_in(operation, context, traffic) as share:
                requests = self._read_all(operation, context, share=share, traffic=traffic)
                steps = operation.behaviour(RpcCall(context, share), requests)
                traffic.answer = message = await self._bounded(context, steps)
                answer = self._codec.serialize(message)
                traffic.answer_bytes = len(answer)
                return answer

        return handle

    def _duplex(self, operation: Operation) -> Handler:
        async def handle(context: Context, _: Traffic) -> None:
            with self._dispatcher.let_in(operation, context) as share:
                await operation.behaviour(RpcCall(context, share))

        return handle

    async def _write_all(
        self, context: Context, messages: AsyncIterator[Message], traffic: Traffic
    ) -> None:
        async for message in messages:
            raw = self._codec.serialize(message)
            await context.write(raw)
            traffic.answer_bytes += len(raw)

    async def _receive(
        self, operation: Operation, context: Context, *, share: Share, traffic: Traffic
    ) -> Message:
        """Read the message of a unary request, and count its bytes."""
        arrivals = self._public_arrivals if operation.is_always_served else self._arrivals
        raw = await arrivals.read(context, share.principal.tenant)
        if raw is grpc.aio.EOF:
            raise malformed(operation.request_class.DESCRIPTOR.name)
        size = traffic.request_bytes = len(raw)
        share.take_transfer(size)
        request = self._codec.parse(operation.request_class, raw)
        if operation.is_audited:
            traffic.request = request
        return request

    async def _read_all(
        self, operation: Operation, context: Context, *, share: Share, traffic: Traffic
    ) -> AsyncIterator[Message]:
        tenant = share.principal.tenant
        while (raw := await self._arrivals.read(context, tenant)) is not grpc.aio.EOF:
            traffic.request_bytes += len(raw)
            message = self._codec.parse(operation.request_class, raw)
            traffic.request = traffic.request or message
            yield message


def _is_over(error: BaseException) -> bool:
    """Return whether nobody waits for an answer any more, so that there is none to give."""
    if isinstance(error, grpc.aio.BaseError):
        return True  # raised by gRPC when the client is gone
    if not isinstance(error, asyncio.CancelledError):
        return False
    task = asyncio.current_task()
    # gRPC cancels the task of a call when the client goes away or the server stops.
    return task is None or bool(task.cancelling())


async def _abort(context: Context, refusal: DomainError) -> None:
    """End a call with the status of a refusal."""
    status = refusal_to_status(refusal)
    trailers = ((DETAILS_KEY, status.SerializeToString()),) if status.details else ()
    await context.abort(code_of(refusal), status.message, trailers)


def _log_end_of(method: str) -> Callable[[Any], None]:
    """Return what writes the line of a call when it has ended; ids and contents stay out of it."""
    began = time.perf_counter()

    def log(ended: Any) -> None:
        code = ended.code() or grpc.StatusCode.OK
        name = getattr(code, "name", code)
        _LOGGER.debug("%s %s in %.1f ms", method, name, 1000 * (time.perf_counter() - began))

    return log
