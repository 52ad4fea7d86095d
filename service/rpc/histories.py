"""The tokens that one stream has answered for each session, to fill in an empty previous_token.

A chunk that is sent before the previous one is answered cannot carry that answer's token. The stream
fills it in when the chunk's turn comes. If the previous chunk has failed, or is missing, there is no such
token. Without it the chunk could be applied to the history of another writer, so it is answered SEQ_GAP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from service.domain.errors import Aborted
from service.domain.types import NO_TOKEN

if TYPE_CHECKING:
    from collections.abc import Container

    from service.domain.types import ForwardResult

MAX_SESSIONS: Final = 16_384
"""Sessions remembered per stream; beyond it, the one answered longest ago is forgotten."""


class _History:
    """The last answers of one epoch."""

    __slots__ = ("epoch", "newest", "next_seq", "tokens")

    def __init__(self, epoch: int, next_seq: int) -> None:
        self.epoch = epoch
        self.next_seq = next_seq  # the highest chunk that needs no token of its own
        self.newest = NO_TOKEN
        self.tokens: dict[int, bytes] = {}


class Histories:
    """Remembers the tokens of a stream's answers.

    Args:
        depth: Answers remembered per session: the replay window and one more, so that for every chunk
            that can be replayed the token before it is known.
        busy: The sessions with operations that run or wait; they are never forgotten.
        max_sessions: Sessions remembered.
    """

    __slots__ = ("_busy", "_by_session", "_depth", "_max_sessions")

    def __init__(self, depth: int, busy: Container[str], max_sessions: int = MAX_SESSIONS) -> None:
        self._depth = depth
        self._busy = busy
        self._max_sessions = max_sessions
        self._by_session: dict[str, _History] = {}

    def previous_token(self, session_id: str, epoch: int, chunk_seq: int) -> bytes:
        """Return the token of the chunk before; empty when the stream knows nothing of the epoch.

        Raises:
            Aborted: SEQ_GAP when this stream has not answered the chunk before.
        """
        history = self._by_session.get(session_id)
        if history is None or history.epoch != epoch:
            return NO_TOKEN
        if chunk_seq > history.next_seq:
            raise Aborted(
                "SEQ_GAP",
                f"chunk {chunk_seq} follows one that this stream has not answered: "
                f"send from chunk {history.next_seq}",
                expected_seq=history.next_seq,
                epoch=epoch,
            )
        return history.tokens.get(chunk_seq - 1, history.newest)

    def answered(self, result: ForwardResult) -> None:
        """Remember the answer to a chunk of a session."""
        session_id, epoch, chunk_seq = result.session_id, result.epoch, result.chunk_seq
        history = self._by_session.pop(session_id, None)
        if history is None or history.epoch != epoch:
            history = _History(epoch, chunk_seq + 1)
        history.newest = history.tokens[chunk_seq] = result.token
        if chunk_seq >= history.next_seq:
            history.next_seq = chunk_seq + 1
        if len(history.tokens) > self._depth:
            del history.tokens[next(iter(history.tokens))]
        self._keep(session_id, history)

    def failed(self, session_id: str, epoch: int, chunk_seq: int) -> None:
        """Remember that a chunk was refused, if nothing of its epoch is known yet."""
        history = self._by_session.get(session_id)
        if history is None or history.epoch != epoch:
            self._keep(session_id, _History(epoch, chunk_seq))

    def _keep(self, session_id: str, history: _History) -> None:
        by_session = self._by_session
        by_session[session_id] = history
        while len(by_session) > self._max_sessions:
            oldest = next(iter(by_session))
            forgotten = by_session.pop(oldest)
            if oldest in self._busy:
                by_session[oldest] = forgotten
                break
