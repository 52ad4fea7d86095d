"""From a request message to the domain and back, the same way for every operation.

A unary call and an operation on a stream pass the same steps: authorise the principal, decode the
request, admit what it and its answer will hold, run, encode. A unary call awaits its answer (`let_in`,
`call`), a stream is called back (`begin`). Nothing here depends on gRPC, so another protocol on the same
port can do either.

The table has a row for each method of the contract, made from its descriptor by `register`. An operation
on a stream stands for the unary method that takes the same request message.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from google.protobuf.message_factory import GetMessageClass

from service.rpc.admission import Admission, Share
from service.rpc.audit import UNAUDITED
from service.rpc.auth import ANONYMOUS
from service.rpc.errors import draining
from service.rpc.permissions import PUBLIC, kind_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from google.protobuf.descriptor import Descriptor, MethodDescriptor
    from google.protobuf.message import Message

    from service.rpc.admission import TenantAdmissions
    from service.rpc.auth import Authenticator, Caller, Principal

    Begin: TypeAlias = Callable[[str, Any, Callable[[Any], None]], None]


def _as_it_is(request: Any) -> Any:
    return request


def _nothing_large(tenant: str, value: Any) -> int:  # noqa: ARG001 - as `Steps.answer_bytes`
    return 0


def _is_the_response(empty: Any, result: Any) -> Any:  # noqa: ARG001 - as `Steps.encode`
    return result


@dataclass(frozen=True, slots=True)
class Steps:
    """What is particular to one kind of operation.

    Attributes:
        run: Does it: `run(tenant, value)` returns the domain's result.
        decode: Returns the domain's value of a request message, or refuses it.
        answer_bytes: Returns the most bytes that the arrays of the answer can have.
        encode: Writes a result into an empty response message and returns the message.
        begin: Does it without a task of its own: `begin(tenant, value, on_done)` returns at once, and
            `on_done` is called with the result or the exception. None where there is only `run`.
    """

    run: Callable[[str, Any], Awaitable[Any]]
    decode: Callable[[Any], Any] = _as_it_is
    answer_bytes: Callable[[str, Any], int] = _nothing_large
    encode: Callable[[Any, Any], Any] = _is_the_response
    begin: Begin | None = None

    def prepare(self, tenant: str, request: Message, admit: Callable[[int], None]) -> Any:
        """Return the value of a request once there is room for its answer."""
        value = self.decode(request)
        admit(self.answer_bytes(tenant, value))
        return value


@dataclass(frozen=True, slots=True)
class Operation:
    """One row of the table: a method of the contract.

    Attributes:
        method: Its path, such as "/timernn.v1.TimeRnnService/Forward".
        kind: Its name in snake case, such as "forward".
        request_class: The message that it takes.
        response_class: The message that it returns.
        behaviour: What serves it: the `Steps` of a unary method, and of others what the gate calls.
        is_always_served: Whether it is served also when the replica is full or drains: health, reflection.
        is_audited: Whether it has a line in the audit log.
    """

    method: str
    kind: str
    request_class: type[Message]
    response_class: type[Message]
    behaviour: Any
    is_always_served: bool = False
    is_audited: bool = False


class Dispatcher:
    """The table of operations, and the steps that each of them passes.

    Attributes:
        admission: What this replica has in work.
        unbounded: The same of what is always served.
        is_draining: Set once the server takes no more calls.
        operations: The rows of the table by their method.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        admission: Admission,
        tenants: TenantAdmissions | None = None,
    ) -> None:
        self.admission = admission
        self._tenants = tenants
        self.is_draining = False
        self._authenticator = authenticator
        self.unbounded = Admission(sys.maxsize, sys.maxsize)
        self.operations: dict[str, Operation] = {}
        self._by_request: dict[str, Operation] = {}

    def register(
        self, method: MethodDescriptor, servicer: object, *, is_always_served: bool = False
    ) -> Operation:
        """Add a method to the table and return its row.

        Args:
            method: The method, as the contract describes it.
            servicer: Has an attribute for each method of its service, named in snake case: for a unary
                one `Steps`, or `f(tenant, request) -> response`, which is all steps in one.
            is_always_served: Whether it is served also when the replica is full or drains.
        """
        kind = kind_of(method.name)
        behaviour = getattr(servicer, kind)
        is_unary = not (method.client_streaming or method.server_streaming)
        if is_unary and not isinstance(behaviour, Steps):
            behaviour = Steps(run=behaviour)
        operation = Operation(
            method=f"/{method.containing_service.full_name}/{method.name}",
            kind=kind,
            request_class=GetMessageClass(method.input_type),
            response_class=GetMessageClass(method.output_type),
            behaviour=behaviour,
            is_always_served=is_always_served,
            is_audited=kind not in UNAUDITED,
        )
        self.operations[operation.method] = operation
        if is_unary:
            self._by_request[method.input_type.full_name] = operation
        return operation

    def operation_of(self, request: Descriptor) -> Operation:
        """Return the unary operation that takes this kind of message."""
        return self._by_request[request.full_name]

    def let_in(self, operation: Operation, caller: Caller) -> Share:
        """Return an empty share for a call, or refuse it for who calls, or because the replica drains."""
        if operation.method in PUBLIC:
            principal = ANONYMOUS
        else:
            principal = self._authenticator.authenticate(caller)
            self._authenticator.authorise(principal, operation.method)
        if self.is_draining and not operation.is_always_served:
            raise draining()
        if operation.is_always_served:
            return Share(self.unbounded, principal)
        tenant = None if self._tenants is None else self._tenants.of(principal.tenant)
        return Share(self.admission, principal, tenant)

    async def call(self, operation: Operation, request: Message, share: Share) -> Message:
        """Run an operation that was let in, and return its response.

        Args:
            operation: The operation, which has `Steps`.
            request: Its message.
            share: Holds the operation and the bytes of its request.
        """
        steps: Steps = operation.behaviour
        tenant = share.principal.tenant
        value = steps.prepare(tenant, request, share.take)
        del request  # while the operation runs, its arrays are there once
        result = await steps.run(tenant, value)
        response: Message = steps.encode(operation.response_class(), result)
        return response

    def begin(
        self,
        operation: Operation,
        request: Message,
        *,
        principal: Principal,
        complete: Callable[[Any], None],
        admit: Callable[[int], None],
        on_done: Callable[[Any], None],
    ) -> asyncio.Task[Any] | None:
        """Begin an operation on a stream; raise a DomainError when it is refused.

        Args:
            operation: The operation, which has `Steps`.
            request: Its message.
            principal: The caller of the stream; it is authorised anew for each operation.
            complete: Called with the message before it is decoded, to fill in what the stream knows; it
                may refuse.
            admit: Called with the most bytes that the answer can have; it may refuse.
            on_done: Called once with the result or the exception, unless the operation was refused.

        Returns:
            The task that the operation runs as, if it is one.
        """
        self._authenticator.authorise(principal, operation.method)
        complete(request)
        steps: Steps = operation.behaviour
        tenant = principal.tenant
        value = steps.prepare(tenant, request, admit)
        if steps.begin:
            steps.begin(tenant, value, on_done)
            return None
        task = asyncio.ensure_future(steps.run(tenant, value))
        task.add_done_callback(partial(_report, on_done))
        return task


def _report(on_done: Callable[[Any], None], task: asyncio.Task[Any]) -> None:
    """Call back with a task's result, or with what it ended with instead."""
    on_done(asyncio.CancelledError() if task.cancelled() else task.exception() or task.result())
