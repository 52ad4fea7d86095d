"""Spans of a client's calls by OpenTelemetry, for `connect(traces=...)`; nothing else imports this module.

A call of the caller's, such as `session.forward`, has one span over all that is done for it. Below it each attempt of a
unary call, an upload or a download has a span of its own, whose traceparent goes along in the metadata. A chunk on a stream
has one span over all its attempts, named in the message, since the call that carries it is not its own.

The core's generators are watched from outside: what they ask of a frontend is what there is to see.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final, TypeVar

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from timernn import errors
from timernn._core.contract import STREAM
from timernn._core.effects import Download, InTurn, OpenStream, Read, RpcCall, Upload, Write
from timernn._core.status import error_from_status
from timernn._core.targets import Target

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from opentelemetry.util.types import AttributeValue

    from timernn._core.effects import Effect, Mark, Op
    from timernn._core.stream import StreamCore
    from timernn.types import Array

R = TypeVar("R")
_W3C: Final = TraceContextTextMapPropagator()
_RPC: Final = {"rpc.system.name": "grpc"}
_STATUS: Final = "rpc.response.status_code"
_ERROR: Final = "error.type"
_LEFT: Final = {_ERROR: "CANCELLED"}  # of a chunk for which nobody waits any more


class Spans:
    """Makes the spans of one client.

    Args:
        provider: Whose they are; None: the process's.
        addresses: The targets, as effects number them.
    """

    def __init__(self, provider: trace.TracerProvider | None, addresses: Sequence[str]) -> None:
        self.tracer = trace.get_tracer("timernn", version("timernn"), provider)
        self.servers = [_server(Target.parse(address)) for address in addresses]

    def call(self, op: Op[R]) -> Op[R]:
        """Return a generator that does the same, as one call of the caller's."""
        work = _Work(self, op.__name__)  # type: ignore[attr-defined]  # all are generators
        try:
            return (yield from work.watch(op))
        finally:
            work.end()

    def stream(self, core: StreamCore) -> TracedStream:
        """Return a stream that does the same, as one call of the caller's."""
        return TracedStream(core, _Work(self, "stream"))


class TracedStream:
    """A stream as one call of the caller's, however many steps it takes.

    Args:
        core: The stream.
        work: Its span, with those of its chunks.
    """

    def __init__(self, core: StreamCore, work: _Work) -> None:
        self._core, self._work = core, work

    def open(self) -> Op[None]:
        """Do as `StreamCore.open`."""
        return self._work.watch(self._core.open())

    def step(self) -> Op[Array | Mark[Any]]:
        """Do as `StreamCore.step`."""
        return self._work.watch(self._core.step())

    def close(self, *, is_left: bool = False) -> None:
        """Do as `StreamCore.close`."""
        self._core.close(is_left=is_left)
        self._work.end()


class _Work:
    """One call of the caller's: its span, and those of its chunks that have no answer yet."""

    def __init__(self, spans: Spans, name: str) -> None:
        self._spans = spans
        self._span = spans.tracer.start_span(f"timernn.{name}")
        self._context = trace.set_span_in_context(self._span)
        self._chunks: dict[int, _Chunk] = {}  # by tag
        self._failure: Mapping[str, str] | None = None

    def watch(self, op: Op[R]) -> Op[R]:
        """Do what a generator of the core does."""
        try:
            effect = next(op)
            while True:
                effect, attempt = self._began(effect)
                try:
                    outcome = yield effect
                except BaseException as error:  # noqa: BLE001  # an interrupt too is the core's to see
                    self._failed(effect, attempt, error)
                    effect = op.throw(error)
                else:
                    self._succeeded(effect, attempt, outcome)
                    effect = op.send(outcome)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        except BaseException as error:
            self._failure = _outcome(error)
            raise

    def end(self) -> None:
        """End the span, and those of chunks that nobody waits for any more; may be repeated."""
        for chunk in self._chunks.values():
            _end(chunk.span, chunk.failure or self._failure or _LEFT)
        self._chunks.clear()
        if self._span.is_recording():
            _end(self._span, self._failure)

    def _began(self, effect: Effect) -> tuple[Effect, trace.Span | None]:
        """Return an effect with what the server has to know, and the span of an attempt of its own."""
        match effect:
            case RpcCall() | Download() | Upload():
                attempt = self._child(effect.rpc.path[1:], effect.rpc.path[1:], effect.address)
                return replace(effect, headers=_headers(attempt)), attempt
            case OpenStream():
                return replace(effect, headers=_headers(self._span)), None
            case InTurn(lock, op):
                return InTurn(lock, self.watch(op)), None
            case Write(_, message):
                for operation in message.operations:
                    self._send(operation)
        return effect, None

    def _send(self, operation: Any) -> None:
        """Have an operation on a stream name its span, which begins when it is sent first."""
        chunk = self._chunks.get(operation.tag)
        if chunk is None:
            span = self._child(operation.WhichOneof("operation"), STREAM.path[1:])
            chunk = self._chunks[operation.tag] = _Chunk(span)
        else:
            chunk.span.add_event("sent again")
        for key, value in _headers(chunk.span):
            setattr(operation, key, value)

    def _child(self, name: str, method: str, address: int | None = None) -> trace.Span:
        attributes: dict[str, AttributeValue] = {**_RPC, "rpc.method": method}
        if address is not None:
            attributes |= self._spans.servers[address]
        return self._spans.tracer.start_span(
            name, self._context, kind=trace.SpanKind.CLIENT, attributes=attributes
        )

    def _succeeded(self, effect: Effect, attempt: trace.Span | None, outcome: Any) -> None:
        if attempt is not None:
            attempt.set_attribute(_STATUS, "OK")
            attempt.end()
        elif isinstance(effect, Read) and outcome is not None:
            for result in outcome.results:
                self._answered(result)

    def _answered(self, result: Any) -> None:
        """End the span of a chunk that was applied; one that was refused may be sent again."""
        chunk = self._chunks.get(result.tag)
        if chunk is None:
            return
        if result.HasField("error"):
            chunk.fail(_outcome(error_from_status(result.error)))
            return
        del self._chunks[result.tag]
        chunk.span.set_attribute(_STATUS, "OK")
        chunk.span.end()

    def _failed(self, effect: Effect, attempt: trace.Span | None, error: BaseException) -> None:
        if attempt is not None:
            _end(attempt, _outcome(error))
        elif isinstance(effect, Read | Write):
            for chunk in self._chunks.values():
                chunk.fail(_outcome(error))


class _Chunk:
    """A chunk on a stream that was sent and has no answer yet.

    Attributes:
        span: From when it was sent first.
        failure: How its last attempt ended, as attributes; None while it goes on.
    """

    def __init__(self, span: trace.Span) -> None:
        self.span = span
        self.failure: Mapping[str, str] | None = None

    def fail(self, failure: Mapping[str, str]) -> None:
        """Note that an attempt has failed; another one may follow."""
        self.failure = failure
        self.span.add_event("attempt failed", failure)


def _headers(span: trace.Span) -> tuple[tuple[str, str], ...]:
    """Return what the server is to know of a span, by the W3C's names."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, trace.set_span_in_context(span))
    return tuple(carrier.items())


def _server(target: Target) -> dict[str, AttributeValue]:
    """Return where a target leads; with several hosts, the target as it is."""
    if len(target.hosts) != 1:
        return {"server.address": target.text}
    return {
        "server.address": target.hosts[0],
        "server.port": int(target.text.rpartition(":")[2]),
    }


def _outcome(error: BaseException) -> Mapping[str, str]:
    """Return how something ended, as attributes; a message may hold names that are no trace's."""
    if isinstance(error, errors.Error):
        return {_STATUS: error.code.name, _ERROR: error.reason or error.code.name}
    return {_ERROR: type(error).__name__}


def _end(span: trace.Span, failure: Mapping[str, str] | None) -> None:
    if failure is not None:
        span.set_attributes(failure)
        span.set_status(trace.StatusCode.ERROR)
    span.end()
