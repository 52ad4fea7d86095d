"""Traces by OpenTelemetry: what an `Observer` sees as spans. Needs the extra `timernn[otel]`.

A call is a span of kind SERVER, whose parent is the client's by the W3C's `traceparent` in its metadata. Below it are the
operations of a Stream, the batch and the round trips to the store. Chunks of several callers share batches and round
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
_OF_A_STREAM: Final = "/Stream"
_OK: Final = "OK"
# What the conventions call the server's own fault; the others are what it was asked.
_FAULTS: Final = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
_W3C: Final = TraceContextTextMapPropagator()
_HEADERS: Final = ("traceparent", "tracestate")


class _Call(NamedTuple):
    """The call in whose context something happens."""

    method: str
    span: trace.Span


_CALL: ContextVar[_Call | None] = ContextVar("call", default=None)


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
            _CALL.set(None)
            return
        carrier = {
            key: value
            for key, value in metadata() or ()
            if key in _HEADERS and isinstance(value, str)
        }
        name = method.removeprefix("/")
        span = self._tracer.start_span(
            name,
            context=_W3C.extract(carrier),
            kind=trace.SpanKind.SERVER,
            attributes={"rpc.system.name": "grpc", "rpc.method": name},
        )
        _CALL.set(_Call(method, span))

    def rpc_ended(self, method: str, *, code: str, duration_s: float) -> None:  # noqa: ARG002
        """End the span of a call."""
        call = _CALL.get()
        if call is None or call.method != method:
            return
        call.span.set_attribute("rpc.response.status_code", code)
        if code != _OK:
            call.span.set_attribute("error.type", code)
        if code in _FAULTS:
            call.span.set_status(trace.StatusCode.ERROR)
        call.span.end()

    def operation_ended(
        self, kind: str, *, outcome: str, duration_s: float, request_bytes: int, answer_bytes: int
    ) -> None:
        """Add an operation to its call's span; one of a Stream has a span of its own."""
        call = _CALL.get()
        if call is None:
            return
        attributes: dict[str, AttributeValue] = {
            "timernn.outcome": outcome,
            "timernn.request.bytes": request_bytes,
            "timernn.answer.bytes": answer_bytes,
        }
        if not call.method.endswith(_OF_A_STREAM):
            call.span.set_attributes(attributes)
            return
        if outcome != _OK:
            attributes["error.type"] = outcome
        self._child(kind, duration_s, attributes)

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
        call = _CALL.get()
        if call is None or not call.span.get_span_context().trace_flags.sampled:
            return
        ended_ns = time.time_ns()
        span = self._tracer.start_span(
            name,
            context=trace.set_span_in_context(call.span),
            kind=kind,
            attributes=attributes,
            start_time=ended_ns - int(duration_s * 1e9),
        )
        if "error.type" in attributes:
            span.set_status(trace.StatusCode.ERROR)
        span.end(ended_ns)


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
