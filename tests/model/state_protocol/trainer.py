"""A trainer: what a caller of the client library does."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from state_protocol import durations
from state_protocol.client import UNDECIDED, Client
from state_protocol.values import Refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from state_protocol.messages import Forward, Request, Update
    from state_protocol.values import Name
    from state_protocol.world import World

_CHUNKS = 12
_CHUNKS_A_STEP = 3
_TRIES = 120


class Trainer:
    """Sends chunks, their gradients, and a step for every third; sometimes begins a new epoch.

    After a refusal that says that nothing was done it asks with other content, as a caller may.

    Args:
        world: Where it trains.

    Attributes:
        client: Its library.
        refusals: The reasons of its refusals.
    """

    def __init__(self, world: World) -> None:
        self._world, self._chance = world, world.chance
        self.client = Client(world)
        self.refusals: list[str] = []

    def train(self) -> None:
        """Run the whole training.

        Raises:
            Refused: If it cannot go on.
        """
        for number in range(1, _CHUNKS + 1):
            if self._chance.random() < 0.1:
                self._begin_epoch(number)
            self._insist(partial(self._forward, number))
            is_step = number % _CHUNKS_A_STEP == 0
            self._backward(number, is_step=is_step and self._chance.random() < 0.5)
            if is_step and self.client.waiting:
                self._insist(partial(self._update, f"update {number}"))

    def _forward(self, number: int, n: int) -> Forward:
        return self.client.forward(f"x{number}.{n}")

    def _begin_epoch(self, number: int) -> None:
        """Set the state; where nothing was done, perhaps leave it at that."""
        client, state = self.client, f"state {number}"
        self._insist(
            lambda n: client.set_state(f"set {number}.{n}", f"{state}.{n}"),
            gives_up=lambda: self._chance.random() < 0.5,
        )

    def _backward(self, number: int, *, is_step: bool) -> None:
        name = ("me", self.client.epoch, self.client.seq)

        def make(n: int) -> Request:
            update = None
            if is_step:
                names = [*self.client.waiting, name]
                update = self._update(f"inline {number}", n, names)
            return self.client.backward(f"dhs {number}.{n}", update)

        try:
            # With its contribution recorded only the step is left.
            self._insist(make, gives_up=lambda: name in self.client.waiting)
        except Refused as refused:
            if refused.reason != "TAPE_MISSING" or not self._world.slept:
                raise  # after a long sleep the chunk stays without

    def _update(self, request: str, n: int, names: list[Name] | None = None) -> Update:
        is_exclusive = not self._world.faults.rival or self._chance.random() < 0.5
        waiting = self.client.waiting if names is None else names
        return self.client.update(f"{request}.{n}", waiting, is_exclusive=is_exclusive)

    def _insist(
        self, make: Callable[[int], Request], gives_up: Callable[[], bool] = lambda: False
    ) -> None:
        """Ask until there is an answer."""
        for n in range(_TRIES):
            try:
                if self.client.doubt is None:
                    self.client.carry_out(make(n))
                else:
                    self.client.settle()
            except Refused as refused:
                self.refusals.append(refused.reason)
                if refused.reason not in UNDECIDED:
                    raise
            else:
                self._rest()
                return
            self._rest()
            if self.client.doubt is None and gives_up():
                return
        raise Refused("GAVE_UP")

    def _rest(self) -> None:
        for _ in range(5):
            self._world.happen()
        if self._chance.random() < self._world.faults.sleep:
            ttl = self._world.store.ttl
            days = [1.1 * ttl, durations.marker(ttl) + durations.HOUR, 2 * durations.DAY]
            hours = [1.1 * durations.TAPE, 1.1 * durations.RECORDED_NAME]
            is_long = self._chance.random() < self._world.faults.days
            self._world.sleep(self._chance.choice(days if is_long else hours))
