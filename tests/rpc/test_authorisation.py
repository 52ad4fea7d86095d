"""Who may do what is asked for each operation, also of a stream that is open for long."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest

from service.rpc.auth import AllowAll
from service.rpc.errors import PermissionDenied, Unauthenticated
from timernn.v1 import time_rnn_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from service.rpc.auth import Caller, Principal

    Serve = Callable[..., Awaitable[Any]]
    Refused = Callable[[Awaitable[Any]], Awaitable[Any]]
    MakeTensor = Callable[..., Any]
    Unpack = Callable[[Any], Any]
    Until = Callable[[Callable[[], Any]], Awaitable[None]]

SERVICE = "/timernn.v1.TimeRnnService"
UPDATE = pb.UpdateRequest(model_id="m", request_id="r")


class Guard(AllowAll):
    """Knows one caller, lets it do what is not forbidden, and until its credential has expired.

    Attributes:
        forbidden: Methods that it may not call.
        is_expired: Whether the credential is not good any more.
        asked: The methods it was asked about, in order.
        logins: How often it was asked who calls.
    """

    def __init__(self, *forbidden: str) -> None:
        self.forbidden = {f"{SERVICE}/{name}" for name in forbidden}
        self.is_expired = False
        self.asked: list[str] = []
        self.logins = 0

    def authenticate(self, caller: Caller) -> Principal:
        """Count the login."""
        self.logins += 1
        return super().authenticate(caller)

    def authorise(self, principal: Principal, method: str) -> None:
        """Refuse what is forbidden, and everything after the end."""
        del principal
        self.asked.append(method.rpartition("/")[2])
        if self.is_expired:
            raise Unauthenticated("BAD_CREDENTIALS", "the token has expired")
        if method in self.forbidden:
            raise PermissionDenied("ROLE", "needs the role train")


def chunk(tensor: MakeTensor, chunk_seq: int, session_id: str = "a") -> pb.Operation:
    """A Forward whose tag is its number."""
    request = pb.ForwardRequest(
        session_id=session_id, epoch=1, chunk_seq=chunk_seq, xs=tensor(1, 1, 1)
    )
    return pb.Operation(tag=chunk_seq, forward=request)


async def send(call: Any, *operations: pb.Operation) -> None:
    """Send operations as one message."""
    await call.write(pb.StreamRequest(operations=operations))


async def read(call: Any, count: int) -> dict[int, pb.OperationResult]:
    """Read until so many results have come; by their tags."""
    results: dict[int, pb.OperationResult] = {}
    while len(results) < count:
        message = await call.read()
        assert message is not grpc.aio.EOF, results
        results |= {result.tag: result for result in message.results}
    return results


async def test_each_operation_of_a_stream_is_authorised_as_its_method(
    serve: Serve, tensor: MakeTensor
) -> None:
    """The caller is asked for once, the permission for the stream and for each operation of a frame."""
    guard = Guard()
    call = (await serve(authenticator=guard)).rnn.Stream()
    discard = pb.DiscardGradientsRequest(model_id="m")
    await send(
        call,
        chunk(tensor, 1),
        pb.Operation(tag=2, update=UPDATE),
        pb.Operation(tag=3, discard_gradients=discard),
    )
    await read(call, 3)
    assert guard.asked == ["Stream", "Forward", "Update", "DiscardGradients"]
    assert guard.logins == 1


async def test_a_forbidden_operation_is_answered_and_the_stream_stays_open(
    serve: Serve, tensor: MakeTensor, unpack: Unpack
) -> None:
    """In a frame, what needs another role gets its own status; its neighbours are not disturbed."""
    served = await serve(authenticator=Guard("Update"))
    call = served.rnn.Stream()
    await send(call, chunk(tensor, 1), pb.Operation(tag=9, update=UPDATE))
    results = await read(call, 2)
    refusal = unpack(results[9].error)
    assert (refusal.code, refusal.reason) == ("PERMISSION_DENIED", "ROLE")
    assert results[1].forward.chunk_seq == 1
    assert len(served.domain.asked) == 1
    await send(call, chunk(tensor, 2))
    assert (await read(call, 1))[2].HasField("forward")


async def test_a_credential_that_expires_ends_no_operation_that_was_admitted(
    serve: Serve, tensor: MakeTensor, unpack: Unpack, until: Until
) -> None:
    """What runs is finished and answered; what comes later is refused, on a stream that stays open."""
    guard = Guard()
    served = await serve(authenticator=guard)
    served.domain.hold = True
    call = served.rnn.Stream()
    await send(call, chunk(tensor, 1), chunk(tensor, 2))
    await until(lambda: served.domain.held)
    guard.is_expired = True
    served.domain.release()
    results = await read(call, 2)
    assert results[1].HasField("forward")
    assert unpack(results[2].error).reason == "BAD_CREDENTIALS"
    await send(call, chunk(tensor, 3))
    refusal = unpack((await read(call, 1))[3].error)
    assert (refusal.code, refusal.reason) == ("UNAUTHENTICATED", "BAD_CREDENTIALS")
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_a_refused_operation_holds_nothing_of_the_replica(
    serve: Serve, tensor: MakeTensor, until: Until
) -> None:
    """Its bytes are given back, and it never counts as one in work."""
    served = await serve(authenticator=Guard("Forward"))
    call = served.rnn.Stream()
    await send(call, chunk(tensor, 1))
    await read(call, 1)
    await until(lambda: not served.server.admission.request_bytes)
    assert served.server.admission.operations == 0


@pytest.mark.parametrize("name", ["Update", "Stream"])
async def test_a_forbidden_call_is_refused_before_it_is_read(
    serve: Serve, refused: Refused, name: str
) -> None:
    """Bytes that are no message do not matter to somebody who may not send any."""
    served = await serve(authenticator=Guard(name))
    if name == "Stream":
        answer = served.rnn.Stream().read()
    else:
        answer = served.channel.unary_unary(f"{SERVICE}/{name}")(b"\xff\xff\xff")
    refusal = await refused(answer)
    assert (refusal.code, refusal.reason) == ("PERMISSION_DENIED", "ROLE")


async def test_each_operation_of_a_stream_stands_for_a_method(serve: Serve) -> None:
    """Each field of the message `Operation` is served as the unary method of the same request."""
    served = await serve()
    fields: Any = pb.Operation.DESCRIPTOR.oneofs_by_name["operation"].fields
    methods = {name: row.method for name, row in served.server.streams.operations.items()}
    assert methods == {
        field.name: f"{SERVICE}/{field.message_type.name.removesuffix('Request')}"
        for field in fields
    }
