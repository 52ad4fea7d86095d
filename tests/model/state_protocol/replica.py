"""A replica: a server process that decides from what the store holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from state_protocol.messages import (
    Backward,
    BackwardAnswer,
    BeginEpoch,
    EpochAnswer,
    Forward,
    ForwardAnswer,
    ModelAnswer,
    Update,
    UpdateAnswer,
)
from state_protocol.store import State
from state_protocol.values import (
    CommandRefused,
    Refused,
    ScriptRaised,
    Version,
    mix,
    require,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from state_protocol.messages import (
        Answer,
        ReadModel,
        Request,
    )
    from state_protocol.store import Store, Tape
    from state_protocol.values import Name

A = TypeVar("A")

_TRIES = 3
_AGAIN = "UNKNOWN_OUTCOME"


class Replica:
    """A server process.

    Each `yield` of its operations stands before an access to the store or a reply: anything may
    happen there, for as long as it takes, and the process may die.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._rules = store, store.rules
        self._cached: tuple[int, int, State] | None = None
        self._head: Version | None = None

    def answer(self, request: Request) -> Generator[str, None, Answer]:
        """Carry out a request."""
        if isinstance(request, Forward):
            return self._forward(request)
        if isinstance(request, Backward):
            return self._backward(request)
        if isinstance(request, Update):
            return self._update(request)
        if isinstance(request, BeginEpoch):
            return self._begin_epoch(request)
        return self._read_model(request)

    # -- Forward -----------------------------------------------------------------------------------

    def _forward(self, op: Forward) -> Generator[str, None, ForwardAnswer]:
        was_applied = self._is_applied(op)
        is_full, is_staged = False, True
        for _ in range(_TRIES):
            base = self._cached_base(op)
            if base is None:
                yield "read session"
                found = self._decide(op)
                if isinstance(found, ForwardAnswer):
                    yield "extend"
                    self._run(self._store.extend_session, allow_full=True)
                    yield "reply"
                    return found
                base = found
            if is_full:
                raise self._full(op, was_applied=was_applied)
            version = yield from self._choose_version(op)
            yield "stage tape"
            is_staged = self._store.stage()
            yield "commit"
            h = mix(base.h, op.payload, version)
            state = State(mix(op.payload), version, h, mix(base.token, mix(op.payload), version))
            try:
                outcome = self._commit(op, base, state, is_staged=is_staged)
            except CommandRefused:
                self._cached = None
                if not self._rules.on("read-before-full"):
                    raise self._full(op, was_applied=was_applied) from None
                is_full = True
                continue
            if outcome == "OK":
                self._cached = (op.epoch, op.seq, state)
                yield "reply"
                return ForwardAnswer(h, version, state.token)
            self._cached = None
            # The script says STALE also of what was not staged: it is read again first.
            is_full = not is_staged and self._rules.on("staged-refusal")
        raise self._overtaken(is_staged=is_staged)

    def _full(self, op: Forward, *, was_applied: bool) -> Refused:
        is_wrong = was_applied and self._is_applied(op)
        require(not is_wrong, "STORE_FULL is answered for a chunk that was applied before")
        return Refused("STORE_FULL")

    def _overtaken(self, *, is_staged: bool) -> Refused:
        is_wrong = not is_staged and not self._rules.on("staged-refusal")
        require(not is_wrong, "other writers are blamed for what the store refused")
        return Refused(_AGAIN)

    def _commit(self, op: Forward, base: State, state: State, *, is_staged: bool) -> str:
        return self._run(
            lambda: self._store.commit_chunk(
                op.epoch, base, op.seq, op.payload, state, is_staged=is_staged
            )
        )

    def _is_applied(self, op: Forward) -> bool:
        record = self._store.session.record
        return record is not None and record.epoch == op.epoch and record.seq >= op.seq

    def _cached_base(self, op: Forward) -> State | None:
        if self._cached is None or self._cached[:2] != (op.epoch, op.seq - 1):
            return None
        state = self._cached[2]
        names_other = op.previous_token not in (None, state.token) and self._rules.on("token")
        return None if names_other else state

    def _decide(self, op: Forward) -> ForwardAnswer | State:
        """Return a chunk's answer if it was applied before, else the state that it continues."""
        record = self._store.read_session()
        if record is None:
            raise self._store.absence()
        if op.epoch < record.epoch:
            raise Refused("EPOCH_FENCED", epoch=record.epoch)
        if op.epoch > record.epoch or op.seq > record.seq + 1:
            raise Refused("SEQ_GAP")
        if op.seq == record.seq + 1:
            if op.previous_token not in (None, record.last.token) and self._rules.on("token"):
                raise Refused("HISTORY_FORKED")
            return record.last
        at, before = record.ring.get(op.seq), record.ring.get(op.seq - 1)
        if at is None or before is None:
            raise Refused("REPLAY_WINDOW_PASSED")
        if at.digest != mix(op.payload) and self._rules.on("digest"):
            raise Refused("SEQ_REUSED")
        if op.previous_token not in (None, before.token) and self._rules.on("token"):
            raise Refused("HISTORY_FORKED")
        if op.pinned not in (None, at.version):
            raise Refused("HISTORY_FORKED")
        return ForwardAnswer(at.h, at.version, at.token, is_replayed=True)

    def _choose_version(self, op: Forward) -> Generator[str, None, Version]:
        if op.pinned is not None:
            yield "read weights"
            return self._weights(op.pinned)
        minimum, head = op.minimum, self._head
        is_old = head is None or (minimum is not None and head.number < minimum.number)
        if head is None or is_old or self._store.chance.random() < 0.3:
            yield "read head"
            head = self._head = self._store.model.head
        if minimum is not None and head.number < minimum.number:
            raise Refused("VERSION_GONE")
        is_other = minimum is not None and head.number == minimum.number and head != minimum
        if is_other and self._rules.on("version-digest"):
            raise Refused("WEIGHTS_FORKED")
        return head

    def _weights(self, version: Version) -> Version:
        digest = self._store.model.versions.get(version.number)
        if digest is None:
            raise Refused("VERSION_GONE")
        if digest != version.digest and self._rules.on("version-digest"):
            raise Refused("WEIGHTS_FORKED")
        return Version(version.number, digest)

    # -- Backward ----------------------------------------------------------------------------------

    def _backward(self, op: Backward) -> Generator[str, None, BackwardAnswer]:
        yield "read tape"
        tape = self._find_tape(op)
        if tape is None:
            yield "read whether it is recorded"
            is_recorded = self._store.find_contribution(op.name) is not None
            raise Refused("TAPE_MISSING", is_recorded=is_recorded)
        if tape.token != op.token and self._rules.on("token"):
            raise Refused("HISTORY_FORKED")
        yield "read weights"
        weights = self._weights(tape.version)
        gradient = mix("gradient", tape.payload, tape.h0, weights, op.dhs)
        yield "count"
        outcome = yield from self._count(op, gradient)
        if outcome == "REUSED":
            raise Refused("SEQ_REUSED")
        step = None
        if op.update is not None:
            step = yield from self._step_of(op.update)
        yield "reply"
        return BackwardAnswer(gradient, step, is_replayed=outcome == "REPLAYED")

    def _find_tape(self, op: Backward) -> Tape | None:
        _, epoch, seq = op.name
        record = self._store.read_session()
        if record is None:
            raise self._store.absence()
        if (epoch, seq) > (record.epoch, record.seq) and self._rules.on("gap-on-backward"):
            raise Refused("SEQ_GAP")
        if epoch < record.epoch and not op.is_resent:
            raise Refused("EPOCH_FENCED", epoch=record.epoch)
        return self._store.session.tapes.get((epoch, seq))

    def _count(self, op: Backward, gradient: int) -> Generator[str, None, str]:
        digest = mix(op.dhs)
        try:
            return self._run(lambda: self._store.record_contribution(op.name, digest, gradient))
        except CommandRefused:
            if not self._rules.on("read-before-full"):
                raise Refused("STORE_FULL") from None
        yield "read whether it is recorded"
        known = self._store.find_contribution(op.name)
        if known is None:
            raise Refused("STORE_FULL")
        return "REPLAYED" if known.digest == digest else "REUSED"

    def _step_of(self, update: Update) -> Generator[str, None, UpdateAnswer | Refused]:
        """Make the step of a Backward that has been recorded, or return why there is none."""
        try:
            return (yield from self._update(update))
        except Refused as refused:
            if refused.reason == _AGAIN or not self._rules.on("recorded-reported"):
                raise
            return refused

    # -- Update ------------------------------------------------------------------------------------

    def _update(self, op: Update) -> Generator[str, None, UpdateAnswer]:
        store, one_read = self._store, self._rules.on("one-read")
        is_full, is_staged = False, True
        yield "read all at once"
        done = store.find_request(op.request_id)
        if not one_read:
            yield "read it again"
        for _ in range(_TRIES):
            if one_read:
                done = store.find_request(op.request_id)
            if done is not None:
                return UpdateAnswer(done, is_replayed=True)
            base, names = self._take(op)
            if is_full:
                raise Refused("STORE_FULL")
            gradients = [store.model.contributions[name].gradient for name in names]
            # Bit for bit the same from the same head and the same contributions.
            new = Version(base.number + 1, mix(base, gradients))
            yield "stage weights"
            is_staged = store.stage()
            if not is_staged and self._rules.on("staged-refusal"):
                is_full = True
                yield "read all at once"
                continue
            yield "publish"
            try:
                made = self._publish(op, base, new, names, is_staged=is_staged)
            except CommandRefused:
                is_full = True
                yield "read all at once"
                continue
            if made is not None:
                yield "reply"
                return UpdateAnswer(made)
            yield "read all at once"
        raise self._overtaken(is_staged=is_staged)

    def _publish(
        self, op: Update, base: Version, new: Version, names: list[Name], *, is_staged: bool
    ) -> Version | None:
        return self._run(
            lambda: self._store.publish_version(
                base, new, names, op.request_id, is_staged=is_staged
            )
        )

    def _take(self, op: Update) -> tuple[Version, list[Name]]:
        """Return the head and the contributions that a step is to be made from."""
        model, is_exact = self._store.model, self._rules.on("exact-names")
        if is_exact and op.expected not in (None, model.head):
            raise Refused("VERSION_CONFLICT", head=model.head)
        waiting = model.waiting()
        names = sorted(op.names) if op.names and is_exact else waiting
        if not names or not set(names) <= set(waiting):
            raise Refused("NO_GRADIENTS")
        return model.head, names

    # -- epochs and reading ------------------------------------------------------------------------

    def _begin_epoch(self, op: BeginEpoch) -> Generator[str, None, EpochAnswer]:
        store = self._store
        yield "begin epoch"
        try:
            outcome, epoch = self._run(
                lambda: store.begin_epoch(
                    op.request_id, op.state, op.expected_epoch, op.expected_seq, op.restored_epoch
                )
            )
        except CommandRefused:
            raise Refused("STORE_FULL") from None
        self._cached = None
        if outcome == "ABSENT":
            raise store.absence()
        if outcome == "FENCED":
            raise Refused("EPOCH_FENCED", epoch=epoch)
        if outcome == "GAP":
            raise Refused("SEQ_GAP")
        yield "bring the tenant's list up to date"
        if not store.stage() and not self._rules.on("begun-reported"):
            raise Refused("STORE_FULL")
        yield "reply"
        return EpochAnswer(epoch, mix("first", op.state), is_replayed=outcome == "REPLAYED")

    def _read_model(self, _op: ReadModel) -> Generator[str, None, ModelAnswer]:
        yield "read model"
        answer = ModelAnswer(self._store.model.head, dict(self._store.model.versions))
        yield "reply"
        return answer

    def _run(self, script: Callable[[], A], *, allow_full: bool = False) -> A:
        try:
            return self._store.run(script, allow_full=allow_full)
        except ScriptRaised:
            self._cached = None
            reason = _AGAIN if self._rules.on("raised-inside") else "STORE_FULL"
            raise Refused(reason) from None
