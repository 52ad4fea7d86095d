"""Runs: a trainer in a world, and what must hold at its end."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from state_protocol.client import UNDECIDED
from state_protocol.rules import Rules
from state_protocol.trainer import Trainer
from state_protocol.values import Refused, Violation, require
from state_protocol.world import Faults, World

WORLDS = {
    "quiet": Faults(),
    "lost replies": Faults(lose_reply=0.4),
    "dying replicas": Faults(lose_reply=0.3, die=0.02),
    "lost writes": Faults(lose_reply=0.3, die=0.01, roll=0.006),
    "rivals": Faults(lose_reply=0.3, rival=0.01),
    "lost writes beside rivals": Faults(lose_reply=0.3, die=0.01, roll=0.006, rival=0.01),
    "lost writes beside a rival on the session": Faults(
        lose_reply=0.3, roll=0.02, rival=0.01, rivals=("forward",)
    ),
    "a full store": Faults(
        lose_reply=0.3, die=0.01, fill=0.05, raising=0.1, overload=0.2, impatient=0.5
    ),
    "a nearly full store": Faults(lose_reply=0.3, tight=0.5, impatient=0.3),
    "a full store that lost writes": Faults(
        lose_reply=0.3, die=0.01, roll=0.003, fill=0.02, raising=0.05, overload=0.1, impatient=0.3
    ),
    "hours of sleep": Faults(lose_reply=0.4, impatient=0.5, sleep=0.08),
    "hours of sleep and lost writes": Faults(lose_reply=0.3, impatient=0.3, sleep=0.08, roll=0.003),
    "hours of sleep and lost writes beside others": Faults(
        lose_reply=0.3, impatient=0.3, sleep=0.08, roll=0.003, rival=0.005, rivals=("take all",)
    ),
    "days of sleep": Faults(lose_reply=0.3, sleep=0.05, days=0.8),
    "days of sleep and lost writes": Faults(lose_reply=0.3, sleep=0.05, days=0.8, roll=0.003),
    "days of sleep beside others": Faults(
        lose_reply=0.3, sleep=0.05, days=0.8, rival=0.002, rivals=("close", "reset")
    ),
}
_OF_OLD_AGE = {"SESSION_EXPIRED", "NO_GRADIENTS", "OUTCOME_LOST"}
_OF_OLD_AGE_AND_LOSS = {*_OF_OLD_AGE, "VERSION_GONE", "VERSION_CONFLICT", "SEQ_GAP"}

# An epoch that was begun again fences off the one before it, whose chunks are lost once more.
_OF_LOSS_IN_HEALING = {"VERSION_GONE", "NO_GRADIENTS"}


@dataclass(slots=True)
class Outcome:
    """What became of one run.

    Attributes:
        end: "done", or the reason for which the trainer could not go on.
        refusals: The reasons of its refusals on the way.
        rollbacks: How often a slot was set back.
    """

    end: str
    refusals: list[str]
    rollbacks: int


@dataclass(slots=True)
class Summary:
    """What became of many runs in one world."""

    runs: int = 0
    rolled_back: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    violations: Counter[str] = field(default_factory=Counter)

    def add(self, seed: int, world: str, rules: Rules) -> None:
        """Make one more run."""
        self.runs += 1
        try:
            outcome = run(seed, WORLDS[world], rules)
        except Violation as violation:
            self.violations[str(violation)] += 1
            return
        self.ends[outcome.end] += 1
        self.rolled_back += outcome.rollbacks > 0
        self.refusals.update(set(outcome.refusals))


def run(seed: int, faults: Faults, rules: Rules | None = None) -> Outcome:
    """Train once.

    Raises:
        Violation: If a promise was broken.
    """
    world = World(rules or Rules(), faults, random.Random(seed))
    trainer, end = Trainer(world), "done"
    try:
        trainer.train()
    except Refused as refused:
        end = refused.reason
    outcome = Outcome(end, trainer.refusals, world.rollbacks)
    world.settle()
    for version in [world.store.model.head, trainer.client.known]:
        names = world.store.consumed(version)
        require(len(names) == len(set(names)), "a contribution was consumed twice")
    if not faults.rival:
        _check_alone(world, trainer, outcome)
    return outcome


def _check_alone(world: World, trainer: Trainer, outcome: Outcome) -> None:
    """Check a trainer who had the session and the model to himself."""
    client, store = trainer.client, world.store
    allowed = {"done"}
    if world.slept:
        allowed |= _OF_OLD_AGE_AND_LOSS if world.rollbacks else _OF_OLD_AGE
    if world.lost_in_healing:
        allowed |= _OF_LOSS_IN_HEALING
    require(outcome.end in allowed, f"the trainer could not go on: {outcome.end}")
    if not world.rollbacks and not world.slept:
        seen = set(trainer.refusals) - UNDECIDED
        require(not seen, f"nothing was lost, yet the trainer was refused with {sorted(seen)}")
    if outcome.end != "done":
        return
    made = store.lineage[client.known.digest]
    require(made == tuple(client.steps), "a step is missing or differs")
    if not world.rollbacks:
        require(store.model.head == client.known, "a step was made that no answer names")
        strays = set(store.model.waiting()) - set(client.waiting)
        require(not strays, "a contribution waits that its trainer does not know of")
