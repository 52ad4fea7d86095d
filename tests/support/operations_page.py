"""The tables of docs/operations.md that follow from the code: `make operations-docs` writes them.

tests/architecture/test_operations_page.py compares the page with the code.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.load.page import with_block
from service.cli.options import OPTIONS, format_bytes
from service.metrics.families import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from service.cli.options import ServeOption

PAGE: Final = Path(__file__).parents[2] / "docs" / "operations.md"
COMMAND: Final = "make operations-docs"


def settings_table(panel: str) -> str:
    """Return a row for each setting under a heading of `timernn serve --help`."""
    rows = [
        (f"`{option.flag}`", f"`{option.variable}`", _default(option), _unit(option), option.help)
        for option in OPTIONS
        if option.panel == panel and not option.is_hidden
    ]
    return _table(("option", "variable", "default", "unit", "meaning"), rows)


def metrics_table() -> str:
    """Return a row for each metric."""
    rows = [
        (
            f"`{each.name}`",
            each.kind.value,
            ", ".join(f"`{label}`" for label in each.labels),
            each.help,
        )
        for each in FAMILIES.values()
    ]
    return _table(("metric", "kind", "labels", "what"), rows)


BLOCKS: Final[dict[str, Callable[[], str]]] = {
    f"{COMMAND}: settings": lambda: settings_table("Server"),
    f"{COMMAND}: limits": lambda: settings_table("Limits"),
    f"{COMMAND}: metrics": metrics_table,
}


def written(page: str) -> str:
    """Return the page with its tables as the code is now."""
    for name, text in BLOCKS.items():
        page = with_block(page, name, text())
    return page


def _default(option: ServeOption) -> str:
    if option.name == "redis_url":
        return "an embedded store"
    if isinstance(option.default, bool):
        return "on" if option.default else "off"
    if option.kind.unit == "bytes":
        return format_bytes(option.default)
    if isinstance(option.default, float):
        return f"{option.default:g}"
    if isinstance(option.default, str | Path) and str(option.default):
        return f"`{option.default}`"
    return str(option.default)


def _unit(option: ServeOption) -> str:
    shown = str(option.kind.shown.get("metavar", ""))
    words = {"NUMBER": "", "FILE": "file", "DIR": "folder"}
    return option.kind.unit or words.get(shown, shown.replace("|", ", "))


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def main() -> None:
    """Rewrite the page."""
    PAGE.write_text(written(PAGE.read_text()))


if __name__ == "__main__":
    main()
