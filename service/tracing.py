"""Traces by OpenTelemetry: what an `Observer` sees as spans. Needs the extra `timernn[otel]`.

A call is a span of kind SERVER, whose parent is the client's by the W3C's `traceparent` in its metadata. So is an operation of
a Stream that has a `traceparent` of its own, with a link to the Stream's span; one without is a child of that. Below a call or
an operation are the batch and the round trips to the store that it began. Chunks of several callers share batches and round
trips; the span of such a one stands in the trace of the first of them.

Names and attributes are those of OpenTelemetry's conventions for RPC and databases, others begin with `timernn.`; no
session, model or tenant is in one.
"""

from __future__ import annotations

import os
import time
from contextvars import ContextVar
from importlib.metadata import version
from typing import TYPE_CHECKING, Final, NamedTuple

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.telemetry import Observer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from opentelemetry.util.types import AttributeValue

_OURS: Final = "/timernn."  # probes and tools would fill the traces
_OK: Final = "OK"
# What the conventions call the server's own fault; the others are what it was asked.
_FAULTS: Final = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
_W3C: Final = TraceContextTextMapPropagator()
_HEADERS: Final = ("traceparent", "tracestate")
_MAX_HEADER: Final = 512  # characters, as many as the W3C asks to carry at least


class _Work(NamedTuple):
    """What something belongs to that happens in this context.

    Attributes:
        span: Of a call, or of an operation of a Stream.
        method: Of the call; empty for an operation.
    """

    span: trace.Span
    method: str = ""


_WORK: ContextVar[_Work | None] = ContextVar("work", default=None)


class SpanObserver(Observer):
    """Makes spans of what it sees."""

    def __init__(self, tracer: trace.Tracer) -> None:
        """Keep what makes the spans."""
        self._tracer = tracer

    def rpc_started(
        self, method: str, metadata: Callable[[], Iterable[tuple[str, str | bytes]] | None]
    ) -> None:
        """Begin the span of a call."""
        if not method.startswith(_OURS):
            _WORK.set(None)
            return
        name = method.removeprefix("/")
        span = self._tracer.start_span(
            name,
            context=_client_of(metadata() or ()),
            kind=trace.SpanKind.SERVER,
            attributes={"rpc.system.name": "grpc", "rpc.method": name},
        )
        _WORK.set(_Work(span, method))

    def rpc_ended(self, method: str, *, code: str, duration_s: float) -> None:  # noqa: ARG002
        """End the span of a call."""
        work = _WORK.get()
        if work is not None and work.method == method:
            _end(work.span, code)

    def operation_started(
        self, kind: str, headers: Callable[[], Iterable[tuple[str, str]]]
    ) -> None:
        """Begin the span of an operation of a Stream, below the client's where it names one."""
        call = _WORK.get()
        if call is None:
            return
        parent, links, span_kind = _client_of(headers()), [], trace.SpanKind.SERVER
        if trace.get_current_span(parent).get_span_context().is_valid:
            links = [trace.Link(call.span.get_span_context())]
        else:
            parent, span_kind = trace.set_span_in_context(call.span), trace.SpanKind.INTERNAL
        span = self._tracer.start_span(kind, context=parent, kind=span_kind, links=links)
        _WORK.set(_Work(span))

    def operation_ended(
        self,
        kind: str,  # noqa: ARG002 - of the span since its begin
        *,
        outcome: str,
        code: str,
        duration_s: float,  # noqa: ARG002 - what was begun is ended now
        request_bytes: int,
        answer_bytes: int,
    ) -> None:
        """Add an operation to its call's span, or end its own if it is a Stream's."""
        work = _WORK.get()
        if work is None:
            return
        work.span.set_attributes(
            {
                "timernn.outcome": outcome,
                "timernn.request.bytes": request_bytes,
                "timernn.answer.bytes": answer_bytes,
            }
        )
        if not work.method:
            _end(work.span, code)

    def batch_computed(
        self, *, chunks: int, rows: int, work: int, wait_s: float, duration_s: float
    ) -> None:
        """Make a span of a joined forward pass."""
        attributes = {
            "timernn.batch.chunks": chunks,
            "timernn.batch.rows": rows,
            "timernn.batch.work": work,
            "timernn.batch.wait": wait_s,
        }
        self._child("batch", duration_s, attributes)

    def round_trip_ended(
        self,
        name: str,
        *,
        commands: int,
        duration_s: float,
        sent_bytes: int,
        received_bytes: int,
        is_lost: bool,
    ) -> None:
        """Make a span of a round trip to the store."""
        attributes: dict[str, AttributeValue] = {
            "db.system.name": "redis",
            "db.operation.name": name,
            "timernn.sent.bytes": sent_bytes,
            "timernn.received.bytes": received_bytes,
        }
        if commands > 1:
            attributes["db.operation.batch.size"] = commands
        if is_lost:
            attributes["error.type"] = "lost"
        self._child(name, duration_s, attributes, trace.SpanKind.CLIENT)

    def _child(
        self,
        name: str,
        duration_s: float,
        attributes: Mapping[str, AttributeValue],
        kind: trace.SpanKind = trace.SpanKind.INTERNAL,
    ) -> None:
        """Make a span of what has just ended; none outside of a call, or in one that is not sampled."""
        work = _WORK.get()
        if work is None or not work.span.get_span_context().trace_flags.sampled:
            return
        ended_ns = time.time_ns()
        span = self._tracer.start_span(
            name,
            context=trace.set_span_in_context(work.span),
            kind=kind,
            attributes=attributes,
            start_time=ended_ns - int(duration_s * 1e9),
        )
        if "error.type" in attributes:
            span.set_status(trace.StatusCode.ERROR)
        span.end(ended_ns)


def _client_of(headers: Iterable[tuple[str, str | bytes]]) -> Context:
    """Return a context whose span is the client's, if what came names a valid one."""
    carrier = {
        key: value
        for key, value in headers
        if key in _HEADERS and isinstance(value, str) and len(value) <= _MAX_HEADER
    }
    return _W3C.extract(carrier, Context())


def _end(span: trace.Span, code: str) -> None:
    span.set_attribute("rpc.response.status_code", code)
    if code != _OK:
        span.set_attribute("error.type", code)
    if code in _FAULTS:
        span.set_status(trace.StatusCode.ERROR)
    span.end()


def start_tracing(worker: int) -> tuple[SpanObserver, Callable[[], None]]:
    """Begin to send traces, as the environment variables OTEL_… say.

    Args:
        worker: The number of this worker; 0 if the process is none.

    Returns:
        What makes the spans, and what sends the last of them and ends.
    """
    own: dict[str, AttributeValue] = {
        "service.version": version("timernn"),
        "process.pid": os.getpid(),
    }
    if worker:
        own["timernn.worker"] = worker
    if "OTEL_SERVICE_NAME" not in os.environ:
        own["service.name"] = "timernn"
    provider = TracerProvider(resource=Resource.create(own), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return SpanObserver(provider.get_tracer("timernn", version("timernn"))), provider.shutdown
