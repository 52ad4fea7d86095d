"""Health, reflection, server info, weights in parts: what stands around the recurrence."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from service.domain.types import ModelKey, Version
from service.rpc.health import LIVENESS
from service.settings import Limits
from timernn.v1 import model_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Serve = Callable[..., Awaitable[Any]]
    Refused = Callable[[Awaitable[Any]], Awaitable[Any]]

SERVING, NOT_SERVING, UNKNOWN = 1, 2, 3
NAMES = ["timernn.v1.ModelService", "timernn.v1.SessionService", "timernn.v1.TimeRnnService"]


async def health_of(served: Any, service: str = "") -> int:
    """Ask for the status of a service."""
    stub: Any = health_pb2_grpc.HealthStub(served.channel)
    response = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return int(response.status)


@pytest.mark.parametrize("name", ["", *NAMES])
async def test_health_follows_what_is_set(serve: Serve, name: str) -> None:
    """The server and each of its services have one status."""
    served = await serve()
    assert await health_of(served, name) == SERVING
    served.server.health.set_serving(False)
    assert await health_of(served, name) == NOT_SERVING


async def test_liveness_is_not_readiness(serve: Serve) -> None:
    """A process that waits for its store must not be killed for it."""
    served = await serve()
    served.server.health.set_serving(False)
    assert await health_of(served, LIVENESS) == SERVING


async def test_an_unknown_service_is_not_found(serve: Serve) -> None:
    """As the health protocol says."""
    served = await serve()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health_of(served, "nobody")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_watcher_gets_each_change_and_its_stream_ends_at_the_end(serve: Serve) -> None:
    """A watch ends with the server and does not hold up its stop."""
    served = await serve()
    stub: Any = health_pb2_grpc.HealthStub(served.channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == SERVING
    served.server.health.set_serving(False)
    assert (await watch.read()).status == NOT_SERVING
    served.server.health.set_serving(True)
    assert (await watch.read()).status == SERVING
    last = asyncio.ensure_future(watch.read())
    async with asyncio.timeout(5):
        await served.server.drain(60)
    assert (await last).status == NOT_SERVING
    assert await watch.read() is grpc.aio.EOF


async def test_a_watch_of_an_unknown_service_says_so(serve: Serve) -> None:
    """It stays open, as the health protocol says."""
    served = await serve()
    stub: Any = health_pb2_grpc.HealthStub(served.channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="nobody"))
    assert (await watch.read()).status == UNKNOWN
    watch.cancel()


async def test_reflection_lists_the_services(serve: Serve) -> None:
    """A tool needs no proto file to call."""
    served = await serve()
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    answers = [answer async for answer in stub.ServerReflectionInfo(iter([question]))]
    listed = {service.name for service in answers[0].list_services_response.service}
    assert set(NAMES) < listed
    assert "grpc.health.v1.Health" in listed


async def test_server_info_tells_build_replica_and_limits(serve: Serve) -> None:
    """A client learns the bounds before it meets them."""
    served = await serve(limits=Limits(batch_size=7))
    info = await served.models.GetServerInfo(pb.GetServerInfoRequest())
    assert (info.server_version, info.replica_id, info.durability) == (
        "1.2.3",
        "replica",
        "primary",
    )
    assert info.start_time.ToMilliseconds() == 1_700_000_000_123
    assert info.limits.batch_size == 7


async def test_weights_come_in_parts_of_one_mebibyte(serve: Serve) -> None:
    """A file larger than a message travels all the same."""
    served = await serve()
    data = bytes(range(256)) * 10_000
    served.domain.answers["read_weights"] = (Version(4, b"d" * 16), data)
    call = served.models.GetWeights(pb.GetWeightsRequest(model_id="m"))
    parts = [part async for part in call]
    assert b"".join(part.data for part in parts) == data
    assert (parts[0].version.number, parts[0].total_bytes) == (4, len(data))
    assert max(len(part.data) for part in parts) == 1 << 20
    assert served.server.admission.request_bytes == 0


HEADER = pb.PutWeightsHeader(model_id="m", request_id="r", total_bytes=8)


def upload(*parts: pb.PutWeightsHeader | bytes) -> Any:
    """Make the messages of an upload."""
    return iter(
        [
            pb.PutWeightsRequest(data=part)
            if isinstance(part, bytes)
            else pb.PutWeightsRequest(header=part)
            for part in parts
        ]
    )


async def test_an_upload_is_joined(serve: Serve) -> None:
    """The domain gets the whole file."""
    served = await serve()
    served.domain.answers |= {"upload_limit": 100, "put_weights": (Version(5, b"d" * 16), False)}
    response = await served.models.PutWeights(upload(HEADER, b"1234", b"", b"5678"))
    assert response.version.number == 5
    assert served.domain.asked[-1] == (ModelKey("default", "m"), b"12345678", None, "r")


BAD_UPLOADS = [
    ([], "header: required in the first message"),
    ([b"12345678"], "header: required in the first message"),
    ([HEADER, b"1234"], "total_bytes: is 8, but 4 bytes came"),
    ([HEADER, b"12345678", b"9"], "total_bytes: is 8, but 9 or more bytes came"),
    ([HEADER, b"1234", HEADER], "data: required in every message after the first"),
    ([pb.PutWeightsHeader(model_id="m", request_id="r")], "total_bytes: must be 1 to 4611686018427387904, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("parts", "text"), BAD_UPLOADS, ids=lambda value: str(value)[:30])
async def test_a_bad_upload_is_refused(
    serve: Serve, refused: Refused, parts: list[Any], text: str
) -> None:
    """Header first, then exactly as many bytes as it named."""
    served = await serve()
    served.domain.answers["upload_limit"] = 100
    refusal = await refused(served.models.PutWeights(upload(*parts)))
    assert (refusal.reason, refusal.message) == ("BAD_FIELD", text)


async def test_an_upload_too_large_for_its_model_is_refused_before_it_is_sent(
    serve: Serve, refused: Refused
) -> None:
    """The header alone is enough to know."""
    served = await serve()
    served.domain.answers["upload_limit"] = 7
    refusal = await refused(served.models.PutWeights(upload(HEADER)))
    assert (refusal.code, refusal.reason) == ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE")
    assert "limit of 7: it is a file of a model of other sizes" in refusal.message
