"""What the public methods accept: one check a parameter name, applied before anything is sent.

protobuf and gRPC answer a value of the wrong type with errors of their own, or not at all: a method
decorated with `checked` raises a `BadField` instead that names the parameter, what was expected and
what came. A name means the same in every method, so the checks are one table. Arrays are not in it:
what they must be depends on the model (`convert.array_from_caller`).
"""

from __future__ import annotations

import inspect
import math
import numbers
import operator
from datetime import timedelta
from functools import wraps
from io import TextIOBase
from os import PathLike
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

from timernn import errors
from timernn.optimizers import KINDS
from timernn.types import Contributions, Step, Version

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
R = TypeVar("R")

Check: TypeAlias = "Callable[[str, Any], Any]"
"""Takes a parameter's name and value; returns the value as the core uses it, or raises BadField."""

_MOST_INT64 = 2**63 - 1
MOST_INT32 = 2**31 - 1
# What a Duration holds: 10,000 years.
_MOST_SECONDS = 315_576_000_000.0
_SHOWN_CHARS = 64
_NUMBERS = (int, float)


def refusal(name: str, expected: str, value: object, *types: type) -> errors.BadField:
    """Return the error of an argument.

    Args:
        name: Of the argument.
        expected: What it should be.
        value: What came.
        types: What types it may have; the message names any other.
    """
    shown = repr(value)
    if len(shown) > _SHOWN_CHARS:
        shown = shown[: _SHOWN_CHARS - 3] + "..."
    if type(value) not in types:
        shown += f" ({type(value).__name__})"
    return errors.BadField(f"{name}: expected {expected}, got {shown}", metadata={"field": name})


def text(name: str, value: Any) -> str:
    """Accept a string that UTF-8 can write."""
    if not isinstance(value, str):
        raise refusal(name, "a string", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise refusal(name, "a string without lone surrogates", value, str) from None
    return value


def flag(name: str, value: Any) -> bool:
    """Accept True or False, NumPy's too; nothing that is merely truthy."""
    if isinstance(value, bool) or type(value).__name__ in {"bool", "bool_"}:
        return bool(value)
    raise refusal(name, "True or False", value)


def integer(least: int, most: int = _MOST_INT64) -> Check:
    """Make a check for whole numbers of any integer type between two bounds, both included."""

    def check(name: str, value: Any) -> int:
        expected = f"a whole number from {least}" + ("" if most == _MOST_INT64 else f" to {most}")
        try:
            number = operator.index(value)
        except TypeError:
            raise refusal(name, expected, value) from None
        if isinstance(value, bool) or not least <= number <= most:
            raise refusal(name, expected, value, int)
        return number

    return check


def real(name: str, value: Any, expected: str) -> float:
    """Accept a finite real number of any type."""
    if not isinstance(value, bool) and isinstance(value, numbers.Real):
        try:
            number = float(value)
        except OverflowError:
            raise refusal(name, expected, value, *_NUMBERS) from None
        if math.isfinite(number):
            return number
    raise refusal(name, expected, value, *_NUMBERS)


def positive_number(name: str, value: Any) -> float:
    """Accept a finite number above 0."""
    expected = "a number above 0"
    number = real(name, value, expected)
    if number <= 0:
        raise refusal(name, expected, value, *_NUMBERS)
    return number


def rate(name: str, value: Any) -> float:
    """Accept a finite number of at least 0."""
    expected = "a number of at least 0"
    number = real(name, value, expected)
    if number < 0:
        raise refusal(name, expected, value, *_NUMBERS)
    return number


def span(name: str, value: Any) -> float | timedelta:
    """Accept a time span above 0, in seconds or as a timedelta."""
    expected = "seconds above 0 or a timedelta"
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    number = real(name, seconds, expected)
    if not 0 < number <= _MOST_SECONDS:
        raise refusal(name, expected, value, *_NUMBERS)
    return value if isinstance(value, timedelta) else number


def clock_time(name: str, value: Any) -> float:
    """Accept a time on the client's monotonic clock, in seconds."""
    return real(name, value, "seconds on the client's clock")


def choice(*choices: str) -> Check:
    """Make a check for one of some words."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise refusal(name, " or ".join(map(repr, choices)), value, str)
        return value

    return check


def optional(check: Check) -> Check:
    """Make a check that lets None pass."""
    return lambda name, value: None if value is None else check(name, value)


def version(name: str, value: Any) -> Version:
    """Accept a Version whose parts are of the right types."""
    if not isinstance(value, Version):
        raise refusal(name, "a timernn.Version", value)
    number = integer(0)(f"{name}.number", value.number)
    if not isinstance(value.digest, bytes):
        raise refusal(f"{name}.digest", "bytes", value.digest)
    return Version(number, value.digest)


def step(name: str, value: Any) -> Step:
    """Accept a Step whose parts are in their ranges."""
    if not isinstance(value, Step):
        raise refusal(name, "a timernn.Step", value)
    optional(CHECKS["lr"])(f"{name}.lr", value.lr)
    for part in ("clip_norm", "reduction"):
        CHECKS[part](f"{name}.{part}", getattr(value, part))
    return value


def optimizer(name: str, value: Any) -> Any:
    """Accept an optimizer of the library; no hyperparameter of any of them is below 0."""
    if type(value) not in KINDS.values():
        raise refusal(name, "an optimizer such as timernn.Adam(lr=1e-3)", value)
    for part, number in value.given().items():
        rate(f"{name}.{value.KIND}.{part}", number)
    return value


def contributions(name: str, value: Any) -> list[Contributions | str]:
    """Accept names of contributions, each a Contributions or a session's name."""
    expected = "a list of timernn.Contributions or session names"
    if isinstance(value, str | bytes):
        raise refusal(name, expected, value)
    try:
        items = list(value)
    except TypeError:
        raise refusal(name, expected, value) from None
    for index, item in enumerate(items):
        at = f"{name}[{index}]"
        if isinstance(item, Contributions):
            text(f"{at}.session_id", item.session_id)
            integer(0)(f"{at}.epoch", item.epoch)
            for chunk_seq in item.chunk_seqs:
                integer(1)(f"{at}.chunk_seqs", chunk_seq)
        elif not isinstance(item, str):
            raise refusal(at, "a timernn.Contributions or a session's name", item)
        else:
            text(at, item)
    return items


def chunks(name: str, value: Any) -> Any:
    """Accept an iterable of arrays."""
    expected = "an iterable of arrays"
    if isinstance(value, str | bytes):
        raise refusal(name, expected, value)
    try:
        iter(value)
    except TypeError:
        raise refusal(name, expected, value) from None
    return value


def async_chunks(name: str, value: Any) -> Any:
    """Accept an iterable of arrays, or an asynchronous one."""
    return value if hasattr(value, "__aiter__") else chunks(name, value)


def chunks_of_sessions(name: str, value: Any) -> list[tuple[Any, Any]]:
    """Accept pairs of a session of this library and an array."""
    expected = "pairs of a session and an array"
    try:
        items = list(value)
    except TypeError:
        raise refusal(name, expected, value) from None
    for index, item in enumerate(items):
        at = f"{name}[{index}]"
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise refusal(at, "a pair of a session and an array", item)
        sessions(at, item[:1])
    return items


def file(name: str, value: Any) -> Any:
    """Accept a path, or an open binary file."""
    if isinstance(value, TextIOBase):
        raise refusal(name, "a file that is open for bytes", value)
    if isinstance(value, str | PathLike) or hasattr(value, "read") or hasattr(value, "write"):
        return value
    raise refusal(name, "a path or an open binary file", value)


def sessions(name: str, value: Any) -> list[Any]:
    """Accept sessions of this library."""
    try:
        items = list(value)
    except TypeError:
        raise refusal(name, "a list of sessions", value) from None
    for index, item in enumerate(items):
        if not hasattr(item, "_core"):
            raise refusal(f"{name}[{index}]", "a session of this client", item)
    return items


_NAME = text
_SIZE = integer(1)

CHECKS: dict[str, Check] = {
    "model_id": _NAME,
    "session_id": _NAME,
    "new_id": _NAME,
    "checkpoint_id": _NAME,
    "input_size": _SIZE,
    "hidden_size": _SIZE,
    "batch_size": _SIZE,
    "in_flight": _SIZE,
    "page_size": integer(1, MOST_INT32),
    "seed": integer(0),
    "dtype": choice("float32", "float64"),
    "optimizer": optimizer,
    "lr": rate,
    "clip_norm": rate,
    "reduction": choice("sum", "mean"),
    "return_hs": choice("all", "last", "none"),
    "on_exists": choice("resume", "fail", "reset", "must_exist"),
    "ttl": span,
    "version": version,
    "expected_version": version,
    "update": step,
    "contributions": contributions,
    "sessions": sessions,
    "train": flag,
    "exclusive": flag,
    "take_waiting": flag,
    "chunk_seq": integer(1),
    "exist_ok": flag,
    "must_exist": flag,
    "extend_ttl": flag,
    "include_moments": flag,
    "missing_ok": flag,
    "return_dxs": flag,
    "return_gradients": flag,
    "deadline": clock_time,
}
"""The check of each parameter name; None is let through where it is the parameter's default."""


def checked(method: Callable[P, R]) -> Callable[P, R]:
    """Check a method's arguments by their names, before it begins."""
    return checked_with()(method)


def checked_with(**own: Check) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Do as `checked`, with checks of this method's own for some of its parameters."""

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(method).parameters
        checks = {
            name: optional(check) if parameter.default is None else check
            for name, parameter in parameters.items()
            if (check := own.get(name) or CHECKS.get(name)) is not None
        }
        by_position = [
            (index, parameter.name, checks[parameter.name])
            for index, parameter in enumerate(parameters.values())
            if parameter.name in checks and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]

        @wraps(method)
        def checking(*args: P.args, **kwargs: P.kwargs) -> R:
            for name, value in kwargs.items():
                if name in checks:
                    kwargs[name] = checks[name](name, value)
            if not by_position:
                return method(*args, **kwargs)
            values = list(args)
            for index, name, check in by_position:
                if index < len(values):
                    values[index] = check(name, values[index])
            return method(*values, **kwargs)  # type: ignore[arg-type]

        return checking

    return decorate
