"""The parts of docs/performance.md that commands write: each between two marks of its own."""

from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
END = "<!-- up to here -->\n"


class PageError(Exception):
    """The page has no place for what was to be written."""


def begin(command: str) -> str:
    """Return the mark after which a command writes."""
    return f"<!-- written by `{command}` -->\n"


def with_block(page: str, command: str, text: str) -> str:
    """Return a page with the part that a command writes replaced.

    Raises:
        PageError: If it has not exactly one such part.
    """
    mark = begin(command)
    if page.count(mark) != 1:
        raise PageError(f"expected one {mark.strip()} in the page, found {page.count(mark)}")
    before, _, rest = page.partition(mark)
    _, end, after = rest.partition(END)
    if not end:
        raise PageError(f"expected {END.strip()} after {mark.strip()}")
    return f"{before}{mark}\n{text.strip()}\n\n{END}{after}"


def write_block(command: str, text: str) -> None:
    """Replace the part of docs/performance.md that a command writes.

    Raises:
        PageError: If the page has not exactly one such part.
    """
    PAGE.write_text(with_block(PAGE.read_text(), command, text))
