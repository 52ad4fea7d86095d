"""OpenTelemetry spans that are kept in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan


class SpanLog:
    """The spans that have ended.

    Attributes:
        provider: What makes them.
    """

    def __init__(self) -> None:
        """Keep none yet."""
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    def all(self) -> tuple[ReadableSpan, ...]:
        """Return all, in the order in which they ended."""
        return self._exporter.get_finished_spans()

    def named(self, name: str) -> list[ReadableSpan]:
        """Return those of a name."""
        return [span for span in self.all() if span.name == name]

    def below(self, parent: ReadableSpan) -> list[ReadableSpan]:
        """Return the children of a span, in the order in which they began."""
        children = [span for span in self.all() if is_child(span, parent)]
        return sorted(children, key=lambda span: span.start_time or 0)

    def text(self) -> str:
        """Return all of them as they would be exported."""
        return "".join(span.to_json() for span in self.all())

    def clear(self) -> None:
        """Forget them."""
        self._exporter.clear()


def context_of(span: ReadableSpan) -> Any:
    """Return the ids of a span."""
    return span.get_span_context()


def attributes_of(span: ReadableSpan) -> dict[str, Any]:
    """Return the attributes of a span."""
    return dict(span.attributes or {})


def is_child(span: ReadableSpan, parent: ReadableSpan) -> bool:
    """Return whether a span belongs right below another one of the same trace."""
    ids = context_of(parent)
    above = span.parent
    return above is not None and (above.trace_id, above.span_id) == (ids.trace_id, ids.span_id)
