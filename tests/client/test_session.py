"""What a session sends, and what it makes of the answers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

import timernn
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

XS = np.ones((1, 4, 3), "f4")


@pytest.fixture
def session(client: timernn.Client) -> timernn.Session:
    """A session that only infers."""
    return client.session("m")


@pytest.fixture
def trainer(client: timernn.Client) -> timernn.Session:
    """A session that trains."""
    return client.session("m", train=True)


def test_chunks_are_numbered_and_name_the_token_before(
    session: timernn.Session, stand_in: Any
) -> None:
    """Each chunk has the next number, the last answer's token and what is acknowledged."""
    for _ in range(3):
        session.forward(XS)
    sent = stand_in.requests["Forward"]
    assert [(r.epoch, r.chunk_seq, r.acknowledged_seq) for r in sent] == [
        (100, 1, 0),
        (100, 2, 1),
        (100, 3, 2),
    ]
    assert [r.previous_token for r in sent] == [b"0", b"1", b"2"]


def test_the_highest_version_seen_is_demanded(session: timernn.Session, stand_in: Any) -> None:
    """A replica with an older head must not answer after a newer one has."""
    stand_in.version = 7
    session.forward(XS)
    session.forward(XS)
    assert [r.minimum_version.number for r in stand_in.requests["Forward"]] == [1, 7]
    assert session.version == timernn.Version(7, b"w7")


def test_a_refused_chunk_does_not_poison_the_session(
    session: timernn.Session, stand_in: Any, refusal: Any
) -> None:
    """After bad input the next chunk has the same number."""
    stand_in.fail_next("Forward", refusal(grpc.StatusCode.INVALID_ARGUMENT, "NON_FINITE"))
    with pytest.raises(timernn.NonFinite):
        session.forward(XS * np.nan)
    session.forward(XS)
    assert [r.chunk_seq for r in stand_in.requests["Forward"]] == [1, 1]
    assert session.chunk_seq == 1
    assert not session.in_doubt


@pytest.mark.parametrize("xs", [np.ones((1, 4)), np.ones((1, 4, 2)), np.ones((2, 4, 3)), "text"])
def test_wrong_shapes_are_refused_before_they_are_sent(
    session: timernn.Session, stand_in: Any, xs: Any
) -> None:
    """What cannot be a chunk of this session costs no call."""
    with pytest.raises(timernn.BadTensor, match="xs"):
        session.forward(xs)
    assert not stand_in.requests["Forward"]


def test_inputs_are_cast_to_the_models_dtype(session: timernn.Session, stand_in: Any) -> None:
    """Doubles, integers and lists become float32 for a float32 model."""
    for xs in (np.ones((1, 2, 3)), [[[1, 2, 3]]], np.ones((1, 2, 3), ">f4")):
        hs = session.forward(xs)
    first, last = stand_in.requests["Forward"][0].xs, stand_in.requests["Forward"][-1].xs
    assert len(first.data) == 24
    assert first.data == last.data
    assert hs.dtype == np.float32


def test_outputs_are_the_callers_own_memory(session: timernn.Session) -> None:
    """The returned array may be written to."""
    hs = session.forward(XS)
    hs += 1
    assert hs[0, 0, 0] == 2
    assert session.h[0, 0] == 4


@pytest.mark.parametrize(("returned", "steps"), [("all", 4), ("last", 1), ("none", 0)])
def test_only_what_is_wanted_comes_back(
    session: timernn.Session, returned: Any, steps: int
) -> None:
    """All steps, the last or none, always of rank 3."""
    assert session.forward(XS, return_hs=returned).shape == (1, steps, 2)


def test_threads_take_turns_on_a_session(session: timernn.Session, stand_in: Any) -> None:
    """Two threads never send two chunks under one number."""
    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(session.forward, XS) for _ in range(40)]:
            future.result()
    numbers = [request.chunk_seq for request in stand_in.requests["Forward"]]
    assert numbers == list(range(1, 41))


# --- splitting along T ----------------------------------------------------------------------------


def test_a_long_sequence_is_cut_into_chunks(client: timernn.Client, stand_in: Any) -> None:
    """Pieces are of about equal length, and their outputs are joined."""
    stand_in.limits.chunk_steps = 4
    hs = client.session("m").forward(np.ones((1, 10, 3)))
    assert [r.xs.shape[1] for r in stand_in.requests["Forward"]] == [3, 3, 4]
    assert hs[0, :, 0].tolist() == list(range(1, 11))


def test_pieces_before_the_last_return_nothing_that_is_not_wanted(
    client: timernn.Client, stand_in: Any
) -> None:
    """With the last step wanted, the earlier pieces return none."""
    stand_in.limits.chunk_steps = 4
    hs = client.session("m").forward(np.ones((1, 8, 3)), return_hs="last")
    returns = [r.return_hs for r in stand_in.requests["Forward"]]
    assert returns == [rnn_pb.RETURN_HS_NONE, rnn_pb.RETURN_HS_LAST]
    assert hs.tolist() == [[[8, 8]]]


def test_messages_keep_to_the_servers_limit(client: timernn.Client, stand_in: Any) -> None:
    """Neither the request nor the answer may be larger than one message."""
    stand_in.limits.message_bytes = 9000
    client.session("m").forward(np.ones((1, 500, 3)))
    assert all(r.ByteSize() <= 9000 for r in stand_in.requests["Forward"])
    assert sum(r.xs.shape[1] for r in stand_in.requests["Forward"]) == 500


def test_a_step_too_large_for_a_message_is_reported(client: timernn.Client, stand_in: Any) -> None:
    """What cannot be cut along T is refused with the sizes."""
    stand_in.limits.message_bytes = 8200
    with pytest.raises(timernn.MessageTooLarge, match="8200"):
        client.session("m", batch_size=100).forward(np.ones((100, 1, 3)))


def test_nan_in_a_late_piece_leaves_the_early_ones_unsent(
    client: timernn.Client, stand_in: Any
) -> None:
    """A cut sequence with bad input is refused whole."""
    stand_in.limits.chunk_steps = 4
    xs = np.ones((1, 10, 3))
    xs[0, 9, 1] = np.nan
    with pytest.raises(timernn.NonFinite, match=r"xs\[0,9,1\]"):
        client.session("m").forward(xs)
    assert not stand_in.requests["Forward"]


def test_backward_of_a_cut_forward_is_chained(client: timernn.Client, stand_in: Any) -> None:
    """The pieces go backward in reverse; each gets the later one's dh0 as its dh_next."""
    stand_in.limits.chunk_steps = 4
    session = client.session("m", train=True)
    hs = session.forward(np.ones((1, 8, 3)))
    dxs = session.backward(hs)
    late, early = stand_in.requests["Backward"]
    assert (late.chunk_seq, early.chunk_seq) == (2, 1)
    assert not late.HasField("dh_next")
    assert np.frombuffer(early.dh_next.data, "<f4").tolist() == [5, 5]
    assert dxs[0, :, 0].tolist() == list(range(1, 9))
    assert session.dh is not None
    assert session.dh.tolist() == [[1, 1]]


# --- training -------------------------------------------------------------------------------------


def test_backward_names_the_forward_it_belongs_to(trainer: timernn.Session, stand_in: Any) -> None:
    """Number and token are those of the newest forward without a backward."""
    for _ in range(2):
        hs = trainer.forward(XS)
    trainer.backward(hs)
    trainer.backward(hs, dh_next=trainer.dh)
    sent = stand_in.requests["Backward"]
    assert [(r.chunk_seq, r.state_token) for r in sent] == [(2, b"2"), (1, b"1")]
    assert sent[1].HasField("dh_next")


def test_backward_without_a_forward_is_reported(
    trainer: timernn.Session, session: timernn.Session
) -> None:
    """A second backward, or one of a session that only infers, has no tape."""
    session.forward(XS)
    for untaped in (trainer, session):
        with pytest.raises(timernn.TapeMissing):
            untaped.backward(XS[..., :2])


def test_the_last_steps_gradient_is_enough_after_a_forward_that_returned_it(
    trainer: timernn.Session, stand_in: Any
) -> None:
    """The steps before it get zeros."""
    trainer.forward(XS, return_hs="last")
    trainer.backward(np.ones((1, 1, 2)))
    sent = np.frombuffer(stand_in.requests["Backward"][0].dhs.data, "<f4").reshape(4, 2)
    assert sent.tolist() == [[0, 0], [0, 0], [0, 0], [1, 1]]


def test_update_names_exactly_its_contributions_and_head(
    trainer: timernn.Session, stand_in: Any
) -> None:
    """An update takes what this session contributed since the last one, on the head it knows."""
    for _ in range(3):
        hs = trainer.forward(XS)
        trainer.backward(hs)
    trainer.update(lr=0.5, clip_norm=1.0, reduction="mean")
    trainer.backward(trainer.forward(XS))
    version = trainer.update()
    first, second = stand_in.requests["Update"]
    named = [(c.session_id, c.epoch, list(c.chunk_seqs)) for c in first.contributions]
    assert named == [(trainer.session_id, 100, [1, 2, 3])]
    assert (first.learning_rate, first.clip_norm) == (0.5, 1.0)
    assert first.reduction == rnn_pb.REDUCTION_MEAN
    assert [first.expected_version.number, second.expected_version.number] == [1, 2]
    assert list(second.contributions[0].chunk_seqs) == [4]
    assert first.request_id != second.request_id
    assert version.number == 3


def test_update_without_contributions_is_refused_here(
    trainer: timernn.Session, stand_in: Any
) -> None:
    """On the wire it would take all that wait, of anybody."""
    with pytest.raises(timernn.NoGradients):
        trainer.update()
    assert not stand_in.requests["Update"]


def test_one_update_joins_several_sessions(client: timernn.Client, stand_in: Any) -> None:
    """It names what each of them contributed."""
    sessions = [client.session("m", train=True) for _ in range(3)]
    for session in sessions:
        session.backward(session.forward(XS))
    result = client.update("m", sessions=sessions, lr=0.1)
    assert result.contribution_count == 3
    named = {c.session_id for c in stand_in.requests["Update"][0].contributions}
    assert named == {s.session_id for s in sessions}
    with pytest.raises(timernn.NoGradients):
        sessions[0].update()


@pytest.mark.parametrize("is_repeated", [True, False])
def test_a_backward_whose_step_alone_was_refused_goes_on(
    trainer: timernn.Session, stand_in: Any, refusal: Any, *, is_repeated: bool
) -> None:
    """The same call may be made again; an update takes what was recorded, and the tape with it."""
    hs = trainer.forward(XS)
    full = refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL", recorded="true")
    stand_in.fail_next("Backward", full)
    with pytest.raises(timernn.StoreFull):
        trainer.backward(hs, update=timernn.Step())
    assert not trainer.in_doubt
    if is_repeated:
        trainer.backward(hs, update=timernn.Step())
        taken = stand_in.requests["Backward"][-1].update.contributions
    else:
        trainer.update()
        taken = stand_in.requests["Update"][-1].contributions
    assert [list(one.chunk_seqs) for one in taken] == [[1]]
    with pytest.raises(timernn.TapeMissing):
        trainer.backward(hs)


def test_a_step_can_ride_on_a_backward(trainer: timernn.Session, stand_in: Any) -> None:
    """It takes what waits and the contribution of this backward."""
    trainer.backward(trainer.forward(XS))
    trainer.backward(trainer.forward(XS), update=timernn.Step(lr=0.1))
    update = stand_in.requests["Backward"][1].update
    assert list(update.contributions[0].chunk_seqs) == [1, 2]
    assert trainer.last_update is not None
    assert trainer.last_update.contribution_count == 2
    with pytest.raises(timernn.NoGradients):
        trainer.update()


# --- in doubt -------------------------------------------------------------------------------------


@pytest.fixture
def doubtful(stand_in: Any, refusal: Any, client: timernn.Client) -> timernn.Session:
    """A session whose first chunk was applied, while its caller got UNAVAILABLE."""
    session = client.session("m")
    lost = refusal(grpc.StatusCode.UNAVAILABLE, "UNKNOWN_OUTCOME", 60.0)  # beyond the timeout
    stand_in.fail_next("Forward", lost, after_applying=True)
    with pytest.raises(timernn.UnknownOutcome):
        session.forward(XS)
    assert session.in_doubt
    return session


def test_asking_again_finishes_what_is_in_doubt(doubtful: timernn.Session, stand_in: Any) -> None:
    """The same data again is the same chunk."""
    hs = doubtful.forward(XS)
    assert [r.chunk_seq for r in stand_in.requests["Forward"]] == [1, 1]
    assert hs[0, -1, 0] == 4
    assert not doubtful.in_doubt


def test_a_chunk_gone_back_to_in_doubt_and_then_refused_leaves_the_place(
    client: timernn.Client, stand_in: Any, refusal: Any
) -> None:
    """The session stands where it stood, and the next chunk has the next number."""
    session = client.session("m")
    for _ in range(3):
        session.forward(XS)
    lost = refusal(grpc.StatusCode.UNAVAILABLE, "UNKNOWN_OUTCOME", 60.0)  # beyond the timeout
    stand_in.fail_next("Forward", lost, refusal(grpc.StatusCode.ALREADY_EXISTS, "SEQ_REUSED"))
    with pytest.raises(timernn.UnknownOutcome):
        session.forward(2 * XS, chunk_seq=2)
    with pytest.raises(timernn.SeqReused):
        session.settle()
    assert (session.chunk_seq, session.in_doubt) == (3, False)
    session.forward(XS)
    last = stand_in.requests["Forward"][-1]
    assert (last.chunk_seq, last.previous_token) == (4, b"3")


def test_other_data_comes_after_what_is_in_doubt(doubtful: timernn.Session, stand_in: Any) -> None:
    """The chunk in doubt is sent first, unchanged; then the new one with the next number."""
    hs = doubtful.forward(XS[:, :2] * 5)
    sent = stand_in.requests["Forward"]
    assert [r.chunk_seq for r in sent] == [1, 1, 2]
    assert sent[0].xs == sent[1].xs
    assert hs[0, :, 0].tolist() == [5, 6]


def test_settle_makes_the_outcome_known(doubtful: timernn.Session) -> None:
    """After settle the chunk is applied and the state is known."""
    doubtful.settle()
    assert doubtful.chunk_seq == 1
    assert doubtful.h[0, 0] == 4


def test_an_update_in_doubt_is_finished_by_the_next(
    trainer: timernn.Session, stand_in: Any, refusal: Any
) -> None:
    """Asked for again, it is the same step under the same request id."""
    trainer.backward(trainer.forward(XS))
    stand_in.fail_next("Update", refusal(grpc.StatusCode.UNAVAILABLE, "", 60.0))
    with pytest.raises(timernn.Unavailable):
        trainer.update(lr=0.1)
    trainer.update(lr=0.1)
    first, second = stand_in.requests["Update"]
    assert first == second


def test_a_new_state_makes_a_new_epoch(session: timernn.Session) -> None:
    """Chunks are numbered from 1 again."""
    session.forward(XS)
    session.set_state(np.ones((1, 2)))
    assert (session.epoch, session.chunk_seq) == (101, 0)
    assert session.h.tolist() == [[1, 1]]


def test_a_gradient_that_was_recorded_before_its_tape_went_is_taken_by_the_next_update(
    trainer: timernn.Session, stand_in: Any, refusal: Any
) -> None:
    """The answer was lost, and the retry found the tape pushed out: the contribution waits all the same."""
    hs = trainer.forward(XS)
    gone = refusal(
        grpc.StatusCode.FAILED_PRECONDITION, "TAPE_MISSING", counted="true", recorded="true"
    )
    stand_in.fail_next("Backward", refusal(grpc.StatusCode.UNAVAILABLE), gone)
    with pytest.raises(timernn.TapeMissing):
        trainer.backward(hs)
    trainer.update()
    (sent,) = stand_in.requests["Update"]
    assert [list(named.chunk_seqs) for named in sent.contributions] == [[1]]


def test_a_refusal_after_healing_settles_nothing_of_the_attempts_before(
    trainer: timernn.Session, stand_in: Any, refusal: Any
) -> None:
    """The first attempt may have counted its gradient in the model's slot, which lost nothing."""
    hs = trainer.forward(XS)
    stand_in.fail_next(
        "Backward",
        refusal(grpc.StatusCode.UNAVAILABLE),
        refusal(grpc.StatusCode.ABORTED, "SEQ_GAP", expected_seq="1"),
        refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL"),
    )
    with pytest.raises(timernn.StoreFull):
        trainer.backward(hs)
    assert trainer.in_doubt
