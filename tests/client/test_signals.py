"""Real Ctrl-C inside calls; `make faults` does the same ten times as often."""

from __future__ import annotations

from scenes.interrupted import interrupt


def test_interrupted_calls_leave_nothing_wrong(replicas: list[str]) -> None:
    """No wrong output, no lost number, no hang, whatever the operation and the moment."""
    assert interrupt(replicas[0], seed=7, interrupts=20).faults == []
