"""Frames: chunks of many sessions in one message, over one stream that stays open."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from timernn import errors
from timernn._core.contract import STREAM
from timernn._core.effects import OpenStream, Read, Write
from timernn._core.healing import Healing
from timernn._core.requests import forward_intent
from timernn._core.retry import STREAM_TIMEOUT_S, Attempt, Patience
from timernn._core.status import error_from_status
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import numpy.typing as npt

    from timernn._core.context import ClientContext
    from timernn._core.effects import Op, StreamHandle
    from timernn._core.intents import ForwardIntent, Intent
    from timernn._core.recovery import Recovery
    from timernn._core.session import SessionCore
    from timernn._core.session_state import SessionState
    from timernn.types import Array, ReturnHs

_MESSAGE_OVERHEAD_BYTES = 4096


@dataclass(slots=True, eq=False)
class _Item:
    """One sequence of a frame, and what has come of it."""

    session: SessionCore
    intent: ForwardIntent | None
    error: errors.Error | None
    healing: Healing | None = None  # made when something went wrong

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be sent of it."""
        return self.error is not None or self.intent is None or self.intent.is_done

    @property
    def request(self) -> rnn_pb.ForwardRequest | None:
        """The request of the chunk that is to be sent or answered next; None without an intent."""
        return None if self.intent is None else self.intent.requests[self.intent.done]

    def note(self, error: errors.Error) -> None:
        """Note how an attempt of the present chunk failed."""
        if self.intent is not None:
            self.intent.note_failure(error)

    def fail(self, error: errors.Error) -> None:
        """End with an error; what may be applied all the same stays in doubt."""
        self.error = error.at_chunk(self.session.state.chunk_seq + 1)
        if self.intent is not None:
            self.session.doubts.failed(self.intent, error)

    def outcome(self) -> Array | errors.Error:
        """Return the hidden states, or the error in their place."""
        if self.error is not None or self.intent is None:
            return self.error or errors.Internal("a frame's item ended without an answer")
        try:
            return self.intent.hs()
        except errors.Error as error:
            return error


class Frames:
    """The stream for frames: kept between calls, left when it is old or breaks.

    Args:
        context: How calls are made.
        recovery: Heals what a store has lost.
    """

    def __init__(self, context: ClientContext, recovery: Recovery) -> None:
        self._caller, self._recovery = context.caller, recovery
        self._handle: StreamHandle | None = None
        self._is_quiet = True  # no answer is still to come
        self._attempt = Attempt(0, 0)
        self._fresh_until = 0.0

    def close(self) -> None:
        """Leave the stream."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def forward(
        self,
        chunks: Iterable[tuple[SessionCore, npt.ArrayLike]],
        return_hs: ReturnHs,
        *,
        train: bool,
    ) -> Op[list[Array | errors.Error]]:
        """Apply one sequence to each session; a failure stands in its own place alone."""
        deadline, items = self._caller.deadline(), list[_Item]()
        positions = Counter[int]()
        for session, xs in chunks:
            make = partial(forward_intent, session.state, xs, return_hs, train=train)
            before = positions[id(session)]
            items.append((yield from self._item(session, make, before=before, deadline=deadline)))
            positions[id(session)] += 1
        patience = Patience(self._caller, deadline)
        try:
            while waiting := _next_of_each_session(items):
                yield from self._round(waiting, patience, deadline)
        except errors.Error as error:
            for item in _next_of_each_session(items):
                item.fail(error)
            _next_of_each_session(items)  # what stands behind a failed one fails too
        outcomes = [item.outcome() for item in items]
        for session, intents in _answered(items):
            session.doubts.deliver(intents)
        return outcomes

    def _item(
        self,
        session: SessionCore,
        make: Callable[[], ForwardIntent],
        *,
        before: int,
        deadline: float,
    ) -> Op[_Item]:
        """Make an item, or take what is in doubt since before if it is the same again."""
        doubts, updates = session.doubts, session.updates
        try:
            session.state.require_idle()
            intent = make()
            again = doubts.again(intent, before)
            if again is None and (doubts or updates.is_in_doubt):
                yield from doubts.settle(deadline, kept=before)
                yield from updates.settle(deadline)
        except errors.Error as error:
            refused = error.at_chunk(session.state.chunk_seq + before + 1)
            return _Item(session, None, refused)
        return _Item(session, again or intent, None)

    def _round(self, items: list[_Item], patience: Patience, deadline: float) -> Op[None]:
        """Send each item's next chunk, take the answers, put right what failed."""
        try:
            failures = yield from self._exchange(items)
        except errors.Error as error:
            self.close()
            for item in items:
                item.note(error)
            yield from patience.after(error, self._attempt)
            return
        retry: errors.Error | None = None
        for item, failure in failures:
            item.note(failure)
            if self._caller.is_worth_retrying(failure):
                # Without a new token nothing else gets better.
                if retry is None or not self._caller.wants_token(retry):
                    retry = failure
                continue
            if item.healing is None:
                item.healing = Healing(self._caller, item.session.doubts.scope())
            try:
                yield from self._recovery.heal(
                    item.healing, failure, deadline=deadline, request=item.request
                )
            except errors.Error as final:
                item.fail(final)
        if retry is not None:
            if self._caller.wants_token(retry):
                self.close()  # it was opened with the old one
            yield from patience.after(retry, self._attempt)

    def _exchange(self, items: list[_Item]) -> Op[list[tuple[_Item, errors.Error]]]:
        handle = yield from self._stream()
        self._is_quiet = False
        count = 0
        for message in self._messages(items):
            yield Write(handle, message)
            count += len(message.operations)
        failures: list[tuple[_Item, errors.Error]] = []
        while count:
            answer: rnn_pb.StreamResponse | None = yield Read(handle)
            if answer is None:
                raise errors.Unavailable("the server ended the stream")
            for result in answer.results:
                count -= 1
                failures += _take(items[result.tag], result)
            if answer.draining:
                self._fresh_until = 0.0
                if count:
                    raise errors.Draining("the server is about to stop")
        self._is_quiet = True
        return failures

    def _stream(self) -> Op[StreamHandle]:
        caller = self._caller
        is_fresh = self._is_quiet and caller.clock() < self._fresh_until
        if self._handle is not None and is_fresh:
            return self._handle
        self.close()
        self._attempt = yield from caller.begin()
        # Half of its time is kept for the answers of a frame that begins at the last moment.
        open_s = min(STREAM_TIMEOUT_S, caller.timeout_s)
        self._fresh_until = caller.clock() + open_s / 2
        self._handle = yield OpenStream(STREAM, self._attempt.address, open_s)
        return self._handle

    def _messages(self, items: list[_Item]) -> Iterator[rnn_pb.StreamRequest]:
        """Write the next chunk of each item, in as few messages as the limits allow."""
        message, size = rnn_pb.StreamRequest(), _MESSAGE_OVERHEAD_BYTES
        for tag, item in enumerate(items):
            if item.intent is None:
                continue
            session = item.session.state
            item.session.doubts.keep(item.intent)
            request = item.intent.prepare()
            bounds, item_size = session.bounds, _size(request, session)
            is_full = len(message.operations) >= bounds.operations_per_message
            if message.operations and (is_full or size + item_size > bounds.message_bytes):
                yield message
                message, size = rnn_pb.StreamRequest(), _MESSAGE_OVERHEAD_BYTES
            message.operations.add(tag=tag).forward.CopyFrom(request)
            size += item_size
        if message.operations:
            yield message


def _next_of_each_session(items: list[_Item]) -> list[_Item]:
    """Return the first unfinished item of each session; behind a failed one there is none.

    Those behind it have its error: a chunk must not be applied without the one before it.
    """
    first: dict[int, _Item] = {}
    failed: dict[int, errors.Error] = {}
    for item in items:
        key = id(item.session)
        if item.error is not None:
            failed.setdefault(key, item.error)
        elif key in failed and not item.is_over:
            item.error = failed[key]
        elif not item.is_over:
            first.setdefault(key, item)
    return list(first.values())


def _answered(items: list[_Item]) -> list[tuple[SessionCore, list[Intent[Any, Any]]]]:
    """Return each session with what was answered of it."""
    by_session: dict[int, tuple[SessionCore, list[Intent[Any, Any]]]] = {}
    for item in items:
        if item.error is None and item.intent is not None:
            by_session.setdefault(id(item.session), (item.session, []))[1].append(item.intent)
    return list(by_session.values())


def _take(item: _Item, result: rnn_pb.OperationResult) -> list[tuple[_Item, errors.Error]]:
    if result.HasField("error"):
        return [(item, error_from_status(result.error))]
    if item.intent is not None:
        item.intent.accept(result.forward)
    return []


def _size(request: rnn_pb.ForwardRequest, session: SessionState) -> int:
    """Return the larger of a chunk's two sides, in bytes, about."""
    model = session.model
    itemsize = 8 if model.dtype == "float64" else 4
    rows, steps = request.xs.shape[0], request.xs.shape[1]
    returned = steps + 1 if request.return_hs == rnn_pb.RETURN_HS_ALL else 2
    return int(max(len(request.xs.data), rows * returned * model.hidden_size * itemsize)) + 512
