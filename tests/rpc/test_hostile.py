"""Input that was made to harm: names that are paths, programs in place of weights, floods, tricks of the wire."""

from __future__ import annotations

import base64
import json
import os
import pickle
import random
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.internal import api_implementation

from fuzzing import BY_REQUEST, Findings, World
from lab import Lab, TenantOfTheTest, file_of, refusal_status
from random_messages import NAMES, random_message
from rnn_engine import SGD, TanhNetwork
from service.app import build_server
from service.domain.errors import DomainError
from service.domain.types import ModelSpec
from service.domain.weights import from_safetensors
from service.rpc.server import SERVICES
from service.settings import Settings
from service.store.connect import open_store
from timernn.v1 import model_service_pb2 as model_pb
from timernn.v1 import session_service_pb2 as session_pb
from timernn.v1 import time_rnn_service_pb2 as pb
from watch import Watch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    Serve = Callable[..., Awaitable[Any]]
    Refused = Callable[[Awaitable[Any]], Awaitable[Any]]
    MakeTensor = Callable[..., Any]

FORWARD = "/timernn.v1.TimeRnnService/Forward"
INFO = "/timernn.v1.ModelService/GetServerInfo"
MESSAGES = int(os.environ.get("STREAM_MESSAGES", "1000"))  # `make security` sends more


@pytest.fixture
async def lab(store_url: str, tenant: str) -> AsyncIterator[Lab]:
    """A server over a real store, for one tenant."""
    async with AsyncExitStack() as stack:
        settings = Settings(store_timeout_ms=20_000)
        store = await open_store(store_url, settings)
        stack.push_async_callback(store.close)
        server = build_server(settings, store, stack, authenticator=TenantOfTheTest(tenant))
        address = await server.start("127.0.0.1:0")
        stack.push_async_callback(server.drain, 0)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
        yield Lab(channel, server=server, tenant=tenant)


# --- names and files ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watch() -> Watch:
    """One for the module."""
    return Watch()


class Wire:
    """Calls unary methods with bytes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel: Any = channel

    async def call(self, path: str, parts: list[bytes]) -> tuple[list[bytes], Any]:
        """Make a call."""
        try:
            if path.endswith("GetWeights"):
                call = self._channel.unary_stream(path)(parts[0], timeout=60)
                return [part async for part in call], None
            return [await self._channel.unary_unary(path)(parts[0], timeout=60)], None
        except grpc.aio.AioRpcError as error:
            return [], error

    async def ask(self, path: str, request: Any, response_class: Any) -> Any:
        """Make a call that succeeds."""
        answers, error = await self.call(path, [request.SerializeToString()])
        assert error is None, error
        return response_class.FromString(answers[0])


def with_names(message: Any) -> Iterator[tuple[str, Any]]:
    """Yield copies of a message in which one text is a name that reaches for something else."""
    for path, holder_of in texts(message):
        for name in NAMES:
            copied = type(message)()
            copied.CopyFrom(message)
            holder, field = holder_of(copied)
            setattr(holder, field, name)
            yield path, copied


def texts(message: Any, prefix: str = "") -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """Yield each text in a message: its path, and what finds its holder in a copy."""
    for field in message.DESCRIPTOR.fields:
        name = field.name
        if field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated:
            yield f"{prefix}{name}", partial(_holder, name)
        elif field.type != FieldDescriptor.TYPE_MESSAGE or field.is_repeated:
            continue
        elif message.HasField(name):
            for path, find in texts(getattr(message, name), f"{prefix}{name}."):
                yield path, partial(_inside, name, find)


def _holder(name: str, copied: Any) -> tuple[Any, str]:
    return copied, name


def _inside(name: str, find: Callable[[Any], Any], copied: Any) -> Any:
    return find(getattr(copied, name))


async def test_names_that_reach_for_something_else_reach_nothing(lab: Lab, watch: Watch) -> None:
    """Each text of each request as a path, a pattern, an escape: refused or not found, and no file is opened."""
    wire: Any = Wire(lab.channel)
    world, findings = World(wire), Findings()
    await world.restore()
    made = [
        (path, field, changed)
        for request in world.requests()
        for field, changed in with_names(request)
        for path in BY_REQUEST[changed.DESCRIPTOR.full_name]
        if path.startswith("/timernn.")
    ]
    assert len(made) > 500

    async def send(path: str, field: str, changed: Any) -> None:
        answers, error = await wire.call(path, [changed.SerializeToString()])
        findings.judge(path, [], answers, error)
        is_free_text = field in ("request_id", "update.request_id")
        assert error is not None or is_free_text or not _value(changed, field), (path, changed)

    for each in made[: len(NAMES)]:  # Python loads what it needs for the first of a kind
        await send(*each)
    with watch.on():
        for each in made:
            await send(*each)
    assert not watch.harm, watch.harm
    assert set(findings.codes) <= {
        "OK", "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "ABORTED", "FAILED_PRECONDITION",
    }  # fmt: skip


def _value(message: Any, path: str) -> str:
    *holders, name = path.split(".")
    for holder in holders:
        message = getattr(message, holder)
    return str(getattr(message, name))


class Harm:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self._path), "w"))


def programs(canary: Path) -> dict[str, bytes]:
    """Return files that run something when a careless reader loads them, or that fool one."""
    pickled = pickle.dumps(Harm(canary))
    good = file_of()
    size = int.from_bytes(good[:8], "little")
    header, body = good[8 : 8 + size], good[8 + size :]

    def framed(head: bytes, size: int | None = None) -> bytes:
        return (len(head) if size is None else size).to_bytes(8, "little") + head + body

    return {
        "pickle": pickled,
        "pickle behind a length": len(pickled).to_bytes(8, "little") + pickled,
        "pickle in the header": framed(pickled),
        "zip": b"PK\x03\x04" + bytes(200),
        "numpy of objects": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        "weights and a pickle behind them": good + pickled,
        "a header as long as the file says": framed(header, 2**63),
        "a header of 100 MB": framed(header, 100_000_000),
        "a header of 0": framed(b"", 0),
        "an empty file": b"",
        "seven bytes": bytes(7),
        "nested deeply": framed(b'{"a":' * 5000 + b"1" + b"}" * 5000),
        "a step that is a list": framed(b'{"__metadata__":{"step":[]}}'),
        "a step that is an object": framed(b'{"__metadata__":{"step":{}}}'),
        "a step that is infinite": framed(b'{"__metadata__":{"step":1e400}}'),
        "overlapping tensors": framed(
            header.replace(b'"data_offsets":[0', b'"data_offsets":[4', 1)
        ),
        "an extra tensor": framed(
            header.rstrip()[:-1] + b',"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
        ),
        "float64": framed(header.replace(b"F32", b"F64")),
        "a name that is a path": framed(header.replace(b'"Wx"', b'"../Wx"')),
        "a negative shape": framed(header.replace(b'"shape":[4]', b'"shape":[-4]')),
        "a shape that overflows": framed(
            header.replace(b'"shape":[4]', b'"shape":[4294967296,4294967296]')
        ),
    }


@pytest.mark.parametrize("name", programs(canary=None))  # type: ignore[arg-type]
async def test_programs_are_no_weights(lab: Lab, watch: Watch, tmp_path: Path, name: str) -> None:
    """A pickle, an archive, a crooked header: BAD_WEIGHTS for both uploads, and nothing of it is run."""
    canary = tmp_path / "canary"
    data = programs(canary)[name]
    await lab.create()
    with watch.on():
        status = await refusal_status(lab.upload(data))
        spec = model_pb.ModelSpec(model_id="n", input_size=3, hidden_size=4)
        header = model_pb.ImportModelHeader(spec=spec, request_id="i", total_bytes=len(data))
        parts = [
            model_pb.ImportModelRequest(header=header), model_pb.ImportModelRequest(data=data),
        ]  # fmt: skip
        new = await refusal_status(lab.models.ImportModel(iter(parts)))
    assert watch.harm == []
    assert not canary.exists()
    for each in (status, new):
        assert each.code == grpc.StatusCode.INVALID_ARGUMENT.value[0], each
        assert b"BAD_WEIGHTS" in each.details[0].value or not data
        assert str(tmp_path) not in each.message


def test_the_reader_of_weights_takes_no_program(tmp_path: Path) -> None:
    """The domain's own reader refuses them too, whatever calls it."""
    spec = ModelSpec("m", TanhNetwork(3, 4), "float32", SGD())
    for data in programs(tmp_path / "canary").values():
        with pytest.raises(DomainError) as caught:
            from_safetensors(spec, data)
        assert caught.value.reason == "BAD_WEIGHTS"


def page_token(*position: Any) -> str:
    """Return a page token as the server would make it of a position."""
    return base64.urlsafe_b64encode(json.dumps(position).encode()).decode()


FORGED = [
    page_token("s", "9" * 900), page_token("\0", "0"), page_token("[", "1"), page_token("(\xff", ""), page_token("s", "-1"),
    page_token("s", "1e9"), page_token("s", "inf"), page_token("+", "1"), page_token({"a": 1}, "1"), page_token("s"),
    page_token("s", "1", "2"), page_token([["s"]] * 50, "1"), "!!!", "=", "\u043f", "A" * 1024, "A" * 1025, "WzEsMV0=",
]  # fmt: skip


@pytest.mark.parametrize("token", FORGED, ids=lambda token: f"{token[:20]!a}")
async def test_a_forged_page_token_shows_nothing(lab: Lab, token: str) -> None:
    """It is refused, or begins the caller's own list somewhere else."""
    await lab.opened()
    wire = Wire(lab.channel)
    for path, request in (
        ("/timernn.v1.SessionService/ListSessions", session_pb.ListSessionsRequest),
        ("/timernn.v1.ModelService/ListModels", model_pb.ListModelsRequest),
    ):
        answers, error = await wire.call(path, [request(page_token=token).SerializeToString()])
        assert error is None or error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert len(b"".join(answers)) < 1000


# --- the wire -------------------------------------------------------------------------------------


async def test_a_flood_of_metadata_is_refused(serve: Serve) -> None:
    """More than gRPC keeps of it is no call, less is one, and the next call is served."""
    served = await serve()
    request = model_pb.GetServerInfoRequest()
    for count, size in ((64, 1000), (1, 60_000), (4000, 1)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.models.GetServerInfo(
                request, metadata=[(f"x-{number}", "v" * size) for number in range(count)]
            )
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await served.models.GetServerInfo(request, metadata=[("x", "v" * 4000)])


async def test_metadata_of_any_bytes_is_a_call(serve: Serve) -> None:
    """Odd values and a thousand of one key neither fail nor reach a log or an answer."""
    served = await serve()
    request = model_pb.GetServerInfoRequest()
    odd = [("x-bin", bytes(range(256))), ("traceparent", "00-zz-zz-zz"), ("timernn-tenant", "../x")]
    await served.models.GetServerInfo(request, metadata=odd)
    await served.models.GetServerInfo(request, metadata=[("x", "1")] * 100)


async def test_groups_within_groups_are_malformed(serve: Serve, refused: Refused) -> None:
    """Two hundred thousand opened groups neither recurse nor crash; the compiled parser counts them."""
    assert api_implementation.Type() == "upb"
    served = await serve()
    refusal = await refused(served.channel.unary_unary(FORWARD)(b"\x0b" * 200_000))
    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "MALFORMED")


def test_no_message_holds_itself() -> None:
    """So that nothing is nested as deeply as a client likes."""

    def check(message: Any, above: tuple[str, ...]) -> None:
        assert message.full_name not in above, (message.full_name, above)
        for field in message.fields:
            if field.message_type is not None:
                check(field.message_type, (*above, message.full_name))

    for service in SERVICES:
        for method in service.methods:
            if method.containing_service.full_name.startswith("timernn."):
                check(method.input_type, ())


@pytest.mark.parametrize(
    "path",
    ["timernn.v1.ModelService/GetServerInfo", f"/{INFO}", INFO.lower(), f"{INFO}?x=1", f"{INFO}/",
     "/timernn.v1.ModelService/../ModelService/GetServerInfo", "/timernn.v1.ModelService/%47etServerInfo",
     "/timernn.v2.ModelService/GetServerInfo", "/", "/x" * 2000],
)  # fmt: skip
async def test_another_way_to_write_a_method_is_none(serve: Serve, path: str) -> None:
    """A path is compared as it is: no way around the table of roles."""
    served = await serve()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.channel.unary_unary(path)(b"", timeout=30)
    assert caught.value.code() in {
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,  # gRPC's bound on headers
        grpc.StatusCode.CANCELLED,  # no path at all to HTTP/2
    }


async def test_of_a_field_that_comes_twice_the_last_counts(lab: Lab, refused: Refused) -> None:
    """As everywhere in proto3, and for the check of a name and for its use alike."""
    await lab.opened()
    bad = session_pb.GetSessionRequest(session_id="../x").SerializeToString()
    good = session_pb.GetSessionRequest(session_id="s").SerializeToString()
    get: Any = lab.channel.unary_unary("/timernn.v1.SessionService/GetSession")
    assert (await refused(get(good + bad))).reason == "BAD_FIELD"
    answer = session_pb.GetSessionResponse.FromString(await get(bad + good))
    assert answer.session.session_id == "s"


async def test_fields_that_nobody_knows_are_ignored(serve: Serve, tensor: MakeTensor) -> None:
    """A newer client may say more."""
    served = await serve()
    known = pb.ForwardRequest(session_id="s", epoch=1, chunk_seq=1, xs=tensor(1, 1, 1))
    unknown = b"\xfa\x3f\x04more"  # field 1023
    raw = await served.channel.unary_unary(FORWARD)(known.SerializeToString() + unknown)
    assert pb.ForwardResponse.FromString(raw).chunk_seq == 1


async def test_thousands_of_small_messages_on_a_stream_are_answered(
    serve: Serve, tensor: MakeTensor
) -> None:
    """Many messages are no attack: each is answered."""
    served = await serve()
    stream = served.rnn.Stream()
    answered = 0
    for first in range(0, MESSAGES, 500):
        for tag in range(first, first + 500):
            chunk = pb.ForwardRequest(
                session_id=f"s{tag % 50}", epoch=1, chunk_seq=tag // 50 + 1, xs=tensor(1, 1, 1)
            )
            await stream.write(pb.StreamRequest(operations=[pb.Operation(tag=tag, forward=chunk)]))
        while answered < first + 500:
            answered += len((await stream.read()).results)
    await stream.done_writing()
    assert answered == MESSAGES


async def test_empty_messages_on_a_stream_cost_nothing(serve: Serve) -> None:
    """A thousand messages without an operation have no answer, and the stream ends well."""
    served = await serve()
    stream = served.rnn.Stream()
    for _ in range(1000):
        await stream.write(pb.StreamRequest())
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF
    assert await stream.code() is grpc.StatusCode.OK


async def test_malformed_uploads_leave_no_model(lab: Lab) -> None:
    """Parts in any order, headers twice, bytes beyond what was announced: refused, and nothing is made."""
    source = random.Random(20_261_128)
    for _ in range(50):
        parts = [
            random_message(model_pb.ImportModelRequest, source)
            for _ in range(source.choice((1, 2, 3)))
        ]
        for part in parts:
            part.header.spec.model_id = "n"
        await refusal_status(lab.models.ImportModel(iter(parts)))
    listed = await lab.models.ListModels(model_pb.ListModelsRequest())
    assert not listed.models
