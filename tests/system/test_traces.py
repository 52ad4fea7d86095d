"""Traces from the client to the store, and a server as a process that sends its own by OTLP."""

from __future__ import annotations

import asyncio
import threading
from contextlib import AsyncExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

import timernn
from instruments.processes import ServiceProcess, wait_until
from lab import TenantOfTheTest
from service.app import build_server
from service.settings import Settings
from service.store.connect import open_store
from service.tracing import SpanObserver
from spans import SpanLog, attributes_of, context_of, is_child
from timernn.v1.model_service_pb2 import CreateModelRequest, ModelSpec
from timernn.v1.model_service_pb2_grpc import ModelServiceStub

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from opentelemetry.sdk.trace import ReadableSpan

XS = np.ones((1, 4, 2), "f4")


@pytest.fixture
def log() -> SpanLog:
    """What keeps the spans of client and server."""
    return SpanLog()


@pytest.fixture
async def address(store_url: str, tenant: str, log: SpanLog) -> AsyncIterator[str]:
    """A server in this process, over the run's store, that makes spans."""
    async with AsyncExitStack() as stack:
        observer = SpanObserver(log.provider.get_tracer("server"))
        settings = Settings(store_timeout_ms=20_000)
        store = await open_store(store_url, settings, observer)
        stack.push_async_callback(store.close)
        server = build_server(
            settings, store, stack, authenticator=TenantOfTheTest(tenant), observer=observer
        )
        started = await server.start("127.0.0.1:0")
        stack.push_async_callback(server.drain, 0)
        yield started


def unary(client: timernn.Client, session: timernn.Session) -> None:
    """Apply a chunk by a call of its own."""
    session.forward(XS)


def streamed(client: timernn.Client, session: timernn.Session) -> None:
    """Apply chunks over a stream."""
    list(session.stream([XS] * 3, in_flight=1))


def framed(client: timernn.Client, session: timernn.Session) -> None:
    """Apply a chunk in a frame."""
    client.frame([(session, XS)])


@pytest.mark.parametrize(
    ("apply", "call", "chunk", "chunks"),
    [
        (unary, "timernn.forward", "timernn.v1.TimeRnnService/Forward", 1),
        (streamed, "timernn.stream", "forward", 3),
        (framed, "timernn.frame", "forward", 1),
    ],
)
async def test_one_trace_shows_the_way_of_a_chunk(
    apply: Callable[[timernn.Client, timernn.Session], None],
    call: str,
    chunk: str,
    chunks: int,
    address: str,
    log: SpanLog,
) -> None:
    """Client, operation, batch and store, each below the one before, for every chunk."""

    def program() -> None:
        with timernn.connect(address, traces=log.provider) as client:
            client.create_model("m", input_size=2, hidden_size=3)
            session = client.session("m")
            session.forward(XS)
            log.clear()
            apply(client, session)

    await asyncio.to_thread(program)
    (root,) = log.named(call)
    sent = [span for span in log.below(root) if span.name == chunk]
    assert len(sent) == chunks
    for span in sent:
        (served,) = log.below(span)
        assert served.name == chunk
        assert attributes_of(served)["rpc.response.status_code"] == "OK"
        below = [each.name for each in log.below(served)]
        assert [name for name in below if name != "HMGET"] == ["batch", "commit_chunks"]  # a head
    assert {context_of(span).trace_id for span in log.all()} == {context_of(root).trace_id}


async def test_an_operation_is_linked_to_the_stream_that_carried_it(
    address: str, log: SpanLog
) -> None:
    """Its trace is its caller's, who may be another one than opened the stream."""

    def program() -> None:
        tracer = log.provider.get_tracer("test")
        with timernn.connect(address, traces=log.provider) as client:
            client.create_model("m", input_size=2, hidden_size=3)
            session = client.session("m")
            for name in ("first", "second"):
                with tracer.start_as_current_span(name):
                    client.frame([(session, XS)])

    await asyncio.to_thread(program)
    (stream,) = await _ended(log, "timernn.v1.TimeRnnService/Stream")
    served = [span for span in log.named("forward") if span.links]
    assert [link.context.span_id for span in served for link in span.links] == [
        context_of(stream).span_id
    ] * 2
    traces = [context_of(log.named(name)[0]).trace_id for name in ("first", "second")]
    assert [context_of(span).trace_id for span in served] == traces


async def test_chunks_of_several_traces_keep_to_their_own(address: str, log: SpanLog) -> None:
    """A batch and a round trip stand below a chunk that is in them, whichever ended before."""

    async def program() -> None:
        async with timernn.aio.connect(address, traces=log.provider) as client:
            await client.create_model("m", input_size=2, hidden_size=3)
            sessions = [await client.session("m") for _ in range(8)]
            log.clear()

            async def run(session: timernn.aio.Session) -> None:
                assert len([hs async for hs in session.stream([XS] * 12)]) == 12

            await asyncio.gather(*map(run, sessions))

    await program()
    served = [span for span in log.named("forward") if span.links]
    assert len(served) == 8 * 12
    for span in (*log.named("batch"), *log.named("commit_chunks")):
        (above,) = [each for each in served if is_child(span, each)]
        assert _began(above) <= _began(span) <= (above.end_time or 0)
    assert sum(attributes_of(span)["timernn.batch.chunks"] for span in log.named("batch")) == 96


def _began(span: ReadableSpan) -> int:
    return span.start_time or 0


async def _ended(log: SpanLog, name: str) -> list[ReadableSpan]:
    """Return the spans of a name once there is one."""
    while not log.named(name):  # noqa: ASYNC110 - ends when the server has noticed the client's end
        await asyncio.sleep(0.01)
    return log.named(name)


def test_spans_reach_a_collector(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call with its round trips, under the name of the service, the last ones at the end."""
    received: list[Any] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Keep quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{collector.server_port}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        with ServiceProcess(store_url, "--traces") as process:
            with grpc.insecure_channel(process.address) as channel:
                stub: Any = ModelServiceStub(channel)
                spec = ModelSpec(model_id="traced", input_size=2, hidden_size=3)
                stub.CreateModel(CreateModelRequest(spec=spec), timeout=30)
            assert process.terminate() == 0
        wait_until("the spans", lambda: bool(received))
        collector.shutdown()
    (resource,) = {each.SerializeToString(): each for each in _resources(received)}.values()
    names = {each.key: each.value.string_value for each in resource.attributes}
    assert names["service.name"] == "timernn"
    spans = [span for request in received for span in _spans(request)]
    (call,) = [span for span in spans if span.name == "timernn.v1.ModelService/CreateModel"]
    children = [span.name for span in spans if span.parent_span_id == call.span_id]
    assert "create_model" in children


def _resources(requests: list[Any]) -> list[Any]:
    return [each.resource for request in requests for each in request.resource_spans]


def _spans(request: Any) -> list[Any]:
    return [
        span
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
