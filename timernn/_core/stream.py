"""Chunks of one session, pipelined over a bidirectional call."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, TypeAlias

from timernn import errors
from timernn._core.contract import STREAM
from timernn._core.effects import (
    END,
    NOT_YET,
    OpenStream,
    Pull,
    Read,
    Write,
)
from timernn._core.intents import ForwardIntent, Intent
from timernn._core.journal import Healing
from timernn._core.refusals import leaves_in_doubt
from timernn._core.retry import Patience, is_worth_retrying
from timernn._core.status import error_from_status
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from collections.abc import Iterator

    from timernn._core.client import ClientCore
    from timernn._core.effects import (
        Mark,
        Op,
        StreamHandle,
    )
    from timernn._core.session import SessionCore
    from timernn.types import Array, ReturnHs

# A stream is left for a new one after this time at the latest, so that a replica that hangs is
# noticed without a watcher for each stream: reopening costs one round trip.
LIFE_S = 60.0
Chunk: TypeAlias = "tuple[ForwardIntent, rnn_pb.ForwardRequest]"


class StreamCore:
    """What one `stream()` has sent, has still to send and waits for.

    Args:
        client: Whose addresses and patience it uses.
        session: Whose chunks; its other operations are refused meanwhile.
        source: Where the faces pull the caller's chunks from.
        in_flight: Chunks sent and not answered, at most.
        return_hs: What each chunk returns.
    """

    def __init__(
        self,
        client: ClientCore,
        session: SessionCore,
        source: Any,
        in_flight: int,
        return_hs: ReturnHs,
    ) -> None:
        self._client, self._session, self._source = client, session, source
        self._in_flight = max(1, min(in_flight, session.bounds.replay_window))
        self._return_hs = return_hs
        self._intents: deque[ForwardIntent] = deque()
        self._sent: deque[Chunk] = deque()
        self._to_send: deque[Chunk] = deque()
        self._handle: StreamHandle | None = None
        self._address = 0
        self._fresh_until = 0.0
        self._doubtful_seq = 0  # the last chunk that was sent on a stream which broke
        self._refused: errors.Error | None = None
        self._is_exhausted = False
        self._renew_memory()

    def open(self) -> Op[None]:
        """Take the session over."""
        self._session.require_idle()
        yield from self._session.settle()
        self._session.is_streaming = True
        self._renew_memory()

    def step(self) -> Op[Array | Mark[Any]]:
        """Return the hidden states of the next chunk, or END."""
        while True:
            if self._intents and self._intents[0].is_done:
                return self._intents.popleft().hs()
            yield from self._pull()
            if not self._intents:
                if self._refused is not None:
                    raise self._refused
                return END
            try:
                yield from self._exchange()
            except errors.Error as error:
                yield from self._recover(error)

    def close(self) -> None:
        """Leave the stream; what was sent and is not answered is in doubt from now on."""
        self._leave()
        session = self._session
        if session.is_streaming:
            session.is_streaming = False
            session.doubt = UnansweredChunks.of(self._intents)

    def _pull(self) -> Op[None]:
        """Take chunks of the caller while there is room for them; wait only with nothing to do."""
        while not self._is_exhausted and len(self._sent) + len(self._to_send) < self._in_flight:
            item = yield Pull(self._source, block=not self._intents)
            if item is NOT_YET:
                return
            if item is END:
                self._is_exhausted = True
                return
            try:
                intent = self._session.forward_intent(item, self._return_hs, train=False)
            except errors.Error as error:
                # Told in its turn: the chunks before it are answered first.
                self._refused, self._is_exhausted = error, True
                return
            self._intents.append(intent)
            self._to_send.extend((intent, request) for request in intent.requests)

    def _exchange(self) -> Op[None]:
        """Send what may be sent, take what comes next."""
        caller = self._client.caller
        is_old = caller.clock() > self._fresh_until
        if is_old and not self._sent:
            self._leave()
        if self._handle is None:
            self._address, is_old = caller.address, False
            self._fresh_until = caller.clock() + LIFE_S / 2
            self._handle = yield OpenStream(STREAM, self._address, LIFE_S)
        while self._to_send and len(self._sent) < self._in_flight and not is_old:
            chunk = self._to_send[0]
            self._number(chunk[1])
            yield Write(self._handle, _message(chunk[1]))
            self._sent.append(self._to_send.popleft())
        answer: rnn_pb.StreamResponse | None = yield Read(self._handle)
        if answer is None:
            raise errors.Unavailable("the server ended the stream")
        for result in answer.results:
            self._take(result)
        if answer.draining:
            raise errors.Draining("the server is about to stop")

    def _number(self, request: rnn_pb.ForwardRequest) -> None:
        is_again = bool(request.chunk_seq)
        if not is_again:
            self._session.number(request, ahead=len(self._sent))
        elif not self._sent:
            request.previous_token = self._session.state_token
        else:
            request.previous_token = b""

    def _take(self, result: rnn_pb.OperationResult) -> None:
        if result.HasField("error"):
            raise error_from_status(result.error)
        intent, request = self._sent[0]
        if result.forward.chunk_seq != request.chunk_seq:
            raise errors.Internal(
                f"expected the answer of chunk {request.chunk_seq}, "
                f"got that of {result.forward.chunk_seq}"
            )
        self._sent.popleft()
        # A chunk in flight named no token; in the log it names the one it followed.
        request.previous_token = self._session.state_token
        intent.accept(result.forward)
        self._renew_memory()

    def _recover(self, error: errors.Error) -> Op[None]:
        """Make ready to send the unanswered chunks again, or raise what will not get better."""
        self._leave()
        last_sent = self._sent[-1][1].chunk_seq if self._sent else 0
        self._to_send.extendleft(reversed(self._sent))
        self._sent.clear()
        if is_worth_retrying(error):
            self._doubtful_seq = max(self._doubtful_seq, last_sent)
            yield from self._patience.after(error, self._address)
            return
        try:
            yield from self._client.heal(
                self._healing, error, self._session.scope(), self._client.caller.deadline()
            )
        except errors.Error as final:
            if not leaves_in_doubt(final, before=self._doubtful_seq > self._session.chunk_seq):
                # Refused, and the chunks behind it with it: nothing is in doubt.
                self._intents.clear()
            raise

    def _renew_memory(self) -> None:
        self._patience = Patience(self._client.caller)
        self._healing = Healing(self._client.caller, self._session.scope())

    def _leave(self) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None


class UnansweredChunks(Intent[rnn_pb.ForwardRequest]):
    """Chunks that a stream left unanswered, as an intent that nobody waits for."""

    rpc = ForwardIntent.rpc

    def __init__(self, intents: list[ForwardIntent]) -> None:
        super().__init__([request for intent in intents for request in intent.requests])
        self._intents = intents
        self.done = sum(intent.done for intent in intents)

    @classmethod
    def of(cls, intents: Iterator[ForwardIntent] | deque[ForwardIntent]) -> UnansweredChunks | None:
        """Collect the chunks of which a part was sent; the others never left the client."""
        begun = [i for i in intents if not i.is_done and any(r.chunk_seq for r in i.requests)]
        return cls(begun) if begun else None

    def prepare(self) -> rnn_pb.ForwardRequest:
        """Number the next chunk, or let it keep its number, and name what it follows."""
        return self._next().prepare()

    def accept(self, answer: rnn_pb.ForwardResponse) -> None:
        """Advance the session; the outputs are dropped."""
        self._next().accept(answer)
        self.done += 1

    def is_same(self, other: Intent[Any]) -> bool:
        """Tell no: nobody can ask for these again, the loop that wanted them has ended."""
        del other
        return False

    def _next(self) -> ForwardIntent:
        return next(intent for intent in self._intents if not intent.is_done)


def _message(request: rnn_pb.ForwardRequest) -> rnn_pb.StreamRequest:
    operation = rnn_pb.Operation(tag=request.chunk_seq, forward=request)
    return rnn_pb.StreamRequest(operations=[operation])
