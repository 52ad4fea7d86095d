"""The client library: numbers, retries, doubt, and the healing of what the store lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from state_protocol import durations
from state_protocol.log import Entry, Log, as_sent_again, promised_by
from state_protocol.messages import (
    Backward,
    BackwardAnswer,
    BeginEpoch,
    EpochAnswer,
    Forward,
    ForwardAnswer,
    ModelAnswer,
    ReadModel,
    Update,
    UpdateAnswer,
)
from state_protocol.values import Refused, mix, require

if TYPE_CHECKING:
    from state_protocol.messages import Answer, Request
    from state_protocol.values import Name, Version
    from state_protocol.world import World

UNDECIDED = {"STORE_FULL", "OVERLOADED", "GAVE_UP"}
"""Refusals that were decided before anything was read."""
_LOSS = {
    "SEQ_GAP",
    "SESSION_NOT_FOUND",
    "VERSION_GONE",
    "WEIGHTS_FORKED",
    "NO_GRADIENTS",
    "VERSION_CONFLICT",
}
_PASSED = {
    "REPLAY_WINDOW_PASSED",
    "EPOCH_FENCED",
    "SESSION_CLOSED",
    "SESSION_EXPIRED",
    "TAPE_MISSING",
}
_PATIENCE = 60
_MAX_ROUNDS = 40
_MAX_ROUNDS_IN_VAIN = 3


@dataclass(eq=False, slots=True)
class Operation:
    """A request and what became of its attempts.

    Attributes:
        request: What is sent.
        sent_at: When it was first sent, on the client's clock.
        head: The newest version that the client knew then.
        is_unknown: Whether an attempt may have been carried out, or may still be.
        is_healing: Whether the last refusal is one of its healing, not its own.
    """

    request: Request
    sent_at: float
    head: Version
    is_unknown: bool = False
    is_healing: bool = False


@dataclass(slots=True)
class Rounds:
    """How often the log was sent for one operation."""

    count: int = 0
    in_vain: int = 0


class Client:
    """A trainer's session and model as its client library sees them.

    Args:
        world: Where it calls.

    Attributes:
        epoch: Of the session.
        seq: The last chunk that was answered.
        known: The newest version that it has seen.
        waiting: Its contributions that wait for an Update.
        steps: What its Updates took, in order: each contribution with its gradient.
        doubt: The operation whose outcome is unknown.
    """

    def __init__(self, world: World) -> None:
        self._world, self._rules, self._log = world, world.rules, Log()
        record = world.store.session.record
        assert record is not None
        self._ttl = record.ttl
        self.epoch, self.seq, self.known = record.epoch, 0, world.store.model.head
        self._h: dict[tuple[int, int], object] = {(self.epoch, 0): "h0"}
        self._tokens = {(self.epoch, 0): record.last.token}
        self._used: dict[tuple[int, int], Version] = {}
        self._payloads: dict[tuple[int, int], str] = {}
        self._gradients: dict[Name, int] = {}
        self._extended_at = self.now
        self.waiting: list[Name] = []
        self.steps: list[tuple[Name, int]] = []
        self.doubt: Operation | None = None
        begun = EpochAnswer(self.epoch, record.last.token)
        self._note(Operation(BeginEpoch("", "h0"), self.now, self.known), begun)

    @property
    def now(self) -> float:
        """The client's clock, in seconds."""
        runs_on = self._rules.on("suspend-clock")
        return self._world.store.now - (0.0 if runs_on else self._world.slept)

    @property
    def token(self) -> int:
        """The token of the last answered chunk."""
        return self._tokens[self.epoch, self.seq]

    # -- operations --------------------------------------------------------------------------------

    def forward(self, payload: str) -> Forward:
        """Make the request of the next chunk."""
        return Forward(self.epoch, self.seq + 1, self.token, payload, minimum=self.known)

    def backward(self, dhs: str, update: Update | None = None) -> Backward:
        """Make the request of the last chunk's gradient."""
        return Backward(("me", self.epoch, self.seq), self.token, dhs, update)

    def update(self, request_id: str, names: list[Name], *, is_exclusive: bool) -> Update:
        """Make the request of a step."""
        return Update(request_id, self.known if is_exclusive else None, tuple(names))

    def set_state(self, request_id: str, state: str) -> BeginEpoch:
        """Make the request of a new epoch that ends with the last answered chunk."""
        return BeginEpoch(request_id, state, self.epoch, self.seq)

    def carry_out(self, request: Request) -> None:
        """Carry out an operation; nothing else may be in doubt.

        Raises:
            Refused: With `doubt` set if it may have been carried out all the same.
        """
        self._finish(Operation(request, self.now, self.known))

    def settle(self) -> None:
        """Find out what became of the operation in doubt.

        Raises:
            Refused: As for the operation itself; OUTCOME_LOST if that cannot be found out any more.
        """
        assert self.doubt is not None
        self._finish(self.doubt)

    def _finish(self, op: Operation) -> None:
        rounds = Rounds()
        try:
            while self._go_on(op, rounds):
                pass
        except Refused as refused:
            self.doubt = op if self._stays_in_doubt(op, refused) else None
            raise
        self.doubt = None

    def _go_on(self, op: Operation, rounds: Rounds) -> bool:
        """Make one call of an operation, or heal; return whether something is left to do."""
        try:
            self._require_knowable(op)
            answer = self._call(op, is_own=True)
        except Refused as refused:
            if not self._is_recorded(op, refused):
                self._heal(op, refused, rounds)
                return True
            answer = BackwardAnswer(self._gradient(op.request), step=refused)
        self._accept(op, answer)
        step = op.request.update if isinstance(op.request, Backward) else None
        if step is None or not isinstance(answer, BackwardAnswer):
            return False
        if not isinstance(answer.step, Refused):
            return False
        op.request = step  # the contribution is recorded: the step is asked for by itself
        return True

    def _stays_in_doubt(self, op: Operation, refused: Refused) -> bool:
        if refused.reason in UNDECIDED or op.is_healing:
            return op.is_unknown and self._rules.on("refused-unknown")
        return False

    def _require_knowable(self, op: Operation) -> None:
        """Refuse to send what was sent so long ago that nobody remembers whether it was done."""
        if not op.is_unknown or not self._rules.on("doubt-age"):
            return
        if isinstance(op.request, Backward | Update) and self._may_be_forgotten(
            op.sent_at, op.head
        ):
            self.waiting.clear()
            op.is_unknown = False
            raise Refused("OUTCOME_LOST")

    def _may_be_forgotten(self, sent_at: float, head: Version) -> bool:
        """Return whether a step that nobody remembers may have taken what was sent then."""
        if self.now - sent_at <= durations.RECORDED_NAME:
            return False
        now = self._read_model().head
        return now != head and now.number >= head.number

    def _is_recorded(self, op: Operation, refused: Refused) -> bool:
        return (
            refused.reason == "TAPE_MISSING"
            and isinstance(op.request, Backward)
            and refused.is_recorded
            and self._rules.on("counted-answer")
        )

    # -- answers -----------------------------------------------------------------------------------

    def _accept(self, op: Operation, answer: Answer) -> None:
        request = op.request
        if isinstance(request, Forward):
            assert isinstance(answer, ForwardAnswer)
            self._advance(request, answer)
        elif isinstance(request, Backward):
            assert isinstance(answer, BackwardAnswer)
            require(
                answer.gradient == self._gradient(request),
                "a gradient has other weights or another state than its Forward",
            )
            self.waiting.append(request.name)
            self._gradients[request.name] = answer.gradient
        elif isinstance(request, Update):
            assert isinstance(answer, UpdateAnswer)
            self._stepped(request, answer)
        elif isinstance(request, BeginEpoch):
            assert isinstance(answer, EpochAnswer)
            self.epoch, self.seq, self._extended_at = answer.epoch, 0, self.now
            self._h[self.epoch, 0] = request.state
            self._tokens[self.epoch, 0] = answer.token
        self._note(op, answer)
        if isinstance(answer, BackwardAnswer) and isinstance(answer.step, UpdateAnswer):
            assert isinstance(request, Backward)
            assert request.update is not None
            self._stepped(request.update, answer.step)
            self._note(Operation(request.update, op.sent_at, op.head), answer.step)

    def _advance(self, request: Forward, answer: ForwardAnswer) -> None:
        at, before = (request.epoch, request.seq), (request.epoch, request.seq - 1)
        follows = answer.h == mix(self._h[before], request.payload, answer.version)
        require(follows, "an answered chunk does not follow from what was answered before")
        self._h[at], self._tokens[at] = answer.h, answer.token
        self._used[at], self._payloads[at] = answer.version, request.payload
        self.seq, self._extended_at = request.seq, self.now
        self.known = max(self.known, answer.version)

    def _stepped(self, request: Update, answer: UpdateAnswer) -> None:
        taken = self._world.store.consumed(answer.version)[-len(request.names) :]
        is_exact = sorted(request.names) == taken
        require(is_exact, "a step has taken other contributions than it named")
        self.known = answer.version
        self.waiting = [name for name in self.waiting if name not in request.names]
        self.steps += [(name, self._gradients[name]) for name in sorted(request.names)]

    def _gradient(self, request: Request) -> int:
        assert isinstance(request, Backward)
        at = request.name[1:]
        h0 = self._h[at[0], at[1] - 1]
        return mix("gradient", self._payloads[at], h0, self._used[at], request.dhs)

    def _note(self, op: Operation, answer: Answer) -> None:
        is_pinned = self._rules.on("pinned-replay")
        request = as_sent_again(op.request, answer, is_pinned=is_pinned)
        self._log.append(Entry(request, promised_by(answer), op.sent_at, op.head), answer)

    # -- calls -------------------------------------------------------------------------------------

    def _call(self, op: Operation, *, is_own: bool = False) -> Answer:
        """Send a request until it is answered, to either replica; the caller's own may be given up."""
        chance, faults = self._world.chance, self._world.faults
        if not self._rules.on("doubt-of-operation"):
            op.is_unknown = False
        is_impatient = is_own and chance.random() < faults.impatient
        patience = chance.choice([1, 2, 3]) if is_impatient else _PATIENCE
        reason = "GAVE_UP"
        op.is_healing = False
        for _ in range(patience):
            end = self._world.attempt(op.request)
            if not isinstance(end, Refused | None):
                return end
            if end is None or end.reason == "UNKNOWN_OUTCOME":
                op.is_unknown = True
            elif end.reason == "OVERLOADED":
                reason = "OVERLOADED"
            else:
                raise end
        raise Refused(reason)

    def _read_model(self) -> ModelAnswer:
        answer = self._call(Operation(ReadModel(), self.now, self.known))
        assert isinstance(answer, ModelAnswer)
        return answer

    # -- healing -----------------------------------------------------------------------------------

    def _heal(self, op: Operation, refused: Refused, rounds: Rounds) -> None:
        """Heal what a refusal is a sign of, or raise it."""
        if not self._is_loss(op, refused, rounds):
            raise refused
        op.is_healing = self._world.is_healing = True
        try:
            applied = self._send_again()
        finally:
            self._world.is_healing = False
        op.is_healing = False
        op.is_unknown &= self._rules.on("doubt-through-healing")
        rounds.count += 1
        rounds.in_vain = 0 if applied else rounds.in_vain + 1
        if rounds.in_vain >= _MAX_ROUNDS_IN_VAIN or rounds.count >= _MAX_ROUNDS:
            raise refused

    def _is_loss(self, op: Operation, refused: Refused, rounds: Rounds) -> bool:
        if refused.reason == "SESSION_NOT_FOUND" and self._is_too_old():
            raise Refused("SESSION_EXPIRED")
        if refused.reason == "EPOCH_FENCED":
            return refused.epoch < self.epoch
        if refused.reason == "VERSION_CONFLICT":
            return self._is_lost_head(op, refused, rounds)
        return refused.reason in _LOSS

    def _is_lost_head(self, op: Operation, refused: Refused, rounds: Rounds) -> bool:
        """Return whether the expected version was lost, by the head that a conflict names."""
        assert isinstance(op.request, Update)
        expected, head = op.request.expected, refused.head
        assert expected is not None
        assert head is not None
        if head.number <= expected.number:
            return self._rules.on("conflict-loss")
        world = self._world
        is_kept = self._read_model().kept.get(expected.number) == expected.digest
        is_loss = not is_kept and not rounds.count if self._rules.on("conflict-truth") else True
        is_vain = is_loss and not world.rollbacks and not world.slept
        require(not is_vain, "a conflict sends the log again though nothing was lost")
        return is_loss

    def _is_too_old(self) -> bool:
        return self.now - self._extended_at > self._ttl and self._rules.on("age")

    def _send_again(self) -> int:
        """Send the log once; return how many operations were applied anew."""
        applied, is_stuck = 0, False
        model = self._read_model()
        for entry in list(self._log.entries):
            is_session = not isinstance(entry.request, Update)
            if (is_session and is_stuck) or not self._is_due(entry, model):
                continue
            try:
                answer = self._call(Operation(entry.request, self.now, self.known))
            except Refused as refused:
                if refused.reason not in _PASSED | _LOSS:
                    raise
                is_stuck |= is_session and refused.reason in _LOSS
                continue
            entry.confirm(answer)
            applied += not answer.is_replayed
        return applied

    def _is_due(self, entry: Entry, model: ModelAnswer) -> bool:
        """Return whether an entry is to be sent again, given what the model holds."""
        request = entry.request
        if isinstance(request, BeginEpoch):
            return not self._is_too_old() or not self._rules.on("age-of-every-entry")
        if isinstance(request, Update):
            if not self._rules.on("same-round"):
                return False
            return not self._holds(model, self._log.makers[request.names[0]])
        if isinstance(request, Backward):
            return self._is_to_count(request.name, entry, model)
        return True

    def _is_to_count(self, name: Name, entry: Entry, model: ModelAnswer) -> bool:
        maker = self._log.makers.get(name)
        if maker is None:
            if not self._rules.on("unclaimed-age"):
                return True
            return not self._may_be_forgotten(entry.sent_at, entry.head)
        if not self._rules.on("skip-held") or not self._holds(model, maker):
            return True
        is_listed = model.kept.get(maker.number) is not None
        is_there = name in self._world.store.consumed(model.head)
        require(is_there or not is_listed, "a step that was lost is taken for made")
        return False

    def _holds(self, model: ModelAnswer, version: Version) -> bool:
        """Return whether a version is still part of the model's history, as far as it is kept."""
        if model.head.number < version.number:
            return False
        if not self._rules.on("held-digest"):
            return True
        return model.kept.get(version.number, version.digest) == version.digest
