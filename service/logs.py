"""The log on stderr: one event is one line, as JSON or for people, whatever a client wrote into it.

What comes from outside (names, addresses, messages of errors) may hold line breaks and terminal codes. The
formatters escape them, so that nobody who logs has to think of it.

Who may not come in, or is refused again and again, must not be able to fill a disk: of lines that a client can cause
as often as it likes few are written, and the others are counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from typing import TextIO

FIELDS: Final = "fields"
"""The key in a log call's `extra` for values that stand in a record by name: a flat dict."""

REPEATED: Final = "repeated"
"""The key in a log call's `extra` for what makes the line like others that a client can cause as often as it likes: a hashable
value, never a secret."""

INTERVAL_S: Final = 60.0
"""Of repeated lines that are like one another one is written in so many seconds."""
KINDS: Final = 100
"""How many kinds of repeated lines are written in an interval."""

_OF_EVERY_LINE: Final = frozenset(
    {"time", "level", "logger", "message", "worker", "pid", "traceback"}
)
_TRACEBACK_INDENT: Final = "  | "  # so that no line of it can pass for an event


def log_to_stderr(level: str, worker: int = 0, form: str = "console") -> None:
    """Write the log of this process to stderr.

    Args:
        level: The name of the lowest level that is written, in upper or lower case.
        worker: The number of this worker; 0 if the process is none.
        form: "console" for people, "json" for programs.
    """
    least = logging.getLevelNamesMapping()[level.upper()]
    handler = SparingHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(worker) if form == "json" else ConsoleFormatter(worker))
    # gRPC has a debug line of its own for each call.
    logging.basicConfig(handlers=[handler], level=max(least, logging.INFO))
    logging.getLogger("service").setLevel(least)
    # These show what a stranger has sent, which may be a secret that was sent in a wrong way.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    logging.getLogger("grpc._cython.cygrpc").addFilter(_shows_no_value)


@dataclass(slots=True)
class _Kind:
    """Lines that are like one another.

    Attributes:
        first: The one that was written.
        left_out: How many were not.
    """

    first: logging.LogRecord
    left_out: int = 0


class SparingHandler(logging.StreamHandler["TextIO"]):
    """Writes each line, but of repeated ones the first of each kind in an interval, and of few kinds.

    The warnings and errors of libraries are taken for repeated ones.

    At the end of an interval there is a line `left_out=N` for each kind that had more, and one for all kinds
    that were too many. So a flood costs at most `2 * KINDS + 1` lines an interval.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        """Write to a stream.

        Args:
            stream: Where lines go.
            clock: Returns seconds.
        """
        super().__init__(stream)
        self._clock = clock
        self._ends_at = 0.0
        self._kinds: dict[Hashable, _Kind] = {}
        self._others = 0

    def handle(self, record: logging.LogRecord) -> bool:
        """Write a record unless it is left out; return whether it was written."""
        like = getattr(record, REPEATED, _like_of_library(record))
        if like is not None and self._is_left_out(record, like):
            return False
        return bool(super().handle(record))

    def report(self) -> None:
        """Write how many were left out, and begin a new interval."""
        kinds, self._kinds = self._kinds, {}
        others, self._others = self._others, 0
        for kind in kinds.values():
            if kind.left_out:
                super().handle(_summary(kind.first, kind.left_out))
        if others:
            super().handle(_summary(_OTHERS, others))

    def close(self) -> None:
        """Write what is still counted, and end."""
        self.report()
        super().close()

    def _is_left_out(self, record: logging.LogRecord, like: Hashable) -> bool:
        now = self._clock()
        if now >= self._ends_at:
            self.report()
            self._ends_at = now + INTERVAL_S
            # So that the end of a flood is reported too, when nothing more comes.
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop().call_later(INTERVAL_S, self.report)
        if kind := self._kinds.get(like):
            kind.left_out += 1
        elif len(self._kinds) < KINDS:
            self._kinds[like] = _Kind(_summary(record, 0))
            return False
        else:
            self._others += 1
        return True


def _shows_no_value(record: logging.LogRecord) -> bool:
    """Return whether a record of gRPC is not about metadata whose bytes are no text, which it would show."""
    return not str(record.msg).startswith("Invalid encoding")


def _like_of_library(record: logging.LogRecord) -> Hashable:
    """Return what makes a warning or an error of a library like others; None for other lines.

    What leads a library to it is often a client.
    """
    is_ours = record.name.partition(".")[0] == "service"
    return None if is_ours or record.levelno < logging.WARNING else (record.name, str(record.msg))


_OTHERS: Final = logging.LogRecord(
    __name__, logging.WARNING, __file__, 0, "refusals of many kinds", None, None
)


def _summary(record: logging.LogRecord, left_out: int) -> logging.LogRecord:
    """Return a record like another, without its traceback, that says how many were left out."""
    again = logging.makeLogRecord({**record.__dict__, "exc_info": None, "exc_text": None})
    again.created = time.time()
    setattr(again, FIELDS, {**getattr(record, FIELDS, {}), "left_out": left_out})
    return again


def escaped(text: str) -> str:
    r"""Return a text with everything escaped that is no visible character or space, such as \n and \x1b."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


class ConsoleFormatter(logging.Formatter):
    """A line for people; named values follow the message, a traceback is indented below it."""

    def __init__(self, worker: int = 0) -> None:
        """Keep the number of this worker; 0 if the process is none."""
        who = f"worker {worker} pid %(process)d" if worker else "pid %(process)d"
        super().__init__(f"%(asctime)s %(levelname)s {who} %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the base class's name
        """Return the line."""
        line = escaped(super().formatMessage(record))
        named = "".join(f" {name}={_shown(value)}" for name, value in fields_of(record).items())
        return line + named

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """Return the traceback, each line indented."""
        lines = super().formatException(ei).splitlines()
        return "\n".join(_TRACEBACK_INDENT + escaped(line) for line in lines)

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        """Return the stack, each line indented."""
        return "\n".join(_TRACEBACK_INDENT + escaped(line) for line in stack_info.splitlines())


class JsonFormatter(logging.Formatter):
    """A JSON object in ASCII on one line; named values stand beside time, level, logger and message."""

    def __init__(self, worker: int = 0) -> None:
        """Keep the number of this worker; 0 if the process is none."""
        super().__init__()
        self._worker = worker or None

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        moment = datetime.fromtimestamp(record.created, UTC)
        values: dict[str, object] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "worker": self._worker,
            "pid": record.process,
        }
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        for name, value in fields_of(record).items():
            values.setdefault(name, value)
        # json leaves DEL as it is: to JSON it is no control character, to a terminal it is.
        return json.dumps(values, default=str).replace("\x7f", "\\u007f")


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """Return the named values of a record; none of them hides what every line has."""
    given: dict[str, object] = getattr(record, FIELDS, {})
    return {name: value for name, value in given.items() if name not in _OF_EVERY_LINE}


def _shown(value: object) -> str:
    """Return a value as a word; in quotes if it would not be one."""
    text = str(value)
    is_word = text and text.isprintable() and not set(text) & set(" \"'=\\")
    return text if is_word else json.dumps(text).replace("\x7f", "\\u007f")
