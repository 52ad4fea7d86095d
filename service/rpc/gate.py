"""The one place every call passes, whichever service it is for.

The gate asks who calls, whether the server drains and whether there is room; parses; gives the call
its deadline; and turns whatever goes wrong into a status. It wraps the handlers of a service by the
service's descriptor, so a new method cannot forget it. Messages reach gRPC as bytes: what cannot be
parsed is then refused here and not by gRPC with UNKNOWN.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from service.deadlines import Deadlines
from service.rpc.admission import Ticket
from service.rpc.errors import (
    DETAILS_KEY,
    code_of,
    draining,
    malformed,
    message_too_large,
    status_of,
)
from service.rpc.wire import Wire

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

    from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

    from service.rpc.admission import Admission
    from service.rpc.auth import Authenticator, Context, Principal

    Behaviour: TypeAlias = Callable[..., Any]
    Handler: TypeAlias = Callable[[Any, Context], Awaitable[Any]]

M = TypeVar("M", bound=Message)
T = TypeVar("T")

_LOGGER = logging.getLogger(__name__)
_WORD_START: Final = re.compile(r"(?<!^)(?=[A-Z])")


@dataclass(frozen=True, slots=True)
class Call:
    """One call that was let in.

    Attributes:
        principal: Who calls.
        context: gRPC's side of the call.
        ticket: The call's share of what the replica takes at once.
    """

    principal: Principal
    context: Context
    ticket: Ticket

    @property
    def tenant(self) -> str:
        """Return whose data the call sees."""
        return self.principal.tenant


@dataclass(frozen=True, slots=True)
class Method:
    """What the gate knows of one RPC."""

    path: str
    request_class: type[Message]
    is_open: bool  # neither counted nor refused while draining: health, reflection


class Gate:
    """Lets calls in.

    Attributes:
        admission: What this replica has in work; a stream counts each operation there itself.
        is_draining: Set once the server takes no more calls.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        admission: Admission,
        *,
        message_bytes: int,
        default_deadline_s: float,
    ) -> None:
        self._authenticator = authenticator
        self._message_bytes = message_bytes
        self._wires: dict[type[Message], Wire] = {}
        self._deadlines = Deadlines(default_deadline_s)
        self.admission = admission
        self.is_draining = False

    def wrap(
        self, service: ServiceDescriptor, servicer: object, *, is_open: bool = False
    ) -> grpc.GenericRpcHandler:
        """Return a service's handlers, each behind the gate.

        Args:
            service: The contract.
            servicer: Has a method for each of the contract's, named in snake case:
                `f(call, request) -> response`; with a streaming answer an async iterator; with a
                streaming request `f(call, requests)` over an async iterator; with both
                `f(call) -> None`, which reads and writes bytes on `call.context` itself.
            is_open: Whether it is served also when the replica is full or drains.
        """
        handlers = {
            method.name: self._handler(method, servicer, is_open=is_open)
            for method in service.methods
        }
        return grpc.method_handlers_generic_handler(service.full_name, handlers)

    def parse(self, message_class: type[M], raw: bytes) -> M:
        """Return a message from its bytes, or raise MALFORMED or MESSAGE_TOO_LARGE."""
        if len(raw) > self._message_bytes:
            raise message_too_large("request", len(raw), self._message_bytes)
        wire = self._wires.get(message_class)
        if wire is None:
            wire = self._wires[message_class] = Wire(message_class)
        wire.check(raw)
        try:
            return message_class.FromString(raw)
        except DecodeError as error:
            raise malformed(message_class.DESCRIPTOR.name) from error

    def serialize(self, message: Message) -> bytes:
        """Return a message's bytes, or raise MESSAGE_TOO_LARGE."""
        raw = message.SerializeToString()
        if len(raw) > self._message_bytes:
            raise message_too_large("answer", len(raw), self._message_bytes)
        return raw

    def _handler(
        self, descriptor: MethodDescriptor, servicer: object, *, is_open: bool
    ) -> grpc.RpcMethodHandler[Any, Any]:
        path = f"/{descriptor.containing_service.full_name}/{descriptor.name}"
        method = Method(path, GetMessageClass(descriptor.input_type), is_open)
        behaviour = getattr(servicer, _WORD_START.sub("_", descriptor.name).lower())
        shape = (descriptor.client_streaming, descriptor.server_streaming)
        build, serve = {
            (False, False): (grpc.unary_unary_rpc_method_handler, self._unary),
            (False, True): (grpc.unary_stream_rpc_method_handler, self._server_stream),
            (True, False): (grpc.stream_unary_rpc_method_handler, self._client_stream),
            (True, True): (grpc.stream_stream_rpc_method_handler, self._duplex),
        }[shape]
        return build(self._guard(method, serve(method, behaviour)))

    def _guard(self, method: Method, handler: Handler) -> Handler:
        """Turn everything that a handler raises into a status."""

        async def guarded(request: Any, context: Context) -> Any:
            if _LOGGER.isEnabledFor(logging.DEBUG):
                watched: Any = context  # its stubs tell another kind of callback
                watched.add_done_callback(_log_end_of(method.path))
            try:
                return await handler(request, context)
            except grpc.aio.BaseError:
                raise  # an abort, or gRPC's word that the client is gone
            except asyncio.CancelledError as error:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise  # the client went away, or the server stops
                status = status_of(error, method.path)
            except Exception as error:  # noqa: BLE001 - the outermost boundary
                status = status_of(error, method.path)
            trailers = ((DETAILS_KEY, status.SerializeToString()),)
            return await context.abort(code_of(status), status.message, trailers)

        return guarded

    def _admit(self, method: Method, context: Context) -> Principal:
        principal = self._authenticator.authenticate(method.path, context)
        if self.is_draining and not method.is_open:
            raise draining()
        return principal

    def _bounded(self, context: Context, steps: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
        # A client's own deadline is gRPC's to keep: it cancels the handler.
        is_bounded = context.time_remaining() is not None
        return steps if is_bounded else self._deadlines.bound(steps)

    def _ticket(self, method: Method, size_bytes: int) -> Ticket:
        return Ticket(None if method.is_open else self.admission, size_bytes)

    def _unary(self, method: Method, behaviour: Behaviour) -> Handler:
        async def handle(raw: bytes, context: Context) -> bytes:
            principal = self._admit(method, context)
            with self._ticket(method, len(raw)) as ticket:
                request = self.parse(method.request_class, raw)
                steps = behaviour(Call(principal, context, ticket), request)
                response = await self._bounded(context, steps)
                return self.serialize(response)

        return handle

    def _server_stream(self, method: Method, behaviour: Behaviour) -> Handler:
        async def handle(raw: bytes, context: Context) -> None:
            principal = self._admit(method, context)
            with self._ticket(method, len(raw)) as ticket:
                request = self.parse(method.request_class, raw)
                call = Call(principal, context, ticket)
                if method.is_open:  # a health watch has no end
                    await self._write_all(context, behaviour(call, request))
                    return
                writing = self._write_all(context, behaviour(call, request))
                await self._bounded(context, writing)

        return handle

    def _client_stream(self, method: Method, behaviour: Behaviour) -> Handler:
        async def handle(_: object, context: Context) -> bytes:
            principal = self._admit(method, context)
            with self._ticket(method, 0) as ticket:
                call = Call(principal, context, ticket)
                steps = behaviour(call, self._read_all(method, context))
                response = await self._bounded(context, steps)
                return self.serialize(response)

        return handle

    def _duplex(self, method: Method, behaviour: Behaviour) -> Handler:
        async def handle(_: object, context: Context) -> None:
            principal = self._admit(method, context)
            await behaviour(Call(principal, context, Ticket(None, 0)))

        return handle

    async def _write_all(self, context: Context, messages: AsyncIterator[Message]) -> None:
        async for message in messages:
            await context.write(self.serialize(message))

    async def _read_all(self, method: Method, context: Context) -> AsyncIterator[Message]:
        while (raw := await context.read()) is not grpc.aio.EOF:
            yield self.parse(method.request_class, raw)


def _log_end_of(path: str) -> Callable[[Any], None]:
    """Return what writes the line of a call when it has ended; ids and contents stay out of it."""
    began = time.perf_counter()

    def log(ended: Any) -> None:
        code = ended.code() or grpc.StatusCode.OK
        name = getattr(code, "name", code)
        _LOGGER.debug("%s %s in %.1f ms", path, name, 1000 * (time.perf_counter() - began))

    return log
