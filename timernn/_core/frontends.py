"""What both frontends do alike: the core's generators shown as methods, errors without its insides."""

from __future__ import annotations

import inspect
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from timernn import errors

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


def shortened(error: errors.Error) -> errors.Error:
    """Return an error for the caller: what it came from is its `cause`, not pages of traceback."""
    error.cause = error.cause or error.__cause__ or error.__context__
    error.__cause__, error.__suppress_context__ = None, True
    return error.with_traceback(None)
