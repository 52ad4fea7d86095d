"""Two replicas over one store, and everything that can go wrong between them and their clients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from state_protocol import durations
from state_protocol.messages import Forward, Update
from state_protocol.replica import Replica
from state_protocol.store import Contribution, Store
from state_protocol.values import Refused

if TYPE_CHECKING:
    import random
    from collections.abc import Generator

    from state_protocol.messages import Answer, Request
    from state_protocol.rules import Rules


@dataclass(frozen=True, slots=True)
class Faults:
    """How often each thing goes wrong.

    Attributes:
        lose_reply: Share of answers that get lost.
        die: Chance at each moment that a replica dies.
        roll: Chance at each moment that a slot is set back.
        rival: Chance at each moment that somebody else does something.
        rivals: What the others do: "forward" on the session, a "step" from a gradient of their own,
            "take all" that waits into a step, "close" the session, or "reset" it with a short ttl.
        fill: Chance at each moment that the store becomes full, or has room again.
        tight: Share of writes that the store has no room for.
        raising: Share of scripts that raise.
        overload: Share of attempts that are refused before anything is read.
        impatient: Share of calls that are given up after a few attempts.
        sleep: Chance after each operation that the client sleeps.
        days: Share of these sleeps that are longer than a session's time to live.
    """

    lose_reply: float = 0.0
    die: float = 0.0
    roll: float = 0.0
    rival: float = 0.0
    rivals: tuple[str, ...] = ("forward", "step", "step", "take all")
    fill: float = 0.0
    tight: float = 0.0
    raising: float = 0.0
    overload: float = 0.0
    impatient: float = 0.0
    sleep: float = 0.0
    days: float = 0.0


@dataclass(eq=False, slots=True)
class Attempt:
    """One attempt of a call, somewhere on its way."""

    replica: Replica
    steps: Generator[str, None, Answer]
    end: Answer | Refused | None = field(default=None)


class World:
    """Everything but the trainer.

    Args:
        rules: In force.
        faults: What goes wrong.
        chance: Every draw.

    Attributes:
        rollbacks: How often a slot was set back.
        is_healing: Whether the client sends its log again at the moment.
        lost_in_healing: How often a slot was set back meanwhile.
        slept: How long the client has slept, in seconds.
    """

    def __init__(self, rules: Rules, faults: Faults, chance: random.Random) -> None:
        self.rules, self.faults, self.chance = rules, faults, chance
        # A ttl of days matters to a client that sleeps.
        ttl = chance.choice(durations.SESSION_TTLS) if faults.sleep else durations.SESSION_TTLS[0]
        self.store = Store(rules, chance, ttl)
        self.store.raising, self.store.tight = faults.raising, faults.tight
        self.replicas = [Replica(self.store), Replica(self.store)]
        self.flying: list[Attempt] = []
        self.rollbacks = self.lost_in_healing = 0
        self.is_healing = False
        self.slept = 0.0

    def send(self, request: Request) -> Attempt:
        """Send a request to one of the replicas."""
        replica = self.chance.choice(self.replicas)
        attempt = Attempt(replica, replica.answer(request))
        if self.chance.random() < self.faults.overload:
            attempt.end = Refused("OVERLOADED")
        else:
            self.flying.append(attempt)
        return attempt

    def step(self, attempt: Attempt) -> None:
        """Let an attempt go on to its next access."""
        try:
            next(attempt.steps)
        except StopIteration as stop:
            attempt.end = stop.value
        except Refused as refused:
            attempt.end = refused
        if attempt.end is not None:
            self.flying.remove(attempt)

    def happen(self) -> None:
        """Let a moment pass."""
        chance, faults, store = self.chance, self.faults, self.store
        store.now += 0.01
        for attempt in [a for a in self.flying if chance.random() < 0.3]:
            self.step(attempt)
        if faults.roll and chance.random() < 0.03:
            store.keep()
        if chance.random() < faults.roll:
            self.lose()
        if chance.random() < faults.die:
            at = chance.randrange(2)
            self.flying = [a for a in self.flying if a.replica is not self.replicas[at]]
            self.replicas[at] = Replica(store)
        if chance.random() < faults.fill:
            store.is_full = not store.is_full
        if chance.random() < faults.rival:
            self.rival()

    def lose(self) -> None:
        """Let the store lose what it acknowledged."""
        self.store.lose()
        self.rollbacks += 1
        self.lost_in_healing += self.is_healing

    def attempt(self, request: Request) -> Answer | Refused | None:
        """Make one attempt; None: no answer came in time, and the attempt may still be on its way."""
        attempt = self.send(request)
        for _ in range(self.chance.choice([3, 8, 30])):
            if attempt.end is None and attempt in self.flying and self.chance.random() < 0.7:
                self.step(attempt)
            self.happen()
            if attempt not in self.flying:
                break
        return None if self.chance.random() < self.faults.lose_reply else attempt.end

    def sleep(self, seconds: float) -> None:
        """Let the client sleep while the others go on."""
        if seconds > durations.LONGEST_PAUSE:
            self.settle()
        self.slept += seconds
        for _ in range(8):
            self.store.now += seconds / 8
            self.happen()
            if self.faults.rival and self.chance.random() < 0.2:
                self.rival()
        if self.faults.roll and self.chance.random() < 0.5:
            self.lose()

    def settle(self) -> None:
        """Let every attempt on its way come to its end: duplicates that come last of all."""
        while self.flying:
            self.step(self.flying[0])

    def rival(self) -> None:
        """Let somebody without our log do something with what is stored now."""
        record, store = self.store.read_session(), self.store
        action = self.chance.choice(self.faults.rivals)
        if action == "forward" and record is not None:
            payload = f"rival {self.chance.random()}"
            self.send(Forward(record.epoch, record.seq + 1, None, payload))
        elif action == "step":
            name = ("rival", 1, self.chance.getrandbits(32))
            expires = store.now + durations.CONTRIBUTION
            contribution = Contribution(0, name[2], is_consumed=False, expires=expires)
            store.model.contributions[name] = contribution
            self.send(Update(f"rival {name}", None, (name,)))
        elif action == "take all":
            self.send(Update(f"rival {self.chance.random()}", None, ()))
        elif action == "close":
            store.close_session()
        elif action == "reset":
            store.begin_epoch(f"rival {self.chance.random()}", "rival", ttl=durations.HOUR)
