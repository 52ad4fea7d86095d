"""What every call passes: authentication, admission, deadline, and the mapping of failures."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import re
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.domain.errors import DomainError, Unavailable
from service.rpc.auth import AllowAll, Principal
from service.rpc.errors import PermissionDenied
from service.rpc.permissions import PUBLIC
from service.rpc.server import SERVICES
from service.settings import Limits
from timernn.v1 import time_rnn_service_pb2 as pb
from timernn.v1.tensor_pb2 import Tensor

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from google.protobuf.descriptor import MethodDescriptor

    from service.rpc.auth import Caller

    Serve = Callable[..., Awaitable[Any]]
    Refused = Callable[[Awaitable[Any]], Awaitable[Any]]
    MakeTensor = Callable[..., Any]
    Until = Callable[[Callable[[], Any]], Awaitable[None]]

METHODS = [method for service in SERVICES for method in service.methods]


def path_of(method: MethodDescriptor) -> str:
    """A method's path on the wire."""
    return f"/{method.containing_service.full_name}/{method.name}"


async def call_raw(
    channel: Any, method: MethodDescriptor, raw: bytes, *, writes: bool = True
) -> Any:
    """Call any method with bytes and return its first answer's."""
    path = path_of(method)
    if method.client_streaming and method.server_streaming:
        both = channel.stream_stream(path)()
        # gRPC's client loses the status of a call that ends while it writes: what is refused before the
        # first message is read must not write one.
        with contextlib.suppress(asyncio.InvalidStateError):  # refused already
            if writes:
                await both.write(raw)
        return await both.read()
    if method.client_streaming:
        return await channel.stream_unary(path)(iter([raw] if writes else []))
    if method.server_streaming:
        return await channel.unary_stream(path)(raw).read()
    return await channel.unary_unary(path)(raw)


class DenyAll(AllowAll):
    """Knows everybody, permits nothing, and notes what was tried."""

    def __init__(self) -> None:
        self.tried: list[str] = []

    def authorise(self, principal: Principal, method: str) -> None:
        """Refuse every caller."""
        del principal
        self.tried.append(method)
        raise PermissionDenied("NOBODY", "nobody may call")


@pytest.mark.parametrize("method", METHODS, ids=path_of)
async def test_every_method_passes_the_authenticator(
    serve: Serve, refused: Refused, method: MethodDescriptor
) -> None:
    """No method of any service but health, which probes call, is reached without permission."""
    gatekeeper = DenyAll()
    served = await serve(authenticator=gatekeeper)
    if path_of(method) in PUBLIC:
        await call_raw(served.channel, method, b"", writes=False)
        assert gatekeeper.tried == []
        return
    refusal = await refused(call_raw(served.channel, method, b"", writes=False))
    assert (refusal.code, refusal.reason) == ("PERMISSION_DENIED", "NOBODY")
    assert gatekeeper.tried == [path_of(method)]


@pytest.mark.parametrize("method", METHODS, ids=path_of)
@pytest.mark.parametrize("raw", [b"\xff\xff\xff", b"\x0a\x7f", b"\x0b" * 200], ids=repr)
async def test_bytes_that_are_no_message_are_malformed(
    serve: Serve, refused: Refused, method: MethodDescriptor, raw: bytes
) -> None:
    """Garbage, a truncated field and endless groups are INVALID_ARGUMENT, never UNKNOWN."""
    served = await serve()
    refusal = await refused(call_raw(served.channel, method, raw))
    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "MALFORMED")
    assert refusal.message == f"request is not a valid {method.input_type.name}"


async def test_text_that_is_not_utf8_is_malformed(serve: Serve, refused: Refused) -> None:
    """A session_id of wrong bytes is no text."""
    served = await serve()
    forward = served.channel.unary_unary("/timernn.v1.TimeRnnService/Forward")
    assert (await refused(forward(b"\x0a\x02\xc3\x28"))).reason == "MALFORMED"


async def test_an_unknown_method_is_unimplemented(serve: Serve) -> None:
    """A path that the contract does not have is not a failure of ours."""
    served = await serve()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.channel.unary_unary("/timernn.v1.TimeRnnService/forward")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_tenant_comes_from_the_principal(serve: Serve, tensor: MakeTensor) -> None:
    """The domain is asked for the tenant that the authenticator named."""

    class Tenant(AllowAll):
        def authenticate(self, caller: Caller) -> Principal:
            del caller
            return Principal("tenant-7")

    served = await serve(authenticator=Tenant())
    await served.rnn.Forward(pb.ForwardRequest(model_id="m", xs=tensor(1, 1, 1)))
    assert served.domain.asked[0][0] == "tenant-7"


async def test_a_bug_is_internal_with_an_id_that_stands_in_the_log(
    serve: Serve, refused: Refused, tensor: MakeTensor, caplog: pytest.LogCaptureFixture
) -> None:
    """The client gets a number; the text stays here."""
    served = await serve()
    served.domain.failures[0] = RuntimeError("secret of /usr/lib and redis")
    call = served.rnn.Forward(pb.ForwardRequest(model_id="m", xs=tensor(1, 1, 1)))
    refusal = await refused(call)
    assert (refusal.code, refusal.reason) == ("INTERNAL", "BUG")
    assert re.fullmatch(r"internal error, id [0-9a-f]{16}", refusal.message)
    assert refusal.metadata["id"] in caplog.text
    assert "secret" in caplog.text


@pytest.mark.parametrize(
    ("failure", "code", "reason"),
    [
        (TimeoutError(), "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"),
        (asyncio.CancelledError(), "UNAVAILABLE", "UNKNOWN_OUTCOME"),
        (MemoryError(), "RESOURCE_EXHAUSTED", "OVERLOADED"),
        (DomainError("ODD", "of no branch"), "INTERNAL", "BUG"),
        (StopIteration(), "INTERNAL", "BUG"),
        (Unavailable("STORE_DOWN", "down", retry_after_s=0.5), "UNAVAILABLE", "STORE_DOWN"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
async def test_no_exception_ends_as_unknown(
    serve: Serve, refused: Refused, failure: BaseException, code: str, reason: str
) -> None:
    """Whatever the domain raises has a code; nothing hangs and nothing is UNKNOWN."""
    served = await serve()
    served.domain.answers["update"] = failure
    request = pb.UpdateRequest(model_id="m", request_id="r")
    refusal = await refused(served.rnn.Update(request, timeout=5))
    assert (refusal.code, refusal.reason) == (code, reason)


async def test_a_call_without_a_deadline_gets_the_servers(serve: Serve, refused: Refused) -> None:
    """A handler that never ends is ended."""
    served = await serve(limits=Limits(default_deadline_ms=50))
    served.domain.answers["update"] = asyncio.Event().wait
    refusal = await refused(served.rnn.Update(pb.UpdateRequest(model_id="m", request_id="r")))
    assert refusal.code == "DEADLINE_EXCEEDED"
    assert served.server.admission.operations == 0


async def test_a_cancelled_call_ends_its_handler(serve: Serve, until: Until) -> None:
    """What a client gives up is given up here, and its place is free again."""
    served = await serve()
    started, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    served.domain.answers["update"] = work
    call = served.rnn.Update(pb.UpdateRequest(model_id="m", request_id="r"))
    waiting = asyncio.ensure_future(call)
    await started.wait()
    call.cancel()
    await ended.wait()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await until(lambda: not served.server.admission.operations)


async def test_more_calls_than_a_connection_carries_wait_for_their_turn(
    serve: Serve, tensor: MakeTensor
) -> None:
    """A thousand calls at once on one channel are all answered, none is refused by HTTP/2."""
    served = await serve()
    request = pb.ForwardRequest(model_id="m", xs=tensor(1, 1, 1))
    answers = await asyncio.gather(*(served.rnn.Forward(request) for _ in range(1000)))
    assert len(answers) == 1000


async def test_more_operations_than_the_replica_takes_are_overloaded(
    serve: Serve, refused: Refused, until: Until
) -> None:
    """Beyond the bound a call is refused at once, while health is answered."""
    served = await serve(limits=Limits(operations_in_flight=1))
    release = asyncio.Event()
    served.domain.answers["update"] = release.wait
    request = pb.UpdateRequest(model_id="m", request_id="r")
    first = asyncio.ensure_future(served.rnn.Update(request))
    await until(lambda: served.domain.asked)

    refusal = await refused(served.rnn.Update(request))
    assert (refusal.code, refusal.reason) == ("RESOURCE_EXHAUSTED", "OVERLOADED")
    assert set(refusal.details) == {"ErrorInfo", "RetryInfo", "QuotaFailure"}
    health: Any = health_pb2_grpc.HealthStub(served.channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1

    release.set()
    await first
    await served.rnn.Update(request)


async def test_more_bytes_than_the_replica_takes_are_overloaded(
    serve: Serve, refused: Refused, tensor: MakeTensor, until: Until
) -> None:
    """One request larger than the whole budget is let in alone; the next one waits outside."""
    served = await serve(limits=Limits(request_bytes_in_flight=1000))
    served.domain.hold = True
    large = pb.ForwardRequest(model_id="m", xs=tensor(1, 64, 64))
    first = asyncio.ensure_future(served.rnn.Forward(large))
    await until(lambda: served.domain.held)
    refusal = await refused(served.rnn.Forward(large))
    assert refusal.metadata["bound"] == "request_bytes_in_flight"
    served.domain.release()
    await first


async def test_what_was_refused_is_freed_at_once(
    serve: Serve, refused: Refused, tensor: MakeTensor
) -> None:
    """No cycle keeps a refused request until the garbage collector comes."""
    served = await serve()
    request = pb.ForwardRequest(model_id="m", chunk_seq=1, xs=tensor(1, 64, 64))
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(3):  # the server may not have left the last one yet
            await refused(served.rnn.Forward(request))
        gc.collect()
        requests = (bytes, Tensor, pb.ForwardRequest)
        kept = [each for each in gc.garbage if isinstance(each, requests)]
        errors = [each for each in gc.garbage if isinstance(each, DomainError)]
    finally:
        gc.set_debug(0)
        gc.enable()
        gc.garbage.clear()
    assert not kept
    assert not any(each.__traceback__ for each in errors)


async def test_a_message_a_little_too_large_is_refused_with_a_reason(
    serve: Serve, refused: Refused, tensor: MakeTensor
) -> None:
    """The limit is named where gRPC's own would only give two numbers."""
    served = await serve(limits=Limits(message_bytes=1000))
    request = pb.ForwardRequest(model_id="m", xs=tensor(1, 10, 30))
    refusal = await refused(served.rnn.Forward(request))
    assert (refusal.code, refusal.reason) == ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE")
    assert refusal.metadata["limit_bytes"] == "1000"


async def test_a_message_much_too_large_is_refused_by_grpc(
    serve: Serve, tensor: MakeTensor
) -> None:
    """Far beyond the limit the bytes are not even collected."""
    served = await serve(limits=Limits(message_bytes=1000))
    request = pb.ForwardRequest(model_id="m", xs=tensor(1, 1000, 100))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.rnn.Forward(request)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_an_answer_that_is_too_large_is_refused_with_a_reason(
    serve: Serve, refused: Refused, tensor: MakeTensor
) -> None:
    """A large H makes a large answer of a small request."""
    served = await serve(limits=Limits(message_bytes=1000))
    served.domain.hidden_size = 1000
    refusal = await refused(served.rnn.Forward(pb.ForwardRequest(model_id="m", xs=tensor(1, 2, 1))))
    assert (refusal.code, refusal.reason) == ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE")


async def test_a_compressed_message_is_refused(serve: Serve, tensor: MakeTensor) -> None:
    """Nothing is unpacked, so no bomb goes off."""
    served = await serve()
    request = pb.ForwardRequest(model_id="m", xs=tensor(1, 1000, 100))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.rnn.Forward(request, compression=grpc.Compression.Gzip)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_draining_server_finishes_what_it_took(
    serve: Serve, tensor: MakeTensor, until: Until
) -> None:
    """A call in work is answered; one that comes later is UNAVAILABLE."""
    served = await serve()
    served.domain.hold = True
    request = pb.ForwardRequest(model_id="m", xs=tensor(1, 1, 1))
    first = asyncio.ensure_future(served.rnn.Forward(request))
    await until(lambda: served.domain.held)
    draining = asyncio.ensure_future(served.server.drain(10))
    await asyncio.sleep(0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.rnn.Forward(request)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    served.domain.release()
    assert (await first).h.shape == [1, 2]
    await draining
