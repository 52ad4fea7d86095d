"""What the commands print: aligned tables and JSON on stdout, one line on stderr when it fails."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from service.logs import escaped

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


def warn(text: str) -> None:
    """Print one line of warning on stderr."""
    print(f"timernn: warning: {escaped(text)}", file=sys.stderr, flush=True)


def fail(text: str) -> None:
    """Print on stderr, as one line, why a command failed."""
    print(f"timernn: {escaped(' '.join(text.split()))}", file=sys.stderr, flush=True)


def counted(count: int, things: str) -> str:
    """Return how many of something there are: "1 model", "2 models"."""
    return f"{count} {things.removesuffix('s') if count == 1 else things}"


def print_json(value: object) -> None:
    """Print one JSON document."""
    print(json.dumps(value, indent=2))


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table with headings; numbers are aligned to the right."""
    lines = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *lines, strict=True)]
    numeric = [
        bool(lines) and all(line[i].replace(",", "").isdecimal() for line in lines)
        for i in range(len(headings))
    ]
    for line in [[heading.upper() for heading in headings], *lines]:
        cells = [
            cell.rjust(width) if is_number else cell.ljust(width)
            for cell, width, is_number in zip(line, widths, numeric, strict=True)
        ]
        print("  ".join(cells).rstrip())


def print_fields(values: Mapping[str, object]) -> None:
    """Print names and values as two columns."""
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name:<{width}}  {value}")
