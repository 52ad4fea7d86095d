"""Ctrl-C at any moment of any operation: nothing wrong, nothing hanging, no number lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from scenes.calm import note_steady_traffic
from scenes.figures import figure
from scenes.fleet import Fleet
from scenes.interrupted import RETURN_INTERRUPTED, interrupt

if TYPE_CHECKING:
    from instruments.report import Proof


@pytest.mark.timeout(600)
@pytest.mark.promise("C2", "an interrupted call leaves no wrong output, no lost number, no hang")
@figure("interrupts", 200, 2000)
def test_interrupts_at_any_moment_of_any_operation(
    proof: Proof, seed: int, interrupts: int
) -> None:
    """A program gets SIGINT again and again, and repeats each call as docs/client.md says."""
    with Fleet(1) as fleet:
        note_steady_traffic(fleet.addresses[0], proof)
        found = interrupt(fleet.addresses[0], seed, interrupts)
    for fault in found.faults:
        proof.violated(fault)
    counts = found.counts
    proof.hit("SIGINT inside a call", counts["interrupts"])
    proof.hit("asyncio cancel", counts["cancels"])
    proof.checked(counts["checked"])
    proof.figures["longest attempt s"] = found.longest_s
    proof.figures["answered, return interrupted"] = counts.get(RETURN_INTERRUPTED, 0)
