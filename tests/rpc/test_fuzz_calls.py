"""A whole server over a real store, given calls that nobody meant to make, in this process and over the wire."""

from __future__ import annotations

import asyncio
import gc
import os
import random
from contextlib import AsyncExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest

from fuzzing import LIMITS, METHODS, STREAM, Client, fuzz
from instruments.processes import ServiceProcess
from lab import TenantOfTheTest
from service.app import build_server
from service.cli.progress import bar
from service.settings import Limits, Settings
from service.store.connect import open_store
from timernn.v1 import time_rnn_service_pb2 as pb
from watch import Watch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from service.store.embedded import EmbeddedStore

# `make security` takes more calls, or another seed.
CALLS = int(os.environ.get("FUZZ_CALLS", "1000"))
WIRE_CALLS = int(os.environ.get("FUZZ_WIRE_CALLS", "200"))
SEED = int(os.environ.get("FUZZ_SEED", "20261128"))
GROWTH_BYTES = 128 << 20

pytestmark = [
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # NON_FINITE_RESULT
]


class GoneError(grpc.aio.BaseError):
    """The client has what it wanted and is gone."""


class AbortedError(Exception):
    """How gRPC ends a handler that aborts."""


class Context:
    """gRPC's side of one call: the messages that come, and what is answered."""

    def __init__(self, parts: list[bytes], *, is_endless: bool) -> None:
        self._parts = iter(parts)
        self._is_endless = is_endless
        self.answers: list[bytes] = []
        self.status: Any = None

    async def read(self) -> Any:
        """Return the next message, or the end."""
        await asyncio.sleep(0)
        return next(self._parts, grpc.aio.EOF)

    async def write(self, raw: bytes) -> None:
        """Take an answer."""
        self.answers.append(raw)
        if self._is_endless:
            raise GoneError

    async def abort(self, code: grpc.StatusCode, details: str, trailers: Any) -> None:
        """End the call with a status."""
        self.status = grpc.aio.AioRpcError(
            code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailers), details
        )
        raise AbortedError

    def invocation_metadata(self) -> tuple[()]:
        """Nothing came with it."""
        return ()

    def peer(self) -> str:
        """This process."""
        return "unix:"

    def auth_context(self) -> dict[str, Any]:
        """Nothing was proved."""
        return {}

    def time_remaining(self) -> None:
        """There is no deadline."""


class InProcess(Client):
    """Calls the handlers that a server gave to gRPC."""

    def __init__(self, handlers: list[Any]) -> None:
        self._handlers = handlers

    async def call(self, path: str, parts: list[bytes]) -> tuple[list[bytes], Any]:
        """Call a handler with messages."""
        details = type("Details", (), {"method": path, "invocation_metadata": ()})
        (handler,) = filter(None, [each.service(details) for each in self._handlers])
        context = Context(parts, is_endless=path.endswith("/Watch"))
        serve = next(
            filter(
                None,
                (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream),
            )
        )  # fmt: skip
        try:
            answer = await serve(None if handler.request_streaming else parts[0], context)
        except AbortedError:
            return context.answers, context.status
        except GoneError:
            return context.answers, None
        return context.answers if answer is None else [answer], None


class OverTheWire(Client):
    """Calls a server over a channel, a blocking one: that of asyncio reports INTERNAL where it writes too late."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    async def call(self, path: str, parts: list[bytes]) -> tuple[list[bytes], Any]:
        """Make a call."""
        method, channel, answers = METHODS[path], self._channel, []
        shape = {
            (False, False): channel.unary_unary,
            (True, False): channel.stream_unary,
            (False, True): channel.unary_stream,
            (True, True): channel.stream_stream,
        }[method.client_streaming, method.server_streaming]
        call: Any = shape(path)
        sent: Any = iter(parts) if method.client_streaming else parts[0]
        try:
            if not method.server_streaming:
                return [call(sent, timeout=60)], None
            answering = call(sent, timeout=60)
            for answer in answering:
                answers.append(answer)
                if path.endswith("/Watch"):
                    answering.cancel()
                    break
        except grpc.RpcError as error:
            return answers, error
        return answers, None


@pytest.fixture
async def handlers(
    store_url: str, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Any, list[Any]]]:
    """Build a server with small limits, and keep the handlers that it gives to gRPC."""
    found: list[Any] = []

    class Port:
        """What the server takes for gRPC's."""

        def add_generic_rpc_handlers(self, handlers: list[Any]) -> None:
            """Keep them."""
            found.append(handlers)

    monkeypatch.setattr(grpc.aio, "server", lambda **_: Port())
    async with AsyncExitStack() as stack:
        settings = Settings(limits=Limits(**LIMITS), store_timeout_ms=20_000)
        store = await open_store(store_url, settings)
        stack.push_async_callback(store.close)
        server = build_server(settings, store, stack, authenticator=TenantOfTheTest(tenant))
        yield server, found[0]


def progress(capsys: pytest.CaptureFixture[str], what: str, calls: int) -> Any:
    """Show a bar where a terminal is and it takes long."""
    return bar(what, calls // 100) if calls > 10_000 else nullcontext(lambda _: None)


def rss_bytes() -> int:
    """Return the memory of this process."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf(
        "SC_PAGE_SIZE"
    )


async def test_calls_in_process_end_as_listed(
    handlers: tuple[Any, list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Only codes of the table, nothing leaks, nothing is held on to, and the server goes on."""
    server, found = handlers
    client, source = InProcess(found), random.Random(SEED)
    await fuzz(client, source, 200, lambda _: None)  # caches fill, modules are imported
    gc.collect()
    before, tasks = rss_bytes(), len(asyncio.all_tasks())
    with capsys.disabled(), progress(capsys, "fuzzing in process", CALLS) as step:
        findings = await fuzz(client, source, CALLS, step)
    gc.collect()
    assert rss_bytes() - before < GROWTH_BYTES
    assert len(asyncio.all_tasks()) <= tasks + 5
    assert (server.admission.operations, server.admission.request_bytes) == (0, 0)
    assert findings.codes["OK"] > CALLS // 20
    assert len(findings.reasons) > min(10, CALLS // 100), findings.reasons


def test_calls_over_the_wire_end_as_listed(
    store_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same against a server as a process, whose memory stays and whose log shows no bug."""
    options = [
        part
        for name, value in LIMITS.items()
        for part in (f"--limit-{name.replace('_', '-')}", str(value))
    ]

    async def run(address: str, step: Callable[[str], None]) -> Any:
        with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            return await fuzz(OverTheWire(channel), random.Random(SEED + 1), WIRE_CALLS, step)

    with ServiceProcess(store_url, *options) as process:
        before = process.rss_bytes()
        with capsys.disabled(), progress(capsys, "fuzzing over the wire", WIRE_CALLS) as step:
            findings = asyncio.run(run(process.address, step))
        assert process.peak_rss_bytes() - before < GROWTH_BYTES
        assert "internal error" not in process.log
        assert "Traceback" not in process.log
    assert findings.codes["OK"] > WIRE_CALLS // 20


async def test_calls_in_process_connect_to_the_store_alone(
    handlers: tuple[Any, list[Any]], store: EmbeddedStore
) -> None:
    """Whatever is sent, no other address is connected to, and no file is opened."""
    _, found = handlers
    client, source, watch = InProcess(found), random.Random(SEED), Watch()
    await fuzz(client, source, 100, lambda _: None)  # modules are imported
    with watch.on():
        await fuzz(client, source, 200, lambda _: None)
    assert watch.peers <= {str(store.data_dir / "store.sock")}
    assert watch.harm == []


async def test_a_frame_of_the_fuzzer_reaches_the_domain(handlers: tuple[Any, list[Any]]) -> None:
    """What the fuzzer drives is the server: an operation on a stream is answered by its tag."""
    _, found = handlers
    operation = pb.Operation(tag=9, update=pb.UpdateRequest(model_id="none", request_id="r"))
    frame = pb.StreamRequest(operations=[operation])
    answers, error = await InProcess(found).call(STREAM, [frame.SerializeToString()])
    (result,) = pb.StreamResponse.FromString(answers[0]).results
    assert (error, result.tag, result.error.code) == (None, 9, grpc.StatusCode.NOT_FOUND.value[0])
