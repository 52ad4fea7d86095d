"""Chunks in flight: order, breaks, refusals, and loops that end early."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

import timernn

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
