"""A training program that is killed and started again ends with the weights of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import timernn
from examples import restart
from scenes import mortal_trainer
from scenes.figures import figure
from scenes.fleet import Fleet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from instruments.report import Proof

ROOT = Path(__file__).resolve().parents[2]
MOMENTS = ("before", "sent", "answered")
OPENING = ("GetModel", "OpenSession", "ListWaiting")
STEP = ("Forward", "Backward", "Update")
WAYS = {
    "example": ("CreateModel", *OPENING, *STEP),
    "inline": (*OPENING, "Forward", "Backward"),
    "through_time": ("OpenSession", *STEP),
}
CALLS = {"example": 3, "inline": 2, "through_time": 5}  # that a step makes
LONGEST_CALL_S = 0.004
promise = pytest.mark.promise("R29", "a program killed and started again trains as if never killed")


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """Two replicas over one store."""
    with Fleet(2, "--store-timeout-ms", "5000") as running:
        yield running


class Mortal:
    """Starts a training program again and again, each time to be killed at some call.

    Attributes:
        kills: How many of them were killed.
    """

    def __init__(self, addresses: list[str], program: str, model: str, steps: int) -> None:
        self.kills = 0
        self._addresses, self._command = addresses, [model, str(steps), program]

    def run(self, method: str = "-", count: int = 1, moment: str = "-", delay_s: float = 0) -> bool:
        """Start it on the next replica; return whether it came to its end."""
        address = self._addresses[self.kills % len(self._addresses)]
        place = [method, str(count), moment, str(delay_s)]
        done = subprocess.run(
            [sys.executable, mortal_trainer.__file__, address, *self._command, *place],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        self.kills += done.returncode != 0
        return done.returncode == 0


def undisturbed(client: timernn.Client, program: str, model: str, steps: int) -> timernn.Version:
    """Make the same steps in this process, to which nothing happens."""
    create(client, model)
    mortal_trainer.PROGRAMS[program](client, model, steps)
    return client.get_model(model).head


def create(client: timernn.Client, model: str) -> None:
    """Create the example's model."""
    adam = timernn.Adam(lr=1e-2)
    client.create_model(
        model, input_size=restart.D, hidden_size=restart.H, optimizer=adam, exist_ok=True
    )


@pytest.mark.timeout(600)
@promise
@pytest.mark.parametrize("program", WAYS)
def test_a_program_killed_at_each_call_trains_on(
    fleet: Fleet, proof: Proof, seed: int, program: str
) -> None:
    """Before it, under way and after its answer: the weights are those of a run without a kill."""
    draw = random.Random(seed)
    places = [(method, moment) for method in WAYS[program] for moment in MOMENTS]
    draw.shuffle(places)
    steps = len(places) + 20
    with timernn.connect(fleet.addresses) as client:
        begun = time.monotonic()
        expected = undisturbed(client, program, f"calm-{program}-{seed}", steps)
        proof.steady(CALLS[program] * steps, time.monotonic() - begun)
        model = f"killed-{program}-{seed}"
        if program != "example":
            create(client, model)
        trainer = Mortal(fleet.addresses, program, model, steps)
        for method, moment in places:
            count = draw.randint(1, 2) if method in STEP else 1
            is_over = trainer.run(method, count, moment, draw.uniform(0, LONGEST_CALL_S))
            assert not is_over, f"{program}: not killed at {method} ({moment})"
            proof.hit(f"killed {moment} {method}")
        proof.require(trainer.run(), f"{program} came to no end")
        head = client.get_model(model)
        proof.require(head.head == expected, f"{program}: {head.head} instead of {expected}")
        proof.require(not head.waiting_contribution_count, f"{program}: contributions are left")
        proof.checked(CALLS[program] * steps)


@pytest.mark.timeout(600)
@promise
@figure("kills", 12, 100)
def test_a_program_killed_over_and_over_trains_on(
    fleet: Fleet, proof: Proof, seed: int, kills: int
) -> None:
    """At calls and moments by the dice, until all steps are made; nothing is left waiting."""
    draw = random.Random(seed)
    steps = 2 * kills
    with timernn.connect(fleet.addresses) as client:
        begun = time.monotonic()
        expected = undisturbed(client, "example", f"calm-{seed}-{kills}", steps)
        proof.steady(3 * steps, time.monotonic() - begun)
        model = f"killed-{seed}-{kills}"
        trainer = Mortal(fleet.addresses, "example", model, steps)
        while trainer.kills < kills:
            place = (draw.choice(STEP), draw.randint(1, 2), draw.choice(MOMENTS))
            if trainer.run(*place, draw.uniform(0, LONGEST_CALL_S)):
                break
        proof.hit("killed", trainer.kills)
        trainer.run()
        head = client.get_model(model).head
        proof.require(head == expected, f"{head} instead of {expected}")
        session = client.session(model, f"{model}-trainer", batch_size=restart.N, must_exist=True)
        calm = client.session(
            f"calm-{seed}-{kills}", f"calm-{seed}-{kills}-trainer", batch_size=restart.N
        )
        proof.require(np.array_equal(session.h, calm.h), "the state is another one")
        proof.require(session.waiting == [], f"{session.waiting} is left")
        proof.checked(3 * steps)
