"""Chunks in flight: order, breaks, refusals, and loops that end early."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

import timernn
from timernn._core.stream import StreamCore

if TYPE_CHECKING:
    from collections.abc import Iterator

XS = np.ones((1, 4, 3), "f4")
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.fixture
def session(client: timernn.Client) -> timernn.Session:
    """A session that only infers."""
    return client.session("m")


def ends(outputs: Any) -> list[float]:
    """Return the last value of each chunk's outputs."""
    return [float(hs[0, -1, 0]) for hs in outputs]


def test_answers_come_in_order(session: timernn.Session, stand_in: Any) -> None:
    """Every chunk is answered, in the order in which it was given."""
    assert ends(session.stream(XS for _ in range(20))) == [4.0 * k for k in range(1, 21)]
    assert [r.chunk_seq for r in stand_in.requests["Forward"]] == list(range(1, 21))
    assert session.chunk_seq == 20


def test_only_the_first_chunk_in_flight_names_a_token(
    session: timernn.Session, stand_in: Any
) -> None:
    """The chunks behind it leave that to the stream, which knows the answers before."""
    list(session.stream([XS] * 4))
    assert [r.previous_token for r in stand_in.requests["Forward"]] == [b"0", b"", b"", b""]


def test_a_long_chunk_is_cut_and_joined(client: timernn.Client, stand_in: Any) -> None:
    """One chunk in gives one array out, however many messages it took."""
    stand_in.limits.chunk_steps = 4
    outputs = list(client.session("m").stream([np.ones((1, 30, 3)), XS]))
    assert [hs.shape[1] for hs in outputs] == [30, 4]
    assert outputs[0][0, :, 0].tolist() == list(range(1, 31))


@pytest.mark.parametrize("after_applying", [False, True])
@pytest.mark.parametrize("reason", ["BREAK", "UNKNOWN_OUTCOME"])
def test_a_break_is_not_noticed(
    session: timernn.Session, stand_in: Any, refusal: Any, reason: str, *, after_applying: bool
) -> None:
    """Unanswered chunks are sent again on a new stream, with the same numbers."""
    chunks = iter(range(10))

    def source() -> Iterator[Any]:
        for k in chunks:
            if k == 5:
                stand_in.fail_next(
                    "Forward", refusal(UNAVAILABLE, reason), after_applying=after_applying
                )
            yield XS

    assert ends(session.stream(source(), in_flight=3)) == [4.0 * k for k in range(1, 11)]


def test_a_dead_replica_is_left_for_the_next(
    stand_in: Any, other_stand_in: Any, quick: timernn.RetryPolicy
) -> None:
    """The stream goes on over another address."""
    addresses = [stand_in.address, other_stand_in.address]
    other_stand_in._chunks = stand_in._chunks  # one store
    with timernn.connect(addresses, timeout=10, retry=quick) as client:
        count = 0
        for _ in client.session("m").stream([XS] * 12, in_flight=1):
            count += 1
            if count == 5:
                stand_in.stop()
    assert count == 12
    assert other_stand_in.requests["Forward"]


def collect(outputs: Iterator[Any], got: list[Any]) -> None:
    """Take outputs into a list that is there also when they end with an exception."""
    got.extend(outputs)


def test_a_refused_chunk_raises_in_its_turn(session: timernn.Session) -> None:
    """The chunks before it are answered, those behind it are not applied, the session goes on."""
    got: list[Any] = []
    with pytest.raises(timernn.BadTensor):
        collect(session.stream([XS, XS, np.ones((1, 4, 9)), XS]), got)
    assert len(got) == 2
    assert not session.in_doubt
    assert ends([session.forward(XS)]) == [12.0]


def test_a_chunk_that_the_server_refuses_raises_in_its_turn(
    session: timernn.Session, stand_in: Any, refusal: Any
) -> None:
    """What was in flight behind it is forgotten with it."""
    got: list[Any] = []
    bad = refusal(grpc.StatusCode.INVALID_ARGUMENT, "NON_FINITE")

    def source() -> Iterator[Any]:
        for k in range(6):
            if k == 2:
                stand_in.fail_next("Forward", bad)
            yield XS

    with pytest.raises(timernn.NonFinite):
        collect(session.stream(source(), in_flight=1), got)
    assert ends(got) == [4.0, 8.0]
    assert ends([session.forward(XS)]) == [12.0]


def test_a_loop_left_early_leaves_the_session_in_order(
    session: timernn.Session, stand_in: Any
) -> None:
    """Chunks that were sent count, and the next call comes after them."""
    for hs in session.stream([XS] * 10, in_flight=3):
        assert hs[0, -1, 0] == 4
        break
    hs = session.forward(XS * 2)
    sent = {r.chunk_seq: r.xs.data for r in stand_in.requests["Forward"]}
    assert hs[0, -1, 0] == 4.0 * session.chunk_seq
    assert sent[session.chunk_seq] == (XS * 2).tobytes()
    assert session.chunk_seq == max(sent)


def test_a_session_in_a_stream_refuses_other_operations(session: timernn.Session) -> None:
    """Its numbers belong to the stream until it ends."""
    stream = session.stream([XS] * 3)
    next(iter(stream))
    with pytest.raises(timernn.SessionBusy):
        session.forward(XS)
    del stream
    session.forward(XS)


def test_with_one_in_flight_a_chunk_may_depend_on_the_answer_before(
    session: timernn.Session,
) -> None:
    """Nothing is read ahead: what a loop samples can be what it sends next."""
    seen: list[float] = []

    def source() -> Iterator[Any]:
        for k in range(4):
            assert len(seen) == k
            yield XS

    for hs in session.stream(source(), in_flight=1):
        seen += ends([hs])
    assert seen == [4, 8, 12, 16]


def test_a_slow_source_holds_no_answer_back(session: timernn.Session) -> None:
    """An answer is given out while the source still waits for its next chunk."""
    answered = threading.Event()

    def source() -> Iterator[Any]:
        yield XS
        assert answered.wait(10)
        yield XS

    for _ in session.stream(source(), in_flight=4):
        answered.set()
    assert session.chunk_seq == 2


def test_a_source_may_fill_one_buffer_again_and_again(
    session: timernn.Session, stand_in: Any
) -> None:
    """What is read ahead is a copy."""
    buffer = np.zeros((1, 1, 3), "f4")

    def source() -> Iterator[Any]:
        for k in range(8):
            buffer[:] = k
            yield buffer

    list(session.stream(source(), in_flight=4))
    sent = [np.frombuffer(r.xs.data, "<f4")[0] for r in stand_in.requests["Forward"]]
    assert sent == list(range(8))


def test_the_sources_own_failure_comes_out(session: timernn.Session) -> None:
    """An exception of the caller's generator is the caller's."""

    def source() -> Iterator[Any]:
        yield XS
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        list(session.stream(source()))
    session.forward(XS)


# --- what is certain after an error ---------------------------------------------------------------


def pieces(*steps: int) -> list[Any]:
    """Make chunks that differ in their T."""
    return [XS[:, :1].repeat(count, axis=1) for count in steps]


DATA = pieces(1, 2, 3, 4, 5, 6, 7)
ENDS = [float(sum(range(k + 1))) for k in range(1, 8)]


def fail_third(stand_in: Any, status: Any, *, after_applying: bool = False) -> Iterator[Any]:
    """Give out the chunks, and let the third of them fail; four answers come in one message."""
    stand_in.results_per_message = 4
    for position, chunk in enumerate(DATA):
        if position == 0:
            stand_in.apply_next("Forward", 2)
            stand_in.fail_next("Forward", status, after_applying=after_applying)
        yield chunk


def go_on(stand_in: Any, session: timernn.Session, done: int) -> list[float]:
    """Stream from the first chunk without an output, as the documentation says."""
    stand_in.results_per_message = 1
    return ends(session.stream(DATA[done:]))


def test_answers_before_a_refused_one_in_one_message_are_given_out(
    session: timernn.Session, stand_in: Any, refusal: Any
) -> None:
    """They come in order, then the error, which names its chunk; nothing is applied twice."""
    bad, got = refusal(grpc.StatusCode.INVALID_ARGUMENT, "NON_FINITE"), list[Any]()
    with pytest.raises(timernn.NonFinite, match="chunk 3") as caught:
        collect(session.stream(list(fail_third(stand_in, bad))), got)
    assert ends(got) == ENDS[:2]
    assert caught.value.metadata["chunk_seq"] == "3"
    assert (session.chunk_seq, session.in_doubt) == (2, False)
    assert go_on(stand_in, session, 2) == ENDS[2:]
    assert stand_in.steps_of(session.session_id) == list(range(1, 8))


@pytest.mark.parametrize("after_applying", [False, True])
def test_when_patience_ends_nothing_is_lost_and_nothing_comes_twice(
    client: timernn.Client, stand_in: Any, refusal: Any, *, after_applying: bool
) -> None:
    """Answered chunks are given out, the others stay in doubt, and the same data go on."""
    session, got = client.session("m"), list[Any]()
    lost = refusal(UNAVAILABLE, "UNKNOWN_OUTCOME", 60.0)  # beyond the timeout
    source = list(fail_third(stand_in, lost, after_applying=after_applying))
    with pytest.raises(timernn.UnknownOutcome, match="chunk 3"):
        collect(session.stream(source), got)
    assert ends(got) == ENDS[:2]
    assert session.in_doubt
    assert go_on(stand_in, session, 2) == ENDS[2:]
    assert stand_in.steps_of(session.session_id) == list(range(1, 8))


def test_after_a_broken_stream_other_data_come_behind_what_was_sent(
    client: timernn.Client, stand_in: Any, refusal: Any
) -> None:
    """What is in doubt counts, and its output is dropped."""
    session, got = client.session("m"), list[Any]()
    lost = refusal(UNAVAILABLE, "UNKNOWN_OUTCOME", 60.0)  # beyond the timeout
    with pytest.raises(timernn.UnknownOutcome):
        collect(session.stream(list(fail_third(stand_in, lost))), got)
    stand_in.results_per_message = 1
    sent = max(r.chunk_seq for r in stand_in.requests["Forward"])
    outputs = list(session.stream(pieces(20, 30)))
    assert [hs.shape[1] for hs in outputs] == [20, 30]
    assert stand_in.steps_of(session.session_id) == [*range(1, sent + 1), 20, 30]


def test_forward_finishes_the_first_chunk_that_a_stream_left_in_doubt(
    client: timernn.Client, stand_in: Any, refusal: Any
) -> None:
    """Chunk by chunk or in a stream: the same data are the same chunk."""
    session, got = client.session("m"), list[Any]()
    lost = refusal(UNAVAILABLE, "UNKNOWN_OUTCOME", 60.0)  # beyond the timeout
    with pytest.raises(timernn.UnknownOutcome):
        collect(session.stream(list(fail_third(stand_in, lost))), got)
    stand_in.results_per_message = 1
    assert ends([session.forward(chunk) for chunk in DATA[2:]]) == ENDS[2:]
    assert not session.in_doubt


def test_answers_that_are_there_do_not_wait_for_a_retry(
    session: timernn.Session, stand_in: Any, refusal: Any
) -> None:
    """What came before a failure is given out before the failure is waited for."""
    later = refusal(UNAVAILABLE, "STORE_DOWN", 2.0)
    stream = session.stream(list(fail_third(stand_in, later)))
    clock = session._core.context.caller.clock
    began = clock()
    assert ends([next(stream), next(stream)]) == ENDS[:2]
    assert clock() - began < 1.9  # the retry alone would have waited longer
    stream.close()  # type: ignore[attr-defined]  # it is a generator


def test_the_sources_failure_comes_after_the_answers_before_it(session: timernn.Session) -> None:
    """No chunk that was given out before is lost or left in doubt."""

    def source() -> Iterator[Any]:
        yield from DATA[:3]
        raise LookupError("mine")

    got: list[Any] = []
    with pytest.raises(LookupError, match="mine"):
        collect(session.stream(source()), got)
    assert ends(got) == ENDS[:3]
    assert not session.in_doubt


@pytest.mark.parametrize("way", ["forward", "stream", "frame"])
def test_a_cut_chunk_refused_half_way_goes_on_when_it_is_asked_for_again(
    client: timernn.Client, stand_in: Any, refusal: Any, way: str
) -> None:
    """The pieces that were applied are not applied again, and the output is whole."""
    stand_in.limits.chunk_steps = 4
    session, xs = client.session("m"), np.ones((1, 12, 3))
    stand_in.apply_next("Forward")
    stand_in.fail_next("Forward", refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "TAPE_QUOTA"))

    def ask() -> Any:
        if way == "stream":
            return next(session.stream([xs], in_flight=1))
        answer = session.forward(xs) if way == "forward" else client.frame([(session, xs)])[0]
        if isinstance(answer, timernn.Error):
            raise answer
        return answer

    with pytest.raises(timernn.TapeQuota):
        ask()
    assert session.chunk_seq == 1
    assert ask()[0, :, 0].tolist() == list(range(1, 13))
    assert stand_in.steps_of(session.session_id) == [4, 4, 4]


@pytest.mark.parametrize("make", [list, iter])
@pytest.mark.parametrize(
    "bad",
    [
        np.ma.masked_less(np.arange(12.0).reshape(1, 4, 3), 1.0),
        [np.ma.masked_less(np.arange(12.0).reshape(4, 3), 1.0)],
        [[[1.0, 2.0, 3.0], [1.0]]],
    ],
    ids=["masked", "a list of masked", "ragged"],
)
def test_what_is_no_array_is_refused_in_its_turn_from_any_source(
    session: timernn.Session, stand_in: Any, make: Any, bad: Any
) -> None:
    """A source that is read ahead in a thread drops no mask, and raises no error of NumPy's."""
    with pytest.raises(timernn.BadTensor, match="chunk 2: xs"):
        list(session.stream(make([XS, bad, XS])))
    assert stand_in.steps_of(session.session_id) == [4]


# --- whose session it is --------------------------------------------------------------------------

OTHERS: dict[str, Any] = {
    "forward": lambda _, session: session.forward(XS),
    "backward": lambda _, session: session.backward(XS[..., :2]),
    "update": lambda _, session: session.update(),
    "update over sessions": lambda client, session: client.update("m", sessions=[session]),
    "set_state": lambda _, session: session.set_state(np.zeros((1, 2))),
    "reset_state": lambda _, session: session.reset_state(),
    "fork": lambda _, session: session.fork(),
    "close": lambda _, session: session.close(),
    "settle": lambda _, session: session.settle(),
    "discard_gradients": lambda _, session: session.discard_gradients(),
    "stream": lambda _, session: next(session.stream([XS])),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_refused_operation_does_not_free_the_session_of_a_stream(
    client: timernn.Client, stand_in: Any, other: str
) -> None:
    """Refused once or twice, the stream keeps the session and all its outputs."""
    session = client.session("m", train=True)
    stream = session.stream(DATA)
    got = [next(stream)]
    for _ in range(2):
        with pytest.raises(timernn.SessionBusy):
            OTHERS[other](client, session)
    assert ends([*got, *stream]) == ENDS
    session.forward(XS)
    assert stand_in.steps_of(session.session_id) == [*range(1, 8), 4]


def test_a_frame_does_not_free_the_session_of_a_stream(
    client: timernn.Client, stand_in: Any
) -> None:
    """The refusal stands in the frame's place, for each of its chunks."""
    session = client.session("m")
    stream = session.stream(DATA)
    got = [next(stream)]
    for _ in range(2):
        outputs = client.frame([(session, XS), (session, XS)])
        assert all(isinstance(error, timernn.SessionBusy) for error in outputs)
    assert ends([*got, *stream]) == ENDS


def test_a_stream_that_is_closed_before_it_begins_takes_no_session(
    session: timernn.Session,
) -> None:
    """Nor does closing it free the session of another."""
    unused = session.stream(DATA)
    stream = session.stream(DATA)
    got = [next(stream)]
    unused.close()  # type: ignore[attr-defined]  # it is a generator
    with pytest.raises(timernn.SessionBusy):
        session.forward(XS)
    assert ends([*got, *stream]) == ENDS


# --- patience -------------------------------------------------------------------------------------


@dataclass
class Clock:
    """A clock that a test sets forward."""

    ahead_s: float = 0.0

    def now(self) -> float:
        """Return the clock's time in seconds."""
        return time.monotonic() + self.ahead_s


@pytest.fixture
def clock(client: timernn.Client) -> Clock:
    """The client's clock, which the test advances."""
    made = Clock()
    client._core.context.caller.clock = made.now
    return made


@pytest.mark.parametrize("in_flight", [1, 4])
def test_a_chunk_has_its_whole_patience_after_a_pause_of_the_source(
    session: timernn.Session, stand_in: Any, refusal: Any, clock: Clock, in_flight: int
) -> None:
    """However long the source pauses, a stream that broke meanwhile is opened again."""

    def source() -> Iterator[Any]:
        yield from DATA[:2]
        clock.ahead_s += 1000
        stand_in.fail_next("Forward", refusal(UNAVAILABLE, "BREAK"))
        yield from DATA[2:]

    assert ends(session.stream(source(), in_flight=in_flight)) == ENDS


def test_a_chunk_has_its_whole_patience_after_a_pause_of_the_consumer(
    session: timernn.Session, stand_in: Any, refusal: Any, clock: Clock
) -> None:
    """What broke while nobody asked for the next output is mended when somebody does."""
    stand_in.apply_next("Forward", 2)
    stand_in.fail_next("Forward", refusal(UNAVAILABLE, "BREAK"))
    got: list[Any] = []
    for hs in session.stream(DATA):
        got.append(hs)
        clock.ahead_s += 1000
    assert ends(got) == ENDS


def test_a_frame_has_its_whole_patience_after_a_pause(
    client: timernn.Client, stand_in: Any, refusal: Any, clock: Clock
) -> None:
    """A stream that ended between two frames is opened again."""
    session = client.session("m")
    client.frame([(session, DATA[0])])
    clock.ahead_s += 1000
    stand_in.fail_next("Forward", refusal(UNAVAILABLE, "BREAK"))
    assert ends(client.frame([(session, DATA[1])])) == [ENDS[1]]


# --- tapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("way", ["stream", "frame"])
def test_tapes_are_left_where_they_are_asked_for(
    client: timernn.Client, stand_in: Any, way: str, *, train: bool
) -> None:
    """Streams and frames of a training session leave none by default."""
    session = client.session("m", train=True)
    if way == "stream":
        outputs: list[Any] = list(session.stream(DATA[:2], train=train))
    else:
        outputs = client.frame([(session, xs) for xs in DATA[:2]], train=train)
    assert ends(outputs) == ENDS[:2]
    if not train:
        with pytest.raises(timernn.TapeMissing):
            session.backward(outputs[1])
        return
    session.backward(outputs[1])
    session.backward(outputs[0], dh_next=session.dh)
    assert [r.chunk_seq for r in stand_in.requests["Backward"]] == [2, 1]


def test_tapes_of_a_session_that_only_infers_are_refused(
    client: timernn.Client, session: timernn.Session
) -> None:
    """Nothing is sent, and the message says how to open it."""
    with pytest.raises(timernn.BadField, match="train=True"):
        next(session.stream(DATA, train=True))
    (error,) = client.frame([(session, XS)], train=True)
    assert isinstance(error, timernn.BadField)
    assert ends([session.forward(XS)]) == [4]


# --- frames ---------------------------------------------------------------------------------------


def test_a_frame_answers_in_the_order_given(client: timernn.Client, stand_in: Any) -> None:
    """One message carries many sessions; a session may come twice."""
    one, two = client.session("m"), client.session("m")
    outputs = client.frame([(one, XS), (two, XS[:, :1]), (one, XS)])
    assert ends(outputs) == [4.0, 1.0, 8.0]


def test_a_frames_failure_stands_in_its_own_place(
    client: timernn.Client, stand_in: Any, refusal: Any
) -> None:
    """A refused chunk disturbs no other session, and its session goes on."""
    sessions = [client.session("m") for _ in range(3)]
    stand_in.fail_next("Forward", refusal(grpc.StatusCode.NOT_FOUND, "SESSION_EXPIRED"))
    outputs = client.frame([(session, XS) for session in sessions])
    assert isinstance(outputs[0], timernn.SessionExpired)
    assert ends(outputs[1:]) == [4.0, 4.0]


@pytest.mark.parametrize("reason", ["BREAK", "UNKNOWN_OUTCOME"])
def test_a_frame_survives_a_break(
    client: timernn.Client, stand_in: Any, refusal: Any, reason: str
) -> None:
    """Unanswered chunks are sent again with the same numbers."""
    sessions = [client.session("m") for _ in range(5)]
    client.frame([(session, XS) for session in sessions])
    stand_in.fail_next("Forward", refusal(UNAVAILABLE, reason), after_applying=True)
    outputs = client.frame([(session, XS) for session in sessions])
    assert ends(outputs) == [8.0] * 5


def test_frames_keep_to_the_limits(client: timernn.Client, stand_in: Any) -> None:
    """Operations beyond one message's number go into the next."""
    stand_in.limits.operations_per_message = 2
    sessions = [client.session("m") for _ in range(5)]
    assert ends(client.frame([(session, XS) for session in sessions])) == [4.0] * 5


def test_behind_a_failed_chunk_a_frame_applies_none_of_its_session(
    client: timernn.Client, stand_in: Any, refusal: Any
) -> None:
    """Its error names the chunk and stands for those behind it; other sessions go on."""
    one, two = client.session("m"), client.session("m")
    stand_in.fail_next("Forward", refusal(grpc.StatusCode.INVALID_ARGUMENT, "NON_FINITE"))
    outputs = client.frame([(one, XS), (two, XS), (one, XS)])
    assert isinstance(outputs[0], timernn.NonFinite)
    assert outputs[0].metadata["chunk_seq"] == "1"
    assert outputs[2] is outputs[0]
    assert ends(outputs[1:2]) == [4.0]
    assert stand_in.steps_of(one.session_id) == []


def test_a_frame_in_doubt_goes_on_when_it_is_sent_again(
    client: timernn.Client, stand_in: Any, refusal: Any
) -> None:
    """Of a session that came twice nothing is lost, nothing applied twice."""
    one, two = client.session("m"), client.session("m")
    frame = [(one, DATA[0]), (two, DATA[0]), (one, DATA[1])]
    lost = refusal(UNAVAILABLE, "UNKNOWN_OUTCOME", 60.0)  # beyond the timeout
    stand_in.fail_next("Forward", lost, after_applying=True)
    outputs = client.frame(frame)
    assert [type(each) for each in outputs] == [
        timernn.UnknownOutcome,
        np.ndarray,
        type(outputs[0]),
    ]
    frame.pop(1)
    assert ends(client.frame(frame)) == ENDS[:2]
    assert stand_in.steps_of(one.session_id) == [1, 2]
    assert not one.in_doubt


def test_a_chunk_answered_when_an_interrupt_came_is_given_out_without_another_message(
    client: timernn.Client, stand_in: Any
) -> None:
    """Asked for again, its output is there: a stream that waits for an answer would wait for ever."""
    session = client.session("m")
    interrupt = pytest.MonkeyPatch()

    def strike(*_: object) -> None:
        raise KeyboardInterrupt

    interrupt.setattr(StreamCore, "_output_of", strike)
    with pytest.raises(KeyboardInterrupt):
        next(session.stream([XS]))
    interrupt.undo()
    assert (session.in_doubt, session.chunk_seq) == (True, 1)
    assert [hs.shape for hs in session.stream([XS])] == [(1, 4, 2)]
    assert len(stand_in.requests["Forward"]) == 1
