"""What both faces need to show the core's documentation as their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable[..., Any]")


def documented_by(op: Callable[..., Any]) -> Callable[[F], F]:
    """Give a method the docstring of the generator that it drives."""

    def document(method: F) -> F:
        method.__doc__ = op.__doc__
        return method

    return document
