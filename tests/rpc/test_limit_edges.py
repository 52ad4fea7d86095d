"""Every limit one below, at and one above what it says, through a real channel over a real store."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration

from lab import D, H, Lab, RefusedOnStreamError, TenantOfTheTest, tensor
from service.app import build_server
from service.settings import Limits, Settings
from service.store.connect import open_store
from timernn.v1 import model_service_pb2 as model_pb
from timernn.v1 import session_service_pb2 as session_pb
from timernn.v1 import time_rnn_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Attempt: TypeAlias = Callable[[Lab, int], Awaitable[Any]]

# Of a model of D and H in float32, and of one gradient of it.
WEIGHTS_BYTES = 4 * (D * H + H * H + H)


async def sizes(lab: Lab, count: int) -> None:
    """Open a session of so many rows."""
    await lab.create()
    await lab.open(batch_size=count)


async def steps(lab: Lab, count: int) -> None:
    """Send a chunk of so many steps."""
    await (await lab.opened()).forward(1, xs=tensor(1, count, D))


async def inputs(lab: Lab, count: int) -> None:
    """Create a model of so many inputs."""
    await lab.create(spec=model_pb.ModelSpec(model_id="m", input_size=count, hidden_size=H))


async def hidden(lab: Lab, count: int) -> None:
    """Create a model of so many units."""
    await lab.create(spec=model_pb.ModelSpec(model_id="m", input_size=D, hidden_size=count))


async def message(lab: Lab, count: int) -> None:
    """Send a message of so many bytes, most of them in a field that nobody knows."""
    head = b"\xa2\x06" + bytes([(count - 4) & 127 | 128, (count - 4) >> 7])  # field 100, its length
    raw = head + bytes(count - len(head))
    call: Any = lab.channel.unary_unary("/timernn.v1.ModelService/GetServerInfo")
    await call(raw)


async def frame(lab: Lab, count: int) -> None:
    """Send so many operations in one message, and wait for the answer of each."""
    operation = pb.Operation(update=pb.UpdateRequest(model_id="none", request_id="r"))
    call = lab.rnn.Stream()
    await call.write(pb.StreamRequest(operations=[operation] * count))
    await call.done_writing()
    assert sum([len(answer.results) async for answer in call]) == count


async def sessions(lab: Lab, count: int) -> None:
    """Open so many sessions."""
    await lab.create()
    for number in range(count):
        await lab.open(f"s{number}")


async def models(lab: Lab, count: int) -> None:
    """Create so many models."""
    for number in range(count):
        await lab.create(f"m{number}")


async def tapes(lab: Lab, count: int) -> None:
    """Leave so many tapes."""
    await lab.opened()
    for seq in range(1, count + 1):
        await lab.train(seq)


async def contributions(lab: Lab, count: int) -> None:
    """Leave so many contributions."""
    await lab.opened()
    for seq in range(1, count + 1):
        await lab.backward(await lab.train(seq))


async def checkpoints(lab: Lab, count: int) -> None:
    """Make so many checkpoints."""
    await lab.create()
    for number in range(count):
        request = model_pb.CreateCheckpointRequest(model_id="m", checkpoint_id=f"c{number}")
        await lab.models.CreateCheckpoint(request)


async def live_for(lab: Lab, count: int) -> None:
    """Open a session that lives for so many milliseconds."""
    await lab.create()
    await lab.open(ttl=Duration(seconds=count // 1000, nanos=count % 1000 * 1_000_000))


async def replayed(lab: Lab, count: int) -> None:
    """Send the first of so many chunks again."""
    await lab.opened()
    for seq in range(1, count + 1):
        await lab.forward(seq)
    await lab.forward(1)


# Of each limit a value, what reaches it, and how one beyond is refused.
EDGES: dict[str, tuple[int, Attempt, str]] = {
    "batch_size": (3, sizes, "BAD_FIELD"),
    "chunk_steps": (3, steps, "BAD_TENSOR"),
    "input_size": (5, inputs, "BAD_FIELD"),
    "hidden_size": (5, hidden, "BAD_FIELD"),
    "message_bytes": (1000, message, "MESSAGE_TOO_LARGE"),
    "operations_per_message": (3, frame, "BAD_FIELD"),
    "sessions_per_tenant": (3, sessions, "MAX_SESSIONS"),
    "models_per_tenant": (3, models, "MAX_MODELS"),
    "tapes_per_session": (3, tapes, "TAPE_QUOTA"),
    "contributions_per_model": (3, contributions, "TAPE_QUOTA"),
    "checkpoints_per_model": (3, checkpoints, "MAX_CHECKPOINTS"),
    "max_ttl_ms": (5000, live_for, "BAD_FIELD"),
    "min_ttl_ms": (5000, live_for, "BAD_FIELD"),
    "replay_window": (3, replayed, "REPLAY_WINDOW_PASSED"),
}
LOWER = {"min_ttl_ms"}  # beyond is below
# What has no such edge, and where it is tested instead.
ELSEWHERE = {
    "weights_bytes": "a bound on the bytes of a file: below",
    "contribution_bytes_per_model": "the same of gradients: below",
    "stream_operations_in_flight": "rpc/test_stream.py: what is beyond is not read",
    "operations_in_flight": "rpc/test_gate.py: what is in work at once",
    "request_bytes_in_flight": "rpc/test_gate.py: what is in work at once",
    "counted_tapes_per_session": "domain/test_limits_policy.py: the oldest goes",
    "counted_tape_bytes_per_session": "the same",
    "superseded_bytes_per_model": "domain/test_models.py: the oldest goes",
    "remembered_requests_per_model": "the oldest goes",
    "remembered_contributions_per_model": "the oldest goes, or it is waited for",
    "default_ttl_ms": "a time, not a bound",
    "tape_ttl_ms": "a time",
    "contribution_ttl_ms": "a time",
    "head_max_age_ms": "a time",
    "default_deadline_ms": "a time",
}


async def attempt(
    store_url: str, tenant: str, limits: dict[str, int], reach: Attempt, count: int
) -> str:
    """Start a server with limits and do something on it; return OK or the reason of the refusal."""
    async with AsyncExitStack() as stack:
        settings = Settings(limits=Limits(**limits), store_timeout_ms=20_000)
        store = await open_store(store_url, settings)
        stack.push_async_callback(store.close)
        server = build_server(settings, store, stack, authenticator=TenantOfTheTest(tenant))
        address = await server.start("127.0.0.1:0")
        stack.push_async_callback(server.drain, 0)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
        try:
            await reach(Lab(channel), count)
        except RefusedOnStreamError as error:
            return reason_of(error.status.details[0].value)
        except grpc.aio.AioRpcError as error:
            trailers = dict(error.trailing_metadata() or ())
            return reason_of(trailers["grpc-status-details-bin"])
    return "OK"


def reason_of(raw: Any) -> str:
    """Return the reason in the bytes of a status."""
    found = {
        reason
        for _, _, reason in EDGES.values()
        if reason.encode() in bytes(raw if isinstance(raw, bytes) else raw.encode())
    }
    return found.pop() if len(found) == 1 else f"{raw!r}"


@pytest.mark.parametrize("change", [-1, 0, 1])
@pytest.mark.parametrize("name", EDGES)
async def test_a_limit_holds_at_its_edges(
    store_url: str, tenant: str, name: str, change: int
) -> None:
    """What is within is done, the limit itself included; one beyond is refused with the limit's reason."""
    limit, reach, reason = EDGES[name]
    is_within = change >= 0 if name in LOWER else change <= 0
    limits = {name: limit}
    if name == "min_ttl_ms":
        limits["max_ttl_ms"] = 10_000
    if name == "contributions_per_model":
        limits["tapes_per_session"] = 8
    expected = "OK" if is_within else reason
    assert await attempt(store_url, tenant, limits, reach, limit + change) == expected


@pytest.mark.parametrize("change", [-1, 0, 1])
async def test_the_limit_on_waiting_gradients_holds_at_its_edges(
    store_url: str, tenant: str, change: int
) -> None:
    """Two gradients fit into exactly their bytes, and not into one byte less."""
    two = await bytes_of_gradients(store_url, tenant)
    limits = {"contribution_bytes_per_model": two + change}
    expected = "OK" if change >= 0 else "TAPE_QUOTA"
    assert await attempt(store_url, f"{tenant}e", limits, contributions, 2) == expected


async def bytes_of_gradients(store_url: str, tenant: str) -> int:
    """Return the smallest limit that two gradients fit into."""
    low, high = WEIGHTS_BYTES, 4 * WEIGHTS_BYTES
    number = 0
    while low < high:
        middle, number = (low + high) // 2, number + 1
        limits = {"contribution_bytes_per_model": middle}
        ended = await attempt(store_url, f"{tenant}{number}", limits, contributions, 2)
        low, high = (low, middle) if ended == "OK" else (middle + 1, high)
    assert WEIGHTS_BYTES * 2 <= low < WEIGHTS_BYTES * 3
    return low


def test_every_limit_is_listed() -> None:
    """Whoever adds a limit says how one more than it is refused, or why nothing is."""
    assert {field.name for field in fields(Limits)} == {*EDGES, *ELSEWHERE}


@pytest.mark.parametrize("size", [0, 1, 2])
async def test_a_session_id_may_be_as_long_as_it_says(
    store_url: str, tenant: str, size: int
) -> None:
    """127 and 128 characters are a name, 129 are none."""

    async def get(lab: Lab, count: int) -> None:
        await lab.create()
        await lab.open("s" * count)
        await lab.sessions.GetSession(session_pb.GetSessionRequest(session_id="s" * count))

    expected = "OK" if size < 2 else "BAD_FIELD"
    assert await attempt(store_url, tenant, {}, get, 127 + size) == expected
