"""Chunks of one session, pipelined over a bidirectional call."""

from __future__ import annotations

import weakref
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
from timernn._core.healing import Healing
from timernn._core.intents import ForwardIntent
from timernn._core.requests import forward_intent
from timernn._core.retry import STREAM_TIMEOUT_S, Attempt, Patience
from timernn._core.status import error_from_status
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from timernn._core.effects import (
        Mark,
        Op,
        StreamHandle,
    )
    from timernn._core.session import SessionCore
    from timernn.types import Array, ReturnHs

Chunk: TypeAlias = "tuple[ForwardIntent, rnn_pb.ForwardRequest]"


class StreamCore:
    """What one `stream()` has sent, has still to send and waits for.

    What is sent stands in the session's `doubts` from before it is sent until its output has been
    taken. So whatever ends the stream, the session knows what may be applied; and another stream
    that begins with the same chunks goes on with these.

    Args:
        session: The session whose chunks these are; its other operations are refused meanwhile.
        source: Where the frontends pull the caller's chunks from.
        in_flight: Chunks sent and not answered, at most.
        return_hs: What each chunk returns.
        train: Whether each chunk leaves a tape for `backward`.
    """

    def __init__(
        self,
        session: SessionCore,
        source: Any,
        *,
        in_flight: int,
        return_hs: ReturnHs,
        train: bool,
    ) -> None:
        self._session, self._source = session, source
        self._state, self._doubts = session.state, session.doubts
        self._caller = session.context.caller
        self._in_flight = max(1, min(in_flight, session.state.bounds.replay_window))
        self._return_hs, self._train = return_hs, train
        self._may_go_on = True  # with what is in doubt since before
        self._intents: deque[ForwardIntent] = deque()
        self._given: ForwardIntent | None = None  # its output was returned by the last step
        self._sent: deque[Chunk] = deque()
        self._to_send: deque[Chunk] = deque()
        self._handle: StreamHandle | None = None
        self._attempt = Attempt(0, 0)
        self._fresh_until = 0.0
        self._failure: errors.Error | None = None  # of the first chunk that has no answer
        self._refused: Exception | None = None  # instead of the chunk that comes next
        self._is_exhausted = False
        self._begin_waiting()

    def open(self) -> Op[None]:
        """Take the session over.

        Raises:
            SessionBusy: If another stream has it.
        """
        self._state.require_idle()
        deadline = self._caller.deadline()
        if any(not isinstance(doubt, ForwardIntent) for doubt in self._doubts):
            yield from self._doubts.settle(deadline)
        if self._session.updates.is_in_doubt:
            yield from self._session.updates.settle(deadline)
        self._state.occupy(weakref.ref(self))

    def step(self) -> Op[Array | Mark[Any]]:
        """Return the hidden states of the next chunk, or END."""
        self._forget_given()
        self._begin_waiting()
        while True:
            if self._intents and self._intents[0].is_done:
                self._given = self._intents[0]
                if self._given.is_wanted:
                    return self._output_of(self._given)
                self._forget_given()
            elif self._failure is not None:
                failure, self._failure = self._failure, None
                yield from self._recover(failure)
            else:
                yield from self._pull()
                if not self._intents:
                    if self._refused is not None:
                        raise self._refused
                    return END
                if not self._intents[0].is_done:  # else it was answered when an interrupt came
                    yield from self._exchange()

    def close(self, *, is_left: bool = False) -> None:
        """Leave the stream; what was sent and is not answered is in doubt from now on.

        Args:
            is_left: By a caller who wants no further output: asked for later, the same data are
                new chunks.
        """
        if self._state.is_used_by(self):
            if is_left:
                self._forget_given()
                for intent in self._intents:
                    intent.is_wanted = False
                self._doubts.drop_answered()
            self._state.vacate()
        self._leave()

    def _output_of(self, intent: ForwardIntent) -> Array:
        """Return an answered chunk's output; without one its error is all there is to give out."""
        try:
            return intent.hs()
        except errors.Error:
            self._forget_given()
            raise

    def _forget_given(self) -> None:
        """Forget a chunk whose output has been taken."""
        if self._given is not None:
            self._doubts.deliver_first()
            self._intents.popleft()
            self._given = None

    def _begin_waiting(self) -> None:
        """Begin with full patience: the caller begins to wait, or a chunk or an answer has come."""
        self._waiting_since = self._caller.clock()
        self._patience: Patience | None = None
        self._healing: Healing | None = None

    def _pull(self) -> Op[None]:
        """Take chunks of the caller while there is room for them; wait only with nothing to do."""
        while not self._is_exhausted and len(self._sent) + len(self._to_send) < self._in_flight:
            try:
                item = yield Pull(self._source, block=not self._intents)
            except Exception as error:  # noqa: BLE001  # the source's own
                self._refuse(error)
                return
            if item is NOT_YET:
                return
            self._begin_waiting()  # the time until now was the source's
            if item is END:
                self._is_exhausted = True
                return
            try:
                intent = forward_intent(self._state, item, self._return_hs, train=self._train)
            except errors.Error as error:
                ahead = len(self._sent) + len(self._to_send)
                self._refuse(error.at_chunk(self._state.chunk_seq + ahead + 1))
                return
            self._add(intent)

    def _refuse(self, error: Exception) -> None:
        """Take no more chunks; the error is raised in its turn, after the answers of those before."""
        self._refused, self._is_exhausted = error, True

    def _add(self, intent: ForwardIntent) -> None:
        """Queue a chunk, or what is in doubt since before if it is the same."""
        if self._may_go_on:
            position = len(self._intents)
            again = self._doubts.again(intent, position)
            if again is not None:
                self._queue(again)
                return
            self._may_go_on = False
            for earlier in self._doubts.unwanted_from(position):  # other chunks follow
                if isinstance(earlier, ForwardIntent):
                    self._queue(earlier)
        self._queue(intent)

    def _queue(self, intent: ForwardIntent) -> None:
        self._intents.append(intent)
        self._to_send.extend((intent, request) for request in intent.requests[intent.done :])

    def _exchange(self) -> Op[None]:
        """Send what may be sent, take what comes next; a failure is kept until it has its turn."""
        try:
            answer = yield from self._converse()
            for result in answer.results:
                self._take(result)
            if answer.draining:
                raise errors.Draining("the server is about to stop")
        except errors.Error as error:
            self._leave()
            self._failure = error

    def _converse(self) -> Op[rnn_pb.StreamResponse]:
        caller = self._caller
        is_old = caller.clock() > self._fresh_until
        if is_old and not self._sent:
            self._leave()
        if self._handle is None:
            self._attempt, is_old = (yield from caller.begin()), False
            # Half of its time is kept for the answers of what is sent at the last moment.
            open_s = min(STREAM_TIMEOUT_S, caller.timeout_s)
            self._fresh_until = caller.clock() + open_s / 2
            self._handle = yield OpenStream(STREAM, self._attempt.address, open_s)
        while self._to_send and len(self._sent) < self._in_flight and not is_old:
            intent, request = self._to_send[0]
            self._doubts.keep(intent)
            self._number(request)
            yield Write(self._handle, _message(request))
            self._sent.append(self._to_send.popleft())
        answer: rnn_pb.StreamResponse | None = yield Read(self._handle)
        if answer is None:
            raise errors.Unavailable("the server ended the stream")
        return answer

    def _number(self, request: rnn_pb.ForwardRequest) -> None:
        is_again = bool(request.chunk_seq)
        if not is_again:
            self._state.number(request, ahead=len(self._sent))
        elif not self._sent:
            request.previous_token = self._state.state_token
        else:
            request.previous_token = b""

    def _take(self, result: rnn_pb.OperationResult) -> None:
        if result.HasField("error"):
            raise error_from_status(result.error)
        intent, request = self._sent[0]
        # A chunk in flight named no token; in the journal it names the one it followed.
        request.previous_token = self._state.state_token
        intent.accept(result.forward)
        self._sent.popleft()
        self._begin_waiting()

    def _recover(self, error: errors.Error) -> Op[None]:
        """Make ready to send the unanswered chunks again, or raise what will not get better."""
        for intent, _ in self._sent:
            intent.note_failure(error)
        self._to_send.extendleft(reversed(self._sent))
        self._sent.clear()
        session, caller = self._session, self._caller
        deadline = self._waiting_since + caller.timeout_s
        if self._patience is None or self._healing is None:
            self._patience = Patience(caller, deadline)
            self._healing = Healing(caller, self._doubts.scope())
        try:
            if caller.is_worth_retrying(error):
                yield from self._patience.after(error, self._attempt)
            else:
                request = self._to_send[0][1] if self._to_send else None
                yield from session.recovery.heal(
                    self._healing, error, deadline=deadline, request=request
                )
        except errors.Error as final:
            if self._intents:
                # Refused, those behind it are refused with it: the server tries none of them.
                self._doubts.failed(self._intents[0], final)
            raise final.at_chunk(self._state.chunk_seq + 1) from final.__cause__

    def _leave(self) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None


def _message(request: rnn_pb.ForwardRequest) -> rnn_pb.StreamRequest:
    operation = rnn_pb.Operation(tag=request.chunk_seq, forward=request)
    return rnn_pb.StreamRequest(operations=[operation])
