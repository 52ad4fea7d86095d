"""The log on stderr: one event is one line, as JSON or for people, whatever a client wrote into it.

What comes from outside (names, addresses, messages of errors) may hold line breaks and terminal codes. The
formatters escape them, so that nobody who logs has to think of it.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Final

FIELDS: Final = "fields"
"""The key in a log call's `extra` for values that stand in a record by name: a flat dict."""

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
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(worker) if form == "json" else ConsoleFormatter(worker))
    # gRPC has a debug line of its own for each call.
    logging.basicConfig(handlers=[handler], level=max(least, logging.INFO))
    logging.getLogger("service").setLevel(least)


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
