"""What one session does when asked one thing at a time: the promise, without the machinery.

A history starts with the session open at a known epoch and ends before it expires. Records that
nobody has seen yet (the answer was lost) are None and are learned from the first answer that shows
them; from then on they must stay the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from instruments.history import Refused

_GONE = ("SESSION_CLOSED", "SESSION_NOT_FOUND")
_MAX_RESENT_RESTARTS = 3


@dataclass(frozen=True, slots=True)
class Forward:
    """Send a chunk.

    Attributes:
        epoch: Epoch that the client knows.
        seq: Number of the chunk.
        digest: Fingerprint of its content.
        previous: Token of the answer before it; None is unchecked.
        acknowledged: Highest chunk whose answer the client has; states below may go.
        resent: Whether the caller resends by itself, so that the answer may replay its own work.
    """

    epoch: int
    seq: int
    digest: str
    previous: str | None = None
    acknowledged: int = 0
    resent: bool = False


@dataclass(frozen=True, slots=True)
class Restart:
    """Reset the session, or set its state to the one with the fingerprint `h`."""

    h: str | None = None
    resent: bool = False


@dataclass(frozen=True, slots=True)
class Close:
    """Close the session, again and again if need be."""


@dataclass(frozen=True, slots=True)
class ReadSession:
    """Read where the session is."""


@dataclass(frozen=True, slots=True)
class Applied:
    """The chunk is part of the session: its token and the fingerprint of `h` after it."""

    token: str
    h: str
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class Restarted:
    """A new epoch has begun."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Closed:
    """The session is closed."""


@dataclass(frozen=True, slots=True)
class SessionAt:
    """Where the session is; a token or fingerprint of None was not asked for."""

    epoch: int
    seq: int
    token: str | None = None
    h: str | None = None


SessionAsk = Forward | Restart | Close | ReadSession
SessionAnswer = Applied | Restarted | Closed | SessionAt | Refused


@dataclass(frozen=True, slots=True)
class Chunk:
    """One record of the session; chunk 0 stands for the state before the first."""

    seq: int
    digest: str
    token: str | None
    h: str | None

    def learn(self, token: str | None, h: str | None = None) -> "Chunk | None":
        """Return the record with what was seen of it; None where that contradicts."""
        for known, seen in ((self.token, token), (self.h, h)):
            if None not in (known, seen) and known != seen:
                return None
        return replace(self, token=self.token or token, h=self.h or h)


@dataclass(frozen=True, slots=True)
class SessionState:
    """A session: `chunks` are the last records, oldest first, never empty."""

    epoch: int
    chunks: tuple[Chunk, ...] = (Chunk(0, "", None, None),)
    acknowledged: int = 0
    is_closed: bool = False

    @property
    def last(self) -> Chunk:
        """The newest chunk in the record."""
        return self.chunks[-1]

    def find(self, seq: int) -> Chunk | None:
        """Return the record of chunk `seq` while it is kept."""
        return next((chunk for chunk in self.chunks if chunk.seq == seq), None)

    def put(self, *records: Chunk) -> "SessionState":
        """Return the state with records replaced or added."""
        kept = {chunk.seq: chunk for chunk in (*self.chunks, *records)}
        return replace(self, chunks=tuple(kept[seq] for seq in sorted(kept)))


class SessionModel:
    """Exactly once and in order, for one session."""

    def __init__(self, *, epoch: int, window: int = 4) -> None:
        """Start with an open session.

        Args:
            epoch: Its epoch.
            window: How many chunks back a re-sent one is answered again.
        """
        self._start = SessionState(epoch)
        self._window = window

    def initial(self) -> SessionState:
        """Return the session as it was opened."""
        return self._start

    def step(
        self, state: SessionState, ask: SessionAsk, answer: SessionAnswer | None
    ) -> Iterator[SessionState]:
        """Yield the states after `ask` was answered `answer`."""
        if isinstance(ask, Close):
            if answer is None or isinstance(answer, Closed):
                yield replace(state, is_closed=True)
        elif state.is_closed:
            yield from _refused(state, answer, *_GONE)
        elif isinstance(ask, Forward):
            yield from self._forward(state, ask, answer)
        elif isinstance(ask, Restart):
            yield from _restart(state, ask, answer)
        elif answer is None:
            yield state
        elif isinstance(answer, SessionAt) and (answer.epoch, answer.seq) == (
            state.epoch,
            state.last.seq,
        ):
            seen = state.last.learn(answer.token, answer.h)
            if seen is not None:
                yield state.put(seen)

    def _forward(
        self, state: SessionState, ask: Forward, answer: SessionAnswer | None
    ) -> Iterator[SessionState]:
        following = state.last.seq + 1
        state = replace(state, acknowledged=max(state.acknowledged, ask.acknowledged))
        if ask.epoch != state.epoch:
            yield from _refused(state, answer, "EPOCH_FENCED")
        elif ask.seq > following:
            yield from _refused(state, answer, "SEQ_GAP", expected_seq=following)
        elif ask.seq == following:
            yield from self._apply(state, ask, answer)
        else:
            yield from _replay(state, ask, answer)

    def _apply(
        self, state: SessionState, ask: Forward, answer: SessionAnswer | None
    ) -> Iterator[SessionState]:
        """Take the next chunk, if it follows the record that its sender means."""
        if ask.previous not in (None, state.last.token):
            yield from _refused(state, answer, "HISTORY_FORKED")
        base = state.last.learn(ask.previous)
        is_possible = isinstance(answer, Applied) and (ask.resent or not answer.replayed)
        if base is not None and (answer is None or is_possible):
            token, h = (answer.token, answer.h) if isinstance(answer, Applied) else (None, None)
            after = state.put(base, Chunk(ask.seq, ask.digest, token, h))
            yield replace(after, chunks=after.chunks[-self._window - 1 :])


def _replay(
    state: SessionState, ask: Forward, answer: SessionAnswer | None
) -> Iterator[SessionState]:
    """Answer a chunk that is there already, if it is the same and not too old."""
    stored, before = state.find(ask.seq), state.find(ask.seq - 1)
    if stored is None or stored.digest != ask.digest:
        yield from _refused(state, answer, "SEQ_REUSED")
    if before is None or before.seq < state.acknowledged:
        yield from _refused(state, answer, "REPLAY_WINDOW_PASSED")
    if stored is None or before is None:
        return
    if ask.previous not in (None, before.token):
        yield from _refused(state, answer, "HISTORY_FORKED")
    base = before.learn(ask.previous)
    if stored.digest != ask.digest or base is None:
        return
    if answer is None:
        yield state
    elif isinstance(answer, Applied) and answer.replayed:
        seen = stored.learn(answer.token, answer.h)
        if seen is not None:
            yield state.put(base, seen)


def _restart(
    state: SessionState, ask: Restart, answer: SessionAnswer | None
) -> Iterator[SessionState]:
    """Begin a new epoch: the next one, or a later one if the caller had to resend."""
    last = state.epoch + (_MAX_RESENT_RESTARTS if ask.resent else 1)
    for epoch in range(state.epoch + 1, last + 1):
        if answer is None or answer == Restarted(epoch):
            yield SessionState(epoch, (Chunk(0, "", None, ask.h),))


def _refused(
    state: SessionState,
    answer: SessionAnswer | None,
    *reasons: str,
    expected_seq: int | None = None,
) -> Iterator[SessionState]:
    """Yield the unchanged state where the answer is one of these refusals, or unseen."""
    is_possible = (
        isinstance(answer, Refused)
        and answer.reason in reasons
        and (expected_seq is None or answer.expected_seq == expected_seq)
    )
    if answer is None or is_possible:
        yield state
