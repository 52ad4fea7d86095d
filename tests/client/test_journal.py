"""What a client's journals hold, and what they let go."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from timernn._core.ages import Ages, Lifetime
from timernn._core.journal import LogBudget, begin_entry
from timernn.v1.session_service_pb2 import OpenSessionRequest

if TYPE_CHECKING:
    from timernn._core.journal import Entry, Journal


def entry(epoch: int) -> Entry:
    """Make an entry of about a kibibyte."""
    return begin_entry(OpenSessionRequest(session_id="s", restored_epoch=epoch), Lifetime(Ages()))


def epochs(journal: Journal) -> list[int]:
    """Return what the entries can be reported apart by."""
    return [each.request.restored_epoch for each in journal.entries()]


def test_the_oldest_entries_go_first() -> None:
    """A journal keeps the last ones, by number and by bytes."""
    budget = LogBudget(1 << 20)
    by_number, by_bytes = budget.new_journal(3, 1 << 20), budget.new_journal(100, 2 * entry(1).size)
    for epoch in range(1, 6):
        by_number.append(entry(epoch))
        by_bytes.append(entry(epoch))
    assert epochs(by_number) == [3, 4, 5]
    assert epochs(by_bytes) == [4, 5]


def test_a_shared_journal_keeps_as_many_for_each_writer() -> None:
    """Two sessions that train together have twice the room."""
    journal = LogBudget(1 << 20).new_journal(2, 1 << 20)
    journal.share_between(2)
    for epoch in range(1, 6):
        journal.append(entry(epoch))
    assert epochs(journal) == [2, 3, 4, 5]


def test_journals_written_longest_ago_give_way() -> None:
    """All journals of a client are bounded together."""
    budget = LogBudget(4 * entry(1).size)
    idle, busy = budget.new_journal(64, 1 << 20), budget.new_journal(64, 1 << 20)
    for epoch in (1, 2, 3):
        idle.append(entry(epoch))
    for epoch in (4, 5, 6):
        busy.append(entry(epoch))
    assert epochs(idle) == [3]
    assert epochs(busy) == [4, 5, 6]


def test_a_session_that_is_let_go_takes_its_journal_along() -> None:
    """Its bytes do not count any more."""
    budget = LogBudget(2 * entry(1).size)
    gone, kept = budget.new_journal(64, 1 << 20), budget.new_journal(64, 1 << 20)
    kept.append(entry(1))
    gone.append(entry(2))
    del gone
    gc.collect()
    kept.append(entry(3))
    assert epochs(kept) == [1, 3]
