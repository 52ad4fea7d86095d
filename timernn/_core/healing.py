"""The healing of a store that lost acknowledged writes, from the journal of what was answered.

After a failover the store may have lost writes in one hash slot and not in another. Each operation
is a function of its content, its numbers and the weights version it used, and is guarded by them on
the server: what is there answers `replayed`, what was lost is applied again and becomes what it was,
and what another writer has put in its place answers otherwise, which is raised and never mixed in.

The server's memory of what was closed, expired or recorded ends some time after the thing itself. So
two things are not sent again blindly: a session whose time to live is over, which has expired and was
not lost; and a gradient whose step stands, which would be recorded a second time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from timernn import errors
from timernn._core.contract import BACKWARD, FIND_VERSIONS, GET_MODEL, UPDATE
from timernn._core.convert import version_from_proto
from timernn._core.effects import Sleep
from timernn.v1 import model_service_pb2 as model_pb
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from timernn._core.ages import Lifetime
    from timernn._core.effects import Op
    from timernn._core.journal import Entry, Journal
    from timernn._core.retry import Caller
    from timernn.types import Version

# What a store answers that has lost something of ours. Each of them can be the truth as well: then
# healing changes nothing, and the error is raised.
_LOSS = (
    errors.SeqGap,
    errors.SessionNotFound,
    errors.VersionGone,
    errors.WeightsForked,
    errors.NoGradients,
    errors.VersionConflict,
)
# What an old operation may answer that nobody needs any more: applied long ago, of an epoch that
# has ended, of a session that was closed since.
_PASSED = (
    errors.ReplayWindowPassed,
    errors.EpochFenced,
    errors.SessionClosed,
    errors.SessionExpired,
    errors.TapeMissing,
)
_MAX_ROUNDS = 40
_MAX_ROUNDS_IN_VAIN = 3
_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True)
class Scope:
    """What an operation depends on.

    Attributes:
        model_id: The model.
        journals: What to send again when something of it was lost, in this order.
        epoch: The session's epoch; 0 if it is no session's operation.
        lifetime: The session's, if it is a session's operation.
        beginning: Sent before the journals: the epoch's beginning, where nothing else of its
            history is needed.
    """

    model_id: str
    journals: tuple[Journal, ...]
    epoch: int = 0
    lifetime: Lifetime | None = None
    beginning: Entry | None = None

    def entries(self) -> list[Entry]:
        """Return the entries as they are now."""
        logged = [entry for journal in self.journals for entry in journal.entries()]
        return logged if self.beginning is None else [self.beginning, *logged]


class Healing:
    """What one operation does about signs of lost writes: the memory of a healing loop.

    Args:
        caller: Makes the calls.
        scope: What the operation depends on.
    """

    def __init__(self, caller: Caller, scope: Scope) -> None:
        self._caller, self.scope = caller, scope
        self._rounds = 0
        self._rounds_in_vain = 0

    def after(self, error: errors.Error, deadline: float, request: Any = None) -> Op[None]:
        """Heal what the error is a sign of, or raise it.

        Args:
            error: What the operation was refused with.
            deadline: When healing has to be over, on the caller's clock.
            request: The operation; needed where it may expect a head.

        Raises:
            HistoryForked: If another writer used the gap.
            HistoryLost: If the journal does not hold what was lost.
            SessionExpired: If the session is gone because it was not used for its time to live.
            Error: The given one, if it is no sign of loss or if healing changes nothing about it.
        """
        if not self._is_loss(error):
            raise error
        self._refuse_the_expired(error)
        worth = yield from self._rounds_worth(error, request, deadline)
        if not worth:
            raise error
        applied = yield from self._send_again(deadline)
        self._rounds += 1
        self._rounds_in_vain = 0 if applied else self._rounds_in_vain + 1
        if self._rounds_in_vain >= worth or self._rounds >= _MAX_ROUNDS:
            raise self._verdict(error) from error
        if not applied:
            yield Sleep(_PAUSE_S)

    # -- what a refusal is a sign of ---------------------------------------------------------------

    def _is_loss(self, error: errors.Error) -> bool:
        if isinstance(error, errors.EpochFenced):  # the store is at an epoch before ours
            stored = error.metadata.get("epoch", "")
            return stored.isdecimal() and int(stored) < self.scope.epoch
        return isinstance(error, _LOSS)

    def _refuse_the_expired(self, error: errors.Error) -> None:
        """Distinguish an end by age from a loss: the store may have forgotten the session by now."""
        lifetime = self.scope.lifetime
        if isinstance(error, errors.SessionNotFound) and lifetime is not None and lifetime.is_over:
            text = (
                f"the session has expired: its last answer came {lifetime.age_s:.0f} s ago, its "
                f"time to live is {lifetime.ttl_s:.0f} s"
            )
            raise errors.SessionExpired(text, metadata=error.metadata) from error

    def _rounds_worth(self, error: errors.Error, request: Any, deadline: float) -> Op[int]:
        """Return how many rounds that change nothing an error is worth; 0: it is plain truth."""
        if not isinstance(error, errors.VersionConflict):
            return _MAX_ROUNDS_IN_VAIN
        expected, head = _expected(request), error.metadata.get("head", "")
        if expected is None or not head.isdecimal() or int(head) <= expected.number:
            return _MAX_ROUNDS_IN_VAIN  # the head went back, or came back with other content
        return 0 if (yield from self._is_kept(expected, deadline)) else 1

    def _verdict(self, error: errors.Error) -> errors.Error:
        if not isinstance(error, errors.SeqGap | errors.SessionNotFound | errors.EpochFenced):
            return error
        return errors.HistoryLost(
            "the store lost writes that this client's log does not hold any more "
            f"({error.message}); set_state(session.h) goes on from the last answered state",
            metadata=error.metadata,
        )

    # -- a round -----------------------------------------------------------------------------------

    def _send_again(self, deadline: float) -> Op[int]:
        """Send the journals once; return how many operations were applied anew."""
        applied, stuck = 0, set[str]()
        for entry in (yield from self._due(deadline)):
            if entry.session_id in stuck:
                continue  # its own later operations cannot do better
            try:
                answer = yield from self._caller.call(entry.rpc, entry.request, deadline)
            except _PASSED:
                continue
            except _LOSS:
                # What it waits for may stand later in the journal, by another session: next round.
                if entry.session_id:
                    stuck.add(entry.session_id)
                continue
            entry.confirm(answer)
            if entry.lifetime is not None and entry.rpc is not BACKWARD:
                entry.lifetime.renew()
                entry.lifetime.was_healed |= not answer.replayed
            applied += not answer.replayed
        return applied

    def _due(self, deadline: float) -> Op[list[Entry]]:
        """Return what may have been lost, without what must not be carried out a second time."""
        entries = [e for e in self.scope.entries() if e.lifetime is None or not e.lifetime.is_over]
        if not any(entry.rpc in (BACKWARD, UPDATE) for entry in entries):
            return entries
        request = model_pb.GetModelRequest(model_id=self.scope.model_id)
        answer = yield from self._caller.call(GET_MODEL, request, deadline)
        head = version_from_proto(answer.model.head)
        steps = [entry for entry in entries if entry.rpc is UPDATE]
        again = _steps_to_make(steps, head)
        taken = {name for entry in steps for name in entry.names()}
        due = {name for entry in again for name in entry.names()}

        def is_due(entry: Entry) -> bool:
            if entry.rpc is UPDATE:
                return entry in again
            if entry.rpc is BACKWARD and taken.isdisjoint(entry.names()):
                is_young = entry.tape is not None and not entry.tape.is_over
                return is_young or head.number <= entry.head  # remembered, or not taken by any step
            return entry.rpc is not BACKWARD or not due.isdisjoint(entry.names())

        return [entry for entry in entries if is_due(entry)]

    def _is_kept(self, version: Version, deadline: float) -> Op[bool]:
        """Return whether the model has a version with the content that we know; False if unknown."""
        request = model_pb.FindVersionsRequest(
            model_id=self.scope.model_id, numbers=[version.number]
        )
        try:
            answer = yield from self._caller.call(FIND_VERSIONS, request, deadline)
        except errors.Unimplemented:  # an older replica
            return False
        return any(version_from_proto(found) == version for found in answer.versions)


def _steps_to_make(steps: list[Entry], head: Version) -> set[Entry]:
    """Return the steps that the model has lost and that can be made again from its head.

    The gradients of any other step must not be sent: either it stands, and they would be recorded
    twice; or it cannot be made, and they would wait for whoever updates next.
    """
    there, lost = {head}, set()
    for step in steps:
        expected = _expected(step.request)
        if step.expected.number > head.number and (expected is None or expected in there):
            there.add(step.expected)
            lost.add(step)
    return lost


def _expected(request: Any) -> Version | None:
    """Return the head that a step expects, by itself or inside a Backward."""
    step = request.update if isinstance(request, rnn_pb.BackwardRequest) else request
    if isinstance(step, rnn_pb.UpdateRequest) and step.HasField("expected_version"):
        return version_from_proto(step.expected_version)
    return None
