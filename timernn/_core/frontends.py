"""What both frontends do alike: the core's generators shown as methods, errors without its insides."""

from __future__ import annotations

import inspect
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from timernn import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from timernn._core.options import Traces
    from timernn._core.tracing import Spans

F = TypeVar("F", bound="Callable[..., Any]")


def drives(op: Callable[..., Any], owner: str) -> Callable[[F], F]:
    """Show a method of a frontend as what it does: a generator of the core, driven to its end.

    Args:
        op: The generator function; the method takes over its name, documentation and parameters.
        owner: The frontend's class.
    """
    signature = inspect.signature(op)
    result = str(signature.return_annotation).removeprefix("Op[").removesuffix("]")

    def show(method: F) -> F:
        wraps(op)(method)
        method.__qualname__ = f"{owner}.{op.__name__}"
        method.__annotations__ = {**op.__annotations__, "return": result}
        method.__signature__ = signature.replace(return_annotation=result)  # type: ignore[attr-defined]  # read by inspect
        return method

    return show


def spans_of(traces: Traces, addresses: Sequence[str]) -> Spans | None:
    """Return what makes the spans of a client's calls; None, and nothing imported, if none are wanted.

    Args:
        traces: The argument of `connect`.
        addresses: The targets, as effects number them.

    Raises:
        BadField: If OpenTelemetry is not installed.
    """
    if traces is False:
        return None
    try:
        from timernn._core.tracing import Spans  # noqa: PLC0415  # an extra of its own
    except ModuleNotFoundError as error:
        text = "traces: expected OpenTelemetry to be installed: pip install 'timernn[otel]'"
        raise errors.BadField(text, metadata={"field": "traces"}) from error
    return Spans(None if traces is True else traces, addresses)


def shortened(error: errors.Error) -> errors.Error:
    """Return an error for the caller: what it came from is its `cause`, not pages of traceback."""
    error.cause = error.cause or error.__cause__ or error.__context__
    error.__cause__, error.__suppress_context__ = None, True
    return error.with_traceback(None)
