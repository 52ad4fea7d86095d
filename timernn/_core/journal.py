"""The journal of answered operations, from which a store that lost them is healed."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeAlias

from timernn import errors
from timernn._core.contract import BACKWARD, FORWARD, OPEN_SESSION, UPDATE
from timernn.types import Version
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from collections.abc import Callable, Container

    from timernn._core.ages import Lifetime
    from timernn._core.contract import Rpc
    from timernn.v1 import session_service_pb2 as session_pb

Name: TypeAlias = tuple[str, int, int]
"""A contribution: session_id, epoch, chunk_seq."""

_ENTRY_OVERHEAD_BYTES = 1024  # of the objects around the tensors


@dataclass(slots=True, eq=False)  # not frozen: that costs a call a field, for every answer
class Entry:
    """One answered operation, ready to be sent again.

    Attributes:
        session_id: The id of the session; empty for an Update, which may join several.
        rpc: The method.
        request: The same numbers and content as the first time; a Forward pins the version that
            its answer named.
        expected: What the first answer said and a later one must say again.
        read: Takes the same out of an answer.
        size: The approximate bytes that the entry holds.
        lifetime: The lifetime of the session, one object in all its entries; None for an Update.
        tape: The lifetime of a Backward's tape. While it lasts the server surely remembers whether
            the contribution was recorded; later, a tape that healing has made again would let it be
            recorded once more.
        head: Of a Backward, the highest version known when it was answered. A step that takes its
            contribution makes a higher one.
    """

    session_id: str
    rpc: Rpc[Any, Any]
    request: Any
    expected: Any
    read: Callable[[Any], object]
    size: int
    lifetime: Lifetime | None = None
    tape: Lifetime | None = None
    head: int = 0

    def names(self) -> list[Name]:
        """Name the contributions that a Backward makes or an Update takes."""
        asked = self.request
        if self.rpc is BACKWARD:
            return [(asked.session_id, asked.epoch, asked.chunk_seq)]
        if self.rpc is UPDATE:
            return [(c.session_id, c.epoch, k) for c in asked.contributions for k in c.chunk_seqs]
        return []

    def confirm(self, answer: Any) -> None:
        """Compare a later answer with the first one."""
        if self.read(answer) != self.expected:
            raise errors.HistoryForked(
                f"{self.rpc.path} was answered otherwise before: another writer used a time in "
                "which the store had lost writes",
                metadata={"session_id": self.session_id},
            )


def begin_entry(request: session_pb.OpenSessionRequest, lifetime: Lifetime) -> Entry:
    """Log the beginning of an epoch as an OpenSession that restores it."""
    size = len(request.initial_state.data) + _ENTRY_OVERHEAD_BYTES
    return Entry(
        session_id=request.session_id,
        rpc=OPEN_SESSION,
        request=request,
        expected=request.restored_epoch,
        read=lambda answer: answer.session.epoch,
        size=size,
        lifetime=lifetime,
    )


def forward_entry(
    request: rnn_pb.ForwardRequest, answer: rnn_pb.ForwardResponse, lifetime: Lifetime
) -> Entry:
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
        expected=answer.state_token,
        read=lambda again: again.state_token,
        size=len(request.xs.data) + _ENTRY_OVERHEAD_BYTES,
        lifetime=lifetime,
    )


def backward_entry(
    request: rnn_pb.BackwardRequest, lifetime: Lifetime, *, tape: Lifetime, head: int
) -> Entry:
    """Log a Backward, of which only the contribution is wanted again.

    Args:
        request: As it was answered.
        lifetime: The lifetime of the session.
        tape: The lifetime of the Backward's tape.
        head: The highest version that is known.
    """
    request.ClearField("update")
    request.return_dxs = request.return_gradients = False
    # Its epoch may have ended since; its contribution may still be due.
    request.resent = True
    size = len(request.dhs.data) + len(request.dh_next.data) + _ENTRY_OVERHEAD_BYTES
    return Entry(
        session_id=request.session_id,
        rpc=BACKWARD,
        request=request,
        expected=request.chunk_seq,
        read=lambda again: again.chunk_seq,
        size=size,
        lifetime=lifetime,
        tape=tape,
        head=head,
    )


def update_entry(request: rnn_pb.UpdateRequest, answer: rnn_pb.UpdateResponse) -> Entry:
    """Log an Update that named its contributions and its head."""
    return Entry(
        session_id="",
        rpc=UPDATE,
        request=request,
        expected=Version(answer.version.number, answer.version.digest),
        read=lambda again: Version(again.version.number, again.version.digest),
        size=request.ByteSize() + _ENTRY_OVERHEAD_BYTES,
    )


class Journal:
    """The last answered operations, in the order of their answers. Made by a `LogBudget`.

    Args:
        budget: Bounds all journals of a client together.
        max_entries: Kept for each session that writes here.
        max_bytes: Kept altogether.
    """

    def __init__(self, budget: LogBudget, *, max_entries: int, max_bytes: int) -> None:
        self._budget, self._max_entries, self._max_bytes = budget, max_entries, max_bytes
        # Each with the bytes of all up to it since the journal began: whenever an interrupt comes, the
        # entries and their size agree.
        self._entries: deque[tuple[Entry, int]] = deque()
        self._writers = 1

    @property
    def bytes(self) -> int:
        """The approximate bytes that the entries hold."""
        if not self._entries:
            return 0
        first, end = self._entries[0]
        return self._entries[-1][1] - end + first.size

    def share_between(self, sessions: int) -> None:
        """Keep as many entries for each of so many sessions."""
        self._writers = max(1, sessions)

    def append(self, entry: Entry) -> None:
        """Add an entry and let the oldest go where the bounds ask for it."""
        with self._budget.lock:
            end = self._entries[-1][1] if self._entries else 0
            self._entries.append((entry, end + entry.size))
            most = self._max_entries * self._writers
            while self._entries and (len(self._entries) > most or self.bytes > self._max_bytes):
                self.drop_oldest()
            self._budget.note(self)

    def drop_oldest(self) -> None:
        """Let the oldest entry go."""
        self._entries.popleft()

    def drop_contributions(self, session_id: str, named: Container[tuple[int, int]]) -> None:
        """Take out the Backwards of these (epoch, chunk_seq): they were discarded."""
        with self._budget.lock:
            kept = [
                entry
                for entry in self.entries()
                if entry.rpc is not BACKWARD
                or entry.session_id != session_id
                or (entry.request.epoch, entry.request.chunk_seq) not in named
            ]
            ends = accumulate(entry.size for entry in kept)
            self._entries = deque(zip(kept, ends, strict=True))
            self._budget.note(self)

    def entries(self) -> list[Entry]:
        """Return the entries as they are now."""
        return [entry for entry, _ in self._entries]


class LogBudget:
    """All journals of one client, bounded together: those written longest ago give way.

    A gateway of many sessions would else hold as many full journals.

    Args:
        max_bytes: Kept in all journals together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.lock = threading.RLock()
        self._max_bytes = max_bytes
        self._bytes = 0
        # By the time of their last entry; weak, so that a session that is let go takes its journal along.
        self._journals: dict[int, weakref.ref[Journal]] = {}
        self._sizes: dict[int, int] = {}
        self._is_counting = False  # still, when an interrupt has left the sum wrong

    def new_journal(self, max_entries: int, max_bytes: int) -> Journal:
        """Make a journal of this client."""
        journal = Journal(self, max_entries=max_entries, max_bytes=max_bytes)
        weakref.finalize(journal, self._forget, id(journal)).atexit = False
        return journal

    def note(self, journal: Journal) -> None:
        """Take over a journal's size; let old entries go where all together are too large."""
        if self._is_counting:
            self._count_anew()
        self._is_counting = True
        key = id(journal)
        if key != next(reversed(self._journals), None):  # else it is the newest already
            self._forget(key)
            self._journals[key] = weakref.ref(journal)
        self._count(journal)
        while self._bytes > self._max_bytes and self._journals:
            oldest = next(iter(self._journals.values()))()
            if oldest is None or not oldest.bytes:
                self._forget(next(iter(self._journals)))
                continue
            oldest.drop_oldest()
            self._count(oldest)
        self._is_counting = False

    def _count_anew(self) -> None:
        journals = ((key, kept()) for key, kept in list(self._journals.items()))
        self._sizes = {key: journal.bytes for key, journal in journals if journal is not None}
        self._bytes = sum(self._sizes.values())

    def _count(self, journal: Journal) -> None:
        key, size = id(journal), journal.bytes
        self._bytes += size - self._sizes.get(key, 0)
        self._sizes[key] = size

    def _forget(self, key: int) -> None:
        with self.lock:
            self._journals.pop(key, None)
            self._bytes -= self._sizes.pop(key, 0)
