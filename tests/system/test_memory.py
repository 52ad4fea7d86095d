"""When freed memory goes back to the system."""

from __future__ import annotations

from service.memory import CALM_CHECKS, WORTH_BYTES, FreedMemory


class Process:
    """A process whose size and work the test sets."""

    def __init__(self) -> None:
        self.resident = 100 << 20
        self.bytes_in_work = 0

    def watched(self) -> FreedMemory:
        """Watch it."""
        return FreedMemory(
            lambda: self.bytes_in_work, resident=lambda: self.resident, give_back=lambda: None
        )


def test_memory_is_returned_when_it_is_calm_after_a_peak() -> None:
    """Not before a few checks have found little in work."""
    process = Process()
    memory = process.watched()
    process.resident += 2 * WORTH_BYTES
    process.bytes_in_work = WORTH_BYTES
    assert not memory.is_due()
    process.bytes_in_work = 0
    assert [memory.is_due() for _ in range(CALM_CHECKS)] == [False] * (CALM_CHECKS - 1) + [True]


def test_steady_work_keeps_its_memory() -> None:
    """What the next batch needs is not returned between two batches."""
    process = Process()
    memory = process.watched()
    process.resident += 2 * WORTH_BYTES
    for check in range(20):
        process.bytes_in_work = 0 if check % 2 else WORTH_BYTES
        assert not memory.is_due()


def test_little_is_not_worth_it() -> None:
    """A process that has not grown much is left alone."""
    process = Process()
    memory = process.watched()
    process.resident += WORTH_BYTES
    assert not any(memory.is_due() for _ in range(20))
