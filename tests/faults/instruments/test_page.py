"""How a run's findings get into the documentation."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from instruments.page import BEGIN, END, PAGE, PageError, findings_in, with_findings

if TYPE_CHECKING:
    from pathlib import Path


def test_only_the_part_between_the_marks_is_replaced() -> None:
    """What stands before and after stays, however often it is done."""
    page = f"before\n{BEGIN}old\n{END}after\n"
    once = with_findings(page, "| new |\n")
    assert once == f"before\n{BEGIN}\n| new |\n\n{END}after\n"
    assert with_findings(once, "| new |\n") == once


def test_a_page_without_a_place_is_refused() -> None:
    """Nothing is put where nobody expects it."""
    with pytest.raises(PageError, match="expected one"):
        with_findings("no marks\n", "| new |\n")


def test_the_documentation_has_the_place() -> None:
    """The page that the command writes to has both marks."""
    assert "| new |" in with_findings(PAGE.read_text(), "| new |\n")


def test_a_part_is_not_published(tmp_path: Path) -> None:
    """Only a run of all tests may stand in the documentation."""
    with pytest.raises(PageError, match="no results"):
        findings_in(tmp_path)
    run = {"is_whole": False, "command": "pytest -k sentinel"}
    (tmp_path / "faults.json").write_text(json.dumps({"run": run}))
    with pytest.raises(PageError, match="of a part, `pytest -k sentinel`"):
        findings_in(tmp_path)
