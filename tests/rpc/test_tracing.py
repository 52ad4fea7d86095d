"""Spans of calls, of operations on a stream, of batches and of round trips, and whose children they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.trace import SpanKind, StatusCode

from service.domain.errors import Aborted, Unavailable
from service.tracing import SpanObserver
from spans import SpanLog, attributes_of, context_of, is_child
from timernn.v1 import time_rnn_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Serve = Callable[..., Awaitable[Any]]
    Refused = Callable[[Awaitable[Any]], Awaitable[Any]]

FORWARD = "timernn.v1.TimeRnnService/Forward"
STREAM = "timernn.v1.TimeRnnService/Stream"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
METADATA = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("authorization", "Bearer marker-secret"))


class Spans(SpanLog):
    """The spans of an observer, and the observer."""

    def __init__(self) -> None:
        """Make the observer."""
        super().__init__()
        self.observer = SpanObserver(self.provider.get_tracer("test"))


@pytest.fixture
def spans() -> Spans:
    """Return an observer that keeps its spans."""
    return Spans()


@pytest.fixture
def chunk(tensor: Callable[..., Any]) -> Callable[..., pb.ForwardRequest]:
    """Make a chunk of a session."""

    def chunk(session_id: str = "a", chunk_seq: int = 1) -> pb.ForwardRequest:
        return pb.ForwardRequest(
            session_id=session_id, epoch=1, chunk_seq=chunk_seq, xs=tensor(1, 1, 1)
        )

    return chunk


async def test_a_call_is_a_child_of_its_clients_span(
    serve: Serve, spans: Spans, chunk: Callable[..., Any]
) -> None:
    """By the W3C's metadata; nothing of other metadata is in a span."""
    served = await serve(observer=spans.observer)
    request = chunk()
    answer = await served.rnn.Forward(request, metadata=METADATA)
    (span,) = spans.named(FORWARD)
    assert span.kind is SpanKind.SERVER
    assert (f"{context_of(span).trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)  # type: ignore[union-attr]
    assert attributes_of(span) == {
        "rpc.system.name": "grpc",
        "rpc.method": FORWARD,
        "rpc.response.status_code": "OK",
        "timernn.outcome": "OK",
        "timernn.request.bytes": request.ByteSize(),
        "timernn.answer.bytes": answer.ByteSize(),
    }
    assert "marker-secret" not in spans.text()


@pytest.mark.parametrize(
    ("failure", "code", "status"),
    [
        (Aborted("SEQ_GAP", "a hole"), "ABORTED", StatusCode.UNSET),
        (Unavailable("STORE_DOWN", "no answer"), "UNAVAILABLE", StatusCode.ERROR),
    ],
)
async def test_a_refusal_is_an_error_only_where_the_server_is_at_fault(
    serve: Serve,
    refused: Refused,
    spans: Spans,
    chunk: Callable[..., Any],
    failure: Any,
    code: str,
    status: StatusCode,
) -> None:
    """Code and reason stand in the span in either case."""
    served = await serve(observer=spans.observer)
    served.domain.failures[1] = failure
    await refused(served.rnn.Forward(chunk()))
    (span,) = spans.named(FORWARD)
    found = attributes_of(span)
    assert (found["error.type"], found["timernn.outcome"]) == (code, failure.reason)
    assert span.status.status_code is status


async def test_an_operation_is_a_child_of_its_own_stream(
    serve: Serve, spans: Spans, chunk: Callable[..., Any], until: Callable[..., Awaitable[None]]
) -> None:
    """Also where the callback that answers it is another stream's."""
    served = await serve(observer=spans.observer)
    served.domain.hold = True
    streams = [served.rnn.Stream(), served.rnn.Stream()]
    for stream, session_id in zip(streams, "ab", strict=True):
        operation = pb.Operation(tag=1, forward=chunk(session_id))
        await stream.write(pb.StreamRequest(operations=[operation]))
    await until(lambda: len(served.domain.held) == 2)
    served.domain.release()  # both in one context
    for stream in streams:
        await stream.read()
        await stream.done_writing()
        await stream.read()
    await until(lambda: len(spans.named(STREAM)) == 2)
    operations = spans.named("forward")
    assert len(operations) == 2
    parents = {span.parent.span_id for span in operations if span.parent}
    assert parents == {context_of(span).span_id for span in spans.named(STREAM)}


async def test_an_operation_that_names_its_clients_span_is_a_child_of_that(
    serve: Serve, spans: Spans, chunk: Callable[..., Any], until: Callable[..., Awaitable[None]]
) -> None:
    """With a link to the stream that carried it; one that names none, or none that can be read, is the stream's."""
    served = await serve(observer=spans.observer)
    named = f"00-{TRACE}-{PARENT}-01"
    headers: list[dict[str, Any]] = [
        {"traceparent": named, "tracestate": "a=b"},
        {"traceparent": named, "tracestate": f"a={'b' * 512}"},
        {"traceparent": "00-00"},
        {"traceparent": "x" * 10_000},
        {},
    ]
    stream = served.rnn.Stream()
    operations = [
        pb.Operation(tag=tag, forward=chunk(f"s{tag}"), **each) for tag, each in enumerate(headers)
    ]
    await stream.write(pb.StreamRequest(operations=operations))
    await stream.done_writing()
    assert sum([len(answer.results) async for answer in stream]) == 5
    await until(lambda: spans.named(STREAM))
    (call,) = spans.named(STREAM)
    linked, without_state, *others = spans.named("forward")
    for span in (linked, without_state):
        assert span.kind is SpanKind.SERVER
        assert span.parent is not None
        assert (f"{span.parent.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
        assert [link.context for link in span.links] == [context_of(call)]
    assert context_of(linked).trace_state.get("a") == "b"
    assert not context_of(without_state).trace_state
    for span in others:
        assert span.kind is SpanKind.INTERNAL
        assert is_child(span, call)


@pytest.mark.parametrize(
    ("failure", "code", "status"),
    [
        (Aborted("SEQ_GAP", "a hole"), "ABORTED", StatusCode.UNSET),
        (Unavailable("STORE_DOWN", "no answer"), "UNAVAILABLE", StatusCode.ERROR),
    ],
)
async def test_a_refused_operation_is_an_error_as_a_call_is(
    serve: Serve,
    spans: Spans,
    chunk: Callable[..., Any],
    failure: Any,
    code: str,
    status: StatusCode,
) -> None:
    """On a stream too, only where the server is at fault; the stream itself is none."""
    served = await serve(observer=spans.observer)
    served.domain.failures[1] = failure
    stream = served.rnn.Stream()
    await stream.write(pb.StreamRequest(operations=[pb.Operation(forward=chunk())]))
    await stream.read()
    (span,) = spans.named("forward")
    found = attributes_of(span)
    assert (found["error.type"], found["timernn.outcome"]) == (code, failure.reason)
    assert found["rpc.response.status_code"] == code
    assert span.status.status_code is status


async def test_batches_and_round_trips_are_children_of_the_call_that_they_began_in(
    spans: Spans,
) -> None:
    """As long ago as they took; outside of a call there is no span."""
    observer = spans.observer
    trip: dict[str, Any] = {"commands": 2, "sent_bytes": 1, "received_bytes": 2, "is_lost": True}
    observer.round_trip_ended("info", duration_s=0.1, **trip)
    observer.rpc_started(f"/{FORWARD}", lambda: METADATA)
    observer.batch_computed(chunks=2, rows=3, work=4, wait_s=0.5, duration_s=0.25)
    observer.round_trip_ended("commit_chunks", duration_s=0.1, **trip)
    observer.rpc_ended(f"/{FORWARD}", code="OK", duration_s=1.0)
    (call,) = spans.named(FORWARD)
    (batch,), (sent,) = spans.named("batch"), spans.named("commit_chunks")
    assert not spans.named("info")
    for span in (batch, sent):
        assert span.parent is not None
        assert span.parent.span_id == context_of(call).span_id
    assert (batch.end_time or 0) - (batch.start_time or 0) == 250_000_000
    assert attributes_of(batch)["timernn.batch.rows"] == 3
    found = attributes_of(sent)
    assert (found["db.system.name"], found["db.operation.name"]) == ("redis", "commit_chunks")
    assert (found["db.operation.batch.size"], found["error.type"]) == (2, "lost")
    assert (sent.kind, sent.status.status_code) == (SpanKind.CLIENT, StatusCode.ERROR)


def test_what_a_client_does_not_sample_costs_no_span(spans: Spans) -> None:
    """The client's decision is kept for all that belongs to the call."""
    observer = spans.observer
    not_sampled = (("traceparent", f"00-{TRACE}-{PARENT}-00"),)
    observer.rpc_started(f"/{FORWARD}", lambda: not_sampled)
    observer.batch_computed(chunks=2, rows=3, work=4, wait_s=0.5, duration_s=0.25)
    observer.rpc_ended(f"/{FORWARD}", code="OK", duration_s=1.0)
    assert spans.all() == ()


def test_probes_make_no_spans(spans: Spans) -> None:
    """Health checks each second would fill the traces."""
    method = "/grpc.health.v1.Health/Check"
    spans.observer.rpc_started(method, lambda: METADATA)
    spans.observer.rpc_ended(method, code="OK", duration_s=0.1)
    assert spans.all() == ()
