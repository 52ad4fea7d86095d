"""Spans of a client's calls: whose children they are, what they hold, and that nobody else pays for them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from opentelemetry.trace import SpanKind, StatusCode

import timernn
from spans import SpanLog, attributes_of, is_child

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opentelemetry.sdk.trace import ReadableSpan

XS = np.ones((1, 4, 3), "f4")
FORWARD = "timernn.v1.TimeRnnService/Forward"
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.fixture
def log() -> SpanLog:
    """What keeps the spans."""
    return SpanLog()


@pytest.fixture
def traced(stand_in: Any, quick: timernn.RetryPolicy, log: SpanLog) -> Iterator[timernn.Client]:
    """A blocking client that makes spans."""
    with timernn.connect(
        stand_in.address, timeout=5, retry=quick, traces=log.provider
    ) as connected:
        yield connected


def forward_blocking(address: str, log: SpanLog, quick: timernn.RetryPolicy) -> None:
    """Apply a chunk below a span of the caller's own."""
    with timernn.connect(address, retry=quick, traces=log.provider) as client:
        session = client.session("m")
        with log.provider.get_tracer("test").start_as_current_span("own"):
            session.forward(XS)


def forward_awaited(address: str, log: SpanLog, quick: timernn.RetryPolicy) -> None:
    """Do the same with asyncio."""

    async def program() -> None:
        async with timernn.aio.connect(address, retry=quick, traces=log.provider) as client:
            session = await client.session("m")
            with log.provider.get_tracer("test").start_as_current_span("own"):
                await session.forward(XS)

    asyncio.run(program())


def stream_blocking(address: str, log: SpanLog, quick: timernn.RetryPolicy) -> None:
    """Apply three chunks over a stream."""
    with timernn.connect(address, retry=quick, traces=log.provider) as client:
        assert len(list(client.session("m").stream([XS] * 3))) == 3


def stream_awaited(address: str, log: SpanLog, quick: timernn.RetryPolicy) -> None:
    """Do the same with asyncio."""

    async def program() -> None:
        async with timernn.aio.connect(address, retry=quick, traces=log.provider) as client:
            session = await client.session("m")
            assert len([hs async for hs in session.stream([XS] * 3)]) == 3

    asyncio.run(program())


def events_of(span: ReadableSpan) -> list[str]:
    """Return the names of a span's events."""
    return [event.name for event in span.events]


@pytest.mark.parametrize("program", [forward_blocking, forward_awaited])
def test_a_call_is_a_span_over_its_attempts(
    program: Callable[..., None],
    stand_in: Any,
    quick: timernn.RetryPolicy,
    refusal: Callable[..., Any],
    log: SpanLog,
) -> None:
    """The caller's own span is above it; the attempt that failed and the one that did not are below it."""
    stand_in.fail_next("Forward", refusal(UNAVAILABLE, "STORE_DOWN"))
    program(stand_in.address, log, quick)
    (own,), (call,) = log.named("own"), log.named("timernn.forward")
    assert is_child(call, own)
    failed, answered = log.below(call)
    host, port = stand_in.address.split(":")
    common = {
        "rpc.system.name": "grpc",
        "rpc.method": FORWARD,
        "server.address": host,
        "server.port": int(port),
    }
    assert {failed.name, answered.name} == {FORWARD}
    assert {failed.kind, answered.kind} == {SpanKind.CLIENT}
    assert attributes_of(answered) == {**common, "rpc.response.status_code": "OK"}
    assert attributes_of(failed) == {
        **common,
        "rpc.response.status_code": "UNAVAILABLE",
        "error.type": "STORE_DOWN",
    }
    assert failed.status.status_code is StatusCode.ERROR
    assert call.status.status_code is StatusCode.UNSET


def test_a_step_that_takes_its_turn_is_a_span_over_its_attempts(
    traced: timernn.Client, log: SpanLog
) -> None:
    """What is sent once the turn has come is the call's as well."""
    session = traced.session("m", train=True)
    session.backward(session.forward(XS))
    session.update()
    (call,) = log.named("timernn.update")
    assert [each.name for each in log.below(call)] == ["timernn.v1.TimeRnnService/Update"]


def test_a_call_that_is_given_up_has_its_error(
    traced: timernn.Client, stand_in: Any, refusal: Callable[..., Any], log: SpanLog
) -> None:
    """By its reason; no text of the server's, which may hold names, is in a span."""
    session = traced.session("m", "marker-session")
    stand_in.fail_next("Forward", refusal(grpc.StatusCode.INVALID_ARGUMENT, "BAD_TENSOR"))
    with pytest.raises(timernn.errors.BadTensor):
        session.forward(XS)
    (call,) = log.named("timernn.forward")
    assert attributes_of(call) == {
        "rpc.response.status_code": "INVALID_ARGUMENT",
        "error.type": "BAD_TENSOR",
    }
    assert call.status.status_code is StatusCode.ERROR
    assert "marker-session" not in log.text()
    assert "refused: " not in log.text()


@pytest.mark.parametrize("program", [stream_blocking, stream_awaited])
def test_a_chunk_on_a_stream_is_a_span_over_its_attempts(
    program: Callable[..., None],
    stand_in: Any,
    quick: timernn.RetryPolicy,
    refusal: Callable[..., Any],
    log: SpanLog,
) -> None:
    """A stream that breaks is opened again; each chunk still has one span, below the stream's one."""
    stand_in.apply_next("Forward", 1)
    stand_in.fail_next("Forward", refusal(UNAVAILABLE, "BREAK"))
    program(stand_in.address, log, quick)
    (stream,) = log.named("timernn.stream")
    spans = log.below(stream)
    assert [span.name for span in spans] == ["forward"] * 3
    assert events_of(spans[1]) == ["attempt failed", "sent again"]
    for span in spans:
        assert attributes_of(span)["rpc.response.status_code"] == "OK"
        assert (span.kind, span.status.status_code) == (SpanKind.CLIENT, StatusCode.UNSET)
    assert stream.status.status_code is StatusCode.UNSET


def test_a_chunk_that_is_refused_fails_with_its_stream(
    traced: timernn.Client, stand_in: Any, refusal: Callable[..., Any], log: SpanLog
) -> None:
    """Those before it are not touched by it."""
    session = traced.session("m")
    stand_in.apply_next("Forward", 1)
    stand_in.fail_next("Forward", refusal(grpc.StatusCode.INVALID_ARGUMENT, "BAD_TENSOR"))
    with pytest.raises(timernn.errors.BadTensor):
        list(session.stream([XS] * 2, in_flight=1))
    (stream,) = log.named("timernn.stream")
    answered, refused = log.below(stream)
    assert attributes_of(answered)["rpc.response.status_code"] == "OK"
    for span in (refused, stream):
        assert attributes_of(span)["error.type"] == "BAD_TENSOR"
        assert span.status.status_code is StatusCode.ERROR


def test_a_stream_that_is_left_early_ends_its_spans(traced: timernn.Client, log: SpanLog) -> None:
    """Chunks that were sent ahead are said to be cancelled, for nobody has waited for their answers."""
    session = traced.session("m")
    for _ in session.stream([XS] * 8):
        break
    (stream,) = log.named("timernn.stream")
    first, *ahead = log.below(stream)
    assert attributes_of(first)["rpc.response.status_code"] == "OK"
    assert {attributes_of(span).get("error.type") for span in ahead} <= {"CANCELLED", None}
    assert stream.status.status_code is StatusCode.UNSET


def test_each_chunk_of_a_frame_has_a_span(
    traced: timernn.Client, stand_in: Any, refusal: Callable[..., Any], log: SpanLog
) -> None:
    """The one that is refused has its own error, and the frame none."""
    sessions = [traced.session("m") for _ in range(2)]
    stand_in.fail_next("Forward", refusal(grpc.StatusCode.INVALID_ARGUMENT, "BAD_TENSOR"))
    failed, hs = traced.frame([(session, XS) for session in sessions])
    assert isinstance(failed, timernn.errors.BadTensor)
    assert not isinstance(hs, timernn.Error)
    (frame,) = log.named("timernn.frame")
    assert [attributes_of(span).get("error.type") for span in log.below(frame)] == [
        "BAD_TENSOR",
        None,
    ]
    assert frame.status.status_code is StatusCode.UNSET


def test_a_client_without_traces_is_one_without_opentelemetry(stand_in: Any) -> None:
    """Nothing of it is imported by either frontend, nor what would make spans."""
    program = f"""
import asyncio, sys
import numpy, timernn
xs = numpy.ones((1, 4, 3), "f4")
with timernn.connect({stand_in.address!r}) as client:
    session = client.session("m")
    session.forward(xs)
    list(session.stream([xs] * 2))
async def awaited():
    async with timernn.aio.connect({stand_in.address!r}) as client:
        await client.server_info()
asyncio.run(awaited())
print(*(name for name in sys.modules if "opentelemetry" in name or "tracing" in name.split(".")[-1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert [name for name in done.stdout.split() if name != "grpc._observability"] == []


@pytest.mark.parametrize("is_traced", [False, True])
def test_a_client_without_traces_makes_no_call_for_them(
    stand_in: Any, log: SpanLog, *, is_traced: bool
) -> None:
    """Also where OpenTelemetry is loaded: not one Python function of it or of ours for it runs."""
    called: set[str] = set()

    def note(frame: Any, event: str, _: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and ("/opentelemetry/" in name or name.endswith("_core/tracing.py")):
            called.add(name)

    threading.setprofile(note)  # of the threads that begin from now on
    sys.setprofile(note)
    try:
        with timernn.connect(
            stand_in.address, traces=log.provider if is_traced else False
        ) as client:
            session = client.session("m")
            session.forward(XS)
            list(session.stream([XS] * 3))
            client.frame([(session, XS)])
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert bool(called) is is_traced


def test_traces_without_opentelemetry_say_what_to_install(
    stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instead of an ImportError from the library's inside."""
    monkeypatch.setitem(sys.modules, "timernn._core.tracing", None)
    for connect in (timernn.connect, timernn.aio.connect):
        with pytest.raises(timernn.errors.BadField, match=r"pip install 'timernn\[otel\]'"):
            connect(stand_in.address, traces=True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"traces": "yes"}, "traces: expected True, False or a TracerProvider"),
        (
            {"traces": True, "metadata": {"traceparent": "00-1-2-01"}},
            "metadata: expected no traceparent beside traces",
        ),
    ],
)
def test_what_is_no_provider_is_refused(arguments: dict[str, Any], expected: str) -> None:
    """By the argument's name, before anything is connected."""
    with pytest.raises(timernn.errors.BadField, match=expected):
        timernn.connect("localhost", **arguments)
