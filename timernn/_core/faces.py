"""What both faces do alike: the core's documentation as their own, and errors without its insides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from timernn import errors

F = TypeVar("F", bound="Callable[..., Any]")


def documented_by(op: Callable[..., Any]) -> Callable[[F], F]:
    """Give a method the docstring of the generator that it drives."""

    def document(method: F) -> F:
        method.__doc__ = op.__doc__
        return method

    return document


def shortened(error: errors.Error) -> errors.Error:
    """Return an error for the caller: what it came from is its `cause`, not pages of traceback."""
    error.cause = error.cause or error.__cause__ or error.__context__
    error.__cause__, error.__suppress_context__ = None, True
    return error.with_traceback(None)
