"""The store: two hash slots with their scripts, a clock, and refusals."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from state_protocol import durations
from state_protocol.values import (
    CommandRefused,
    Refused,
    ScriptRaised,
    Version,
    mix,
    require,
)

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from state_protocol.rules import Rules
    from state_protocol.values import (
        Name,
    )

A = TypeVar("A")


@dataclass(slots=True)
class State:
    """One state of the ring.

    Attributes:
        digest: Of the chunk's content.
        version: The weights that the chunk used.
        h: The state after it.
        token: Names the history up to here.
    """

    digest: int
    version: Version
    h: object
    token: int


@dataclass(slots=True)
class Tape:
    """What a Forward left for its Backward."""

    payload: str
    h0: object
    version: Version
    token: int
    expires: float


@dataclass(slots=True)
class Record:
    """The record of a live session."""

    epoch: int
    seq: int
    request_id: str
    ring: dict[int, State]
    ttl: float
    expires: float
    touched: float

    @property
    def last(self) -> State:
        """The newest state in the ring."""
        return self.ring[self.seq]


@dataclass(slots=True)
class Marker:
    """What outlives a session."""

    epoch: int
    is_closed: bool
    expires: float


@dataclass(slots=True)
class SessionSlot:
    """One session's keys.

    Attributes:
        record: The session while it durations.
        marker: Says how it ended.
        tapes: By epoch and chunk.
        ended: The epochs that truly ended with their session; no replica reads it.
    """

    record: Record | None = None
    marker: Marker | None = None
    tapes: dict[tuple[int, int], Tape] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Contribution:
    """A contribution that waits, or the name of one that was consumed."""

    digest: int
    gradient: int
    is_consumed: bool
    expires: float


@dataclass(slots=True)
class ModelSlot:
    """One model's keys.

    Attributes:
        head: The newest version.
        versions: Digests of the versions that are kept, by number.
        superseded: When each stopped being the head.
        contributions: By name.
        requests: The answer to each request id, and when it was given.
    """

    head: Version
    versions: dict[int, int]
    superseded: dict[int, float] = field(default_factory=dict)
    contributions: dict[Name, Contribution] = field(default_factory=dict)
    requests: dict[str, tuple[Version, float]] = field(default_factory=dict)

    def waiting(self) -> list[Name]:
        """Name the contributions that wait, sorted."""
        return sorted(n for n, c in self.contributions.items() if not c.is_consumed)


class Store:
    """A store server.

    Each of its scripts is atomic and sees one slot. Either slot may be set back by itself to an
    earlier moment, as a failover that lost acknowledged writes does.

    Args:
        rules: In force.
        chance: Every draw.
        ttl: The session's time to live, in seconds.

    Attributes:
        now: Its clock, in seconds.
        is_full: Whether it refuses every command that needs memory.
        tight: The chance that it has no room for a write all the same.
        raising: The chance that a script raises.
        lineage: What each version is made of, by digest; no replica reads it.
    """

    def __init__(self, rules: Rules, chance: random.Random, ttl: float) -> None:
        self.rules, self.chance, self.ttl = rules, chance, ttl
        self.now = 1000.0
        self.is_full = False
        self.raising = self.tight = 0.0
        first = Version(1, mix("w1"))
        self.session, self.model = SessionSlot(), ModelSlot(first, {1: first.digest})
        self.lineage: dict[int, tuple[tuple[Name, int], ...]] = {first.digest: ()}
        self.begin_epoch("", "h0")
        self._sessions = [copy.deepcopy(self.session)]
        self._models = [copy.deepcopy(self.model)]

    # -- faults ------------------------------------------------------------------------------------

    def run(self, script: Callable[[], A], *, allow_full: bool = False) -> A:
        """Run a script that writes.

        Raises:
            CommandRefused: If the store refused it before it ran.
            ScriptRaised: If it raised, before or after its work.
        """
        if not allow_full and not self.stage():
            raise CommandRefused
        raises = self.chance.random() < self.raising
        if raises and self.chance.random() < 0.5:
            raise ScriptRaised
        answer = script()
        if raises:
            raise ScriptRaised
        return answer

    def stage(self) -> bool:
        """Write what a script will refer to; return whether the store took it."""
        return not self.is_full and self.chance.random() >= self.tight

    def keep(self) -> None:
        """Remember this moment."""
        self._sessions[:] = [*self._sessions[-2:], copy.deepcopy(self.session)]
        self._models[:] = [*self._models[-2:], copy.deepcopy(self.model)]

    def lose(self) -> None:
        """Set one slot back to an earlier moment; what was lost never comes back by itself."""
        if self.chance.random() < 0.5:
            at = self.chance.randrange(len(self._sessions))
            del self._sessions[at + 1 :]
            self.session = copy.deepcopy(self._sessions[at])
        else:
            at = self.chance.randrange(len(self._models))
            del self._models[at + 1 :]
            self.model = copy.deepcopy(self._models[at])

    def consumed(self, version: Version) -> list[Name]:
        """Name the contributions that a version is made of."""
        return [name for name, _ in self.lineage[version.digest]]

    # -- the session's slot ------------------------------------------------------------------------

    def read_session(self) -> Record | None:
        """Read the session; what has expired is gone."""
        slot = self.session
        if slot.record is not None and slot.record.expires <= self.now:
            slot.ended.add(slot.record.epoch)
            slot.record = None
        if slot.marker is not None and slot.marker.expires <= self.now:
            slot.marker = None
        for name in [name for name, tape in slot.tapes.items() if tape.expires <= self.now]:
            del slot.tapes[name]
        return slot.record

    def absence(self) -> Refused:
        """Say why the session is not there."""
        if self.session.marker is None:
            return Refused("SESSION_NOT_FOUND")
        return Refused("SESSION_CLOSED" if self.session.marker.is_closed else "SESSION_EXPIRED")

    def begin_epoch(
        self,
        request_id: str,
        state: str,
        expected_epoch: int = 0,
        expected_seq: int = -1,
        restored_epoch: int = 0,
        ttl: float = 0.0,
    ) -> tuple[str, int]:
        """Begin an epoch; return BEGUN, REPLAYED, ABSENT, FENCED or GAP with the epoch."""
        record, marker = self.read_session(), self.session.marker
        last = marker.epoch if marker else 0
        if record is not None:
            if request_id and record.request_id == request_id:
                return "REPLAYED", record.epoch
            if expected_epoch not in (0, record.epoch):
                return "FENCED", record.epoch
            if expected_seq not in (-1, record.seq):
                return "GAP", record.epoch
            last = max(last, record.epoch)
        elif request_id:
            return "ABSENT", 0
        if restored_epoch and restored_epoch <= last:
            return "FENCED", last
        require(restored_epoch not in self.session.ended, "healing brought back an ended session")
        epoch = restored_epoch or max(last, int(self.now * 1000)) + 1
        if record is not None:
            self.session.ended.add(record.epoch)
        ttl = ttl or self.ttl
        first = State(0, Version(0, 0), state, mix("first", state))
        self.session.record = Record(
            epoch, 0, request_id, {0: first}, ttl, self.now + ttl, self.now
        )
        self._mark(epoch, self.now + durations.marker(ttl))
        return "BEGUN", epoch

    def commit_chunk(
        self, epoch: int, base: State, seq: int, payload: str, state: State, *, is_staged: bool
    ) -> str:
        """Apply a chunk if the session stands where its state was computed from: OK or STALE."""
        record = self.read_session()
        if record is None or (record.epoch, record.seq) != (epoch, seq - 1):
            return "STALE"
        if record.last.token != base.token and self.rules.on("commit-id"):
            return "STALE"
        if not is_staged:
            return "STALE"
        follows = state.h == mix(record.last.h, payload, state.version)
        require(follows, "a stored chunk does not follow from the one stored before it")
        oldest = seq - durations.REPLAY_WINDOW
        record.ring = {k: kept for k, kept in record.ring.items() if k >= oldest} | {seq: state}
        record.seq = seq
        expires = self.now + min(durations.TAPE, self.ttl)
        tape = Tape(payload, base.h, state.version, state.token, expires)
        self.session.tapes[epoch, seq] = tape
        self.extend_session()
        return "OK"

    def extend_session(self) -> None:
        """Let the session's time to live start again."""
        record = self.read_session()
        if record is None:
            return
        record.expires = self.now + record.ttl
        if self.now - record.touched >= record.ttl / 4:
            record.touched = self.now
            self._mark(record.epoch, self.now + durations.marker(record.ttl))

    def close_session(self) -> None:
        """End the session; its marker stays."""
        record = self.read_session()
        if record is None:
            return
        self.session.ended.add(record.epoch)
        longer = self.rules.on("closed-marker")
        extra = durations.marker(record.ttl) if longer else durations.MARKER_EXTRA
        self.session.record, self.session.tapes = None, {}
        if not longer:
            self.session.marker = None  # the one before would make up for it
        self._mark(record.epoch, self.now + extra, is_closed=True)

    def _mark(self, epoch: int, expires: float, *, is_closed: bool = False) -> None:
        """Write the marker; others may rely on the longer time to live that it had."""
        before = self.session.marker
        if before is not None and self.rules.on("longest-marker"):
            expires = max(expires, before.expires)
        self.session.marker = Marker(epoch, is_closed, expires)

    # -- the model's slot --------------------------------------------------------------------------

    def find_contribution(self, name: Name) -> Contribution | None:
        """Read a contribution, or the name of one that was consumed."""
        found = self.model.contributions
        for old in [old for old, entry in found.items() if entry.expires <= self.now]:
            del found[old]
        return found.get(name)

    def record_contribution(self, name: Name, digest: int, gradient: int) -> str:
        """Record a contribution once: RECORDED, REPLAYED or REUSED."""
        known = self.find_contribution(name)
        if known is not None:
            return "REPLAYED" if known.digest == digest else "REUSED"
        again = name in self.consumed(self.model.head)
        require(not again, "a contribution that a step has taken waits to be consumed again")
        expires = self.now + durations.CONTRIBUTION
        self.model.contributions[name] = Contribution(digest, gradient, False, expires)
        return "RECORDED"

    def find_request(self, request_id: str) -> Version | None:
        """Return what was answered to a request id."""
        known = self.model.requests.get(request_id)
        if known is None or known[1] + durations.RECORDED_NAME <= self.now:
            return None
        return known[0] if self.rules.on("request-id") else None

    def publish_version(
        self, base: Version, new: Version, names: list[Name], request_id: str, *, is_staged: bool
    ) -> Version | None:
        """Make a version the head and consume what it is made of; None: it has changed since it was read."""
        known = self.find_request(request_id)
        if known is not None:
            return known
        model, waiting = self.model, self.model.waiting()
        if not is_staged or model.head != base or not set(names) <= set(waiting):
            return None
        taken = tuple((name, model.contributions[name].gradient) for name in names)
        self.lineage[new.digest] = self.lineage[base.digest] + taken
        for name in names:
            model.contributions[name].is_consumed = True
            model.contributions[name].expires = self.now + durations.RECORDED_NAME
            if not self.rules.on("recorded-name"):
                del model.contributions[name]
        model.head, model.versions[new.number] = new, new.digest
        model.superseded[base.number] = self.now
        model.requests[request_id] = new, self.now
        self._drop_versions()
        return new

    def _drop_versions(self) -> None:
        old = self.model.superseded
        for number in sorted(old)[: -durations.VERSIONS_KEPT]:
            if old[number] + durations.TAPE <= self.now:
                del old[number], self.model.versions[number]
