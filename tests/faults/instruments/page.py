"""Put what the last whole run of `make faults` found into docs/reliability.md: `make faults-docs`."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "tests" / "faults" / "results"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- written by `make faults-docs` -->\n", "<!-- up to here -->\n"


class PageError(Exception):
    """There is nothing that may be put into the page, or no place for it."""


def with_findings(page: str, findings: str) -> str:
    """Return a page with the part between its two marks replaced.

    Raises:
        PageError: If it has not exactly one such part.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise PageError(f"expected one {BEGIN.strip()} and one {END.strip()} in the page")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{findings}\n{END}{after}"


def findings_in(directory: Path) -> str:
    """Read what a run left behind.

    Raises:
        PageError: If there was no run, or only of a part of the tests.
    """
    try:
        run = json.loads((directory / "faults.json").read_text())["run"]
    except FileNotFoundError:
        raise PageError("there are no results: run `make faults`") from None
    if not run["is_whole"]:
        raise PageError(f"the last run was of a part, `{run['command']}`: run `make faults`")
    return (directory / "faults.md").read_text()


def main() -> None:
    """Rewrite the page."""
    try:
        PAGE.write_text(with_findings(PAGE.read_text(), findings_in(RESULTS)))
    except PageError as error:
        raise SystemExit(f"faults-docs: {error}") from None


if __name__ == "__main__":
    main()
