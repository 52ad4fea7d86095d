"""The log of answered operations, and the healing of a store that lost them.

After a failover the store may have lost writes that were acknowledged, in one hash slot and not in
another. Each operation is a function of its content, its numbers and the weights version it used,
and each one is guarded by them on the server. So sending the log again is always safe: what is
there answers `replayed`, what was lost is applied again and becomes what it was, and what another
writer has put in its place answers otherwise, which is raised and never mixed in.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from timernn import errors
from timernn._core.contract import BACKWARD, FORWARD, OPEN_SESSION, UPDATE
from timernn._core.effects import Sleep
from timernn.types import Version
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from collections.abc import Callable, Container

    from timernn._core.contract import Rpc
    from timernn._core.effects import Op
    from timernn._core.retry import Caller
    from timernn.v1 import session_service_pb2 as session_pb

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
_ENTRY_OVERHEAD_BYTES = 1024  # of the objects around the tensors


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One answered operation, ready to be sent again.

    Attributes:
        session_id: Whose it is; empty for an Update, which may join several.
        rpc: The method.
        request: The same numbers and content as the first time; a Forward pins the version that
            its answer named.
        told: What the first answer said and a later one must say again.
        read: Takes the same out of an answer.
        size: Bytes held, about.
    """

    session_id: str
    rpc: Rpc[Any, Any]
    request: Any
    told: object
    read: Callable[[Any], object]
    size: int

    def confirm(self, answer: Any) -> None:
        """Compare a later answer with the first one."""
        if self.read(answer) != self.told:
            raise errors.HistoryForked(
                f"{self.rpc.path} was answered otherwise before: another writer used a time in "
                "which the store had lost writes",
                metadata={"session_id": self.session_id},
            )


def begin_entry(request: session_pb.OpenSessionRequest) -> Entry:
    """Log the beginning of an epoch as an OpenSession that restores it."""
    size = len(request.initial_state.data) + _ENTRY_OVERHEAD_BYTES
    return Entry(
        session_id=request.session_id,
        rpc=OPEN_SESSION,
        request=request,
        told=request.restored_epoch,
        read=lambda answer: answer.session.epoch,
        size=size,
    )


def forward_entry(request: rnn_pb.ForwardRequest, answer: rnn_pb.ForwardResponse) -> Entry:
    """Log a Forward; from now on it asks for the version that its answer named."""
    request.ClearField("minimum_version")
    request.pinned_version.CopyFrom(answer.weights_version)
    request.return_hs = rnn_pb.RETURN_HS_NONE
    # The states before it must be there again after it was healed.
    request.acknowledged_seq = 0
    return Entry(
        session_id=request.session_id,
        rpc=FORWARD,
        request=request,
        told=answer.state_token,
        read=lambda again: again.state_token,
        size=len(request.xs.data) + _ENTRY_OVERHEAD_BYTES,
    )


def backward_entry(request: rnn_pb.BackwardRequest) -> Entry:
    """Log a Backward, of which only the contribution is wanted again."""
    request.ClearField("update")
    request.return_dxs = request.return_gradients = False
    # Its epoch may have ended since; its contribution may still be due.
    request.resent = True
    size = len(request.dhs.data) + len(request.dh_next.data) + _ENTRY_OVERHEAD_BYTES
    return Entry(
        session_id=request.session_id,
        rpc=BACKWARD,
        request=request,
        told=request.chunk_seq,
        read=lambda again: again.chunk_seq,
        size=size,
    )


def update_entry(request: rnn_pb.UpdateRequest, answer: rnn_pb.UpdateResponse) -> Entry:
    """Log an Update that named its contributions and its head."""
    return Entry(
        session_id="",
        rpc=UPDATE,
        request=request,
        told=Version(answer.version.number, answer.version.digest),
        read=lambda again: Version(again.version.number, again.version.digest),
        size=request.ByteSize() + _ENTRY_OVERHEAD_BYTES,
    )


class Journal:
    """The last answered operations, in the order of their answers. Made by a `Shelf`.

    Args:
        shelf: Bounds all journals of a client together.
        max_entries: Kept for each session that writes here.
        max_bytes: Kept altogether.
    """

    def __init__(self, shelf: Shelf, max_entries: int, max_bytes: int) -> None:
        self._shelf, self._max_entries, self._max_bytes = shelf, max_entries, max_bytes
        self._entries: deque[Entry] = deque()
        self.bytes = 0
        self.writer_count = 1

    def append(self, entry: Entry) -> None:
        """Add an entry and let the oldest go where the bounds ask for it."""
        with self._shelf.lock:
            self._entries.append(entry)
            self.bytes += entry.size
            most = self._max_entries * max(1, self.writer_count)
            while self._entries and (len(self._entries) > most or self.bytes > self._max_bytes):
                self.drop_oldest()
            self._shelf.note(self)

    def drop_oldest(self) -> None:
        """Let the oldest entry go."""
        self.bytes -= self._entries.popleft().size

    def drop_contributions(self, session_id: str, named: Container[tuple[int, int]]) -> None:
        """Take out the Backwards of these (epoch, chunk_seq): they were discarded."""
        with self._shelf.lock:
            kept = [
                entry
                for entry in self._entries
                if entry.rpc is not BACKWARD
                or entry.session_id != session_id
                or (entry.request.epoch, entry.request.chunk_seq) not in named
            ]
            self._entries = deque(kept)
            self.bytes = sum(entry.size for entry in kept)
            self._shelf.note(self)

    def entries(self) -> list[Entry]:
        """Return the entries as they are now."""
        return list(self._entries)


class Shelf:
    """All journals of one client, bounded together: those written longest ago give way.

    A gateway of many sessions would else hold as many full logs.

    Args:
        max_bytes: Kept in all journals together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.lock = threading.RLock()
        self._max_bytes = max_bytes
        self._bytes = 0
        # By the time of their last entry; weak, so that a session that is let go takes its log along.
        self._journals: dict[int, weakref.ref[Journal]] = {}
        self._sizes: dict[int, int] = {}

    def new_journal(self, max_entries: int, max_bytes: int) -> Journal:
        """Make a journal of this client."""
        journal = Journal(self, max_entries, max_bytes)
        weakref.finalize(journal, self._forget, id(journal)).atexit = False
        return journal

    def note(self, journal: Journal) -> None:
        """Take over a journal's size; let old entries go where all together are too large."""
        self._forget(id(journal))
        self._journals[id(journal)] = weakref.ref(journal)
        self._count(journal)
        while self._bytes > self._max_bytes and self._journals:
            oldest = next(iter(self._journals.values()))()
            if oldest is None or not oldest.bytes:
                self._forget(next(iter(self._journals)))
                continue
            oldest.drop_oldest()
            self._count(oldest)

    def _count(self, journal: Journal) -> None:
        key = id(journal)
        self._bytes += journal.bytes - self._sizes.get(key, 0)
        self._sizes[key] = journal.bytes

    def _forget(self, key: int) -> None:
        with self.lock:
            self._journals.pop(key, None)
            self._bytes -= self._sizes.pop(key, 0)


@dataclass(frozen=True, slots=True)
class Scope:
    """What an operation depends on.

    Attributes:
        model_id: The model.
        journals: What to send again when something of it was lost, in this order.
        epoch: The session's epoch; 0 if it is no session's operation.
    """

    model_id: str
    journals: tuple[Journal, ...]
    epoch: int = 0


class Healing:
    """What one operation does about signs of lost writes: the memory of a healing loop."""

    def __init__(self, caller: Caller, scope: Scope) -> None:
        self._caller, self._journals, self._epoch = caller, scope.journals, scope.epoch
        self._rounds = 0
        self._rounds_in_vain = 0

    def after(self, error: errors.Error, deadline: float) -> Op[None]:
        """Heal what the error is a sign of, or raise it.

        Raises:
            HistoryForked: If another writer used the gap.
            HistoryLost: If the log begins after what was lost.
            Error: The given one, if it is no sign of loss or if healing changes nothing about it.
        """
        if not self._is_loss(error):
            raise error
        applied = yield from self._send_again(deadline)
        self._rounds += 1
        self._rounds_in_vain = 0 if applied else self._rounds_in_vain + 1
        if self._rounds_in_vain >= _MAX_ROUNDS_IN_VAIN or self._rounds >= _MAX_ROUNDS:
            raise self._verdict(error) from error
        if not applied:
            yield Sleep(_PAUSE_S)

    def _is_loss(self, error: errors.Error) -> bool:
        if isinstance(error, errors.EpochFenced):  # the store is at an epoch before ours
            stored = error.metadata.get("epoch", "")
            return stored.isdecimal() and int(stored) < self._epoch
        return isinstance(error, _LOSS)

    def _send_again(self, deadline: float) -> Op[int]:
        """Send the logs once; return how many operations were applied anew."""
        applied, stuck = 0, set[str]()
        for entry in [entry for journal in self._journals for entry in journal.entries()]:
            if entry.session_id in stuck:
                continue  # its own later operations cannot do better
            try:
                answer = yield from self._caller.call(entry.rpc, entry.request, deadline)
            except _PASSED:
                continue
            except _LOSS:
                # What it waits for may stand later in the log, by another session: next round.
                if entry.session_id:
                    stuck.add(entry.session_id)
                continue
            entry.confirm(answer)
            applied += not answer.replayed
        return applied

    def _verdict(self, error: errors.Error) -> errors.Error:
        if not isinstance(error, errors.SeqGap):
            return error
        return errors.HistoryLost(
            "the store lost writes from before this client's log begins "
            f"({error.message}); set_state(session.h) goes on from the last answered state",
            metadata=error.metadata,
        )
