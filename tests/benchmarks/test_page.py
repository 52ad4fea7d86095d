"""The parts of a page that commands write."""

from __future__ import annotations

import pytest

from benchmarks.load.page import END, PageError, begin, with_block

PAGE = f"before\n{begin('one')}\nold\n\n{END}between\n{begin('two')}\nkept\n\n{END}after\n"


def test_a_command_replaces_its_own_part_alone() -> None:
    """What stands around it, and what another command wrote, stays."""
    assert with_block(PAGE, "one", "new") == PAGE.replace("old", "new")


@pytest.mark.parametrize("page", ["nothing", PAGE + PAGE, begin("one")])
def test_a_page_without_one_whole_part_is_refused(page: str) -> None:
    """No part, two of them, or one without an end: nobody knows what to replace."""
    with pytest.raises(PageError):
        with_block(page, "one", "new")
