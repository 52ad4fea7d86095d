"""What an error proves about a request whose earlier attempts had no answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

import timernn
from timernn import errors
from timernn._core.refusals import Proof, proof_of
from timernn._core.status import error_from_rpc

if TYPE_CHECKING:
    from collections.abc import Callable

    Way = Callable[[timernn.Client, timernn.Session], Any]

XS = np.ones((1, 4, 3), "f4")
CODE = grpc.StatusCode
LOST = (CODE.UNAVAILABLE, "UNKNOWN_OUTCOME")
# Decided before the session or the model was read.
PROVE_NOTHING = [
    (CODE.RESOURCE_EXHAUSTED, "STORE_FULL"),
    (CODE.RESOURCE_EXHAUSTED, "MAX_SESSIONS"),
    (CODE.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE"),
    (CODE.RESOURCE_EXHAUSTED, "A_REASON_TO_COME"),
    (CODE.FAILED_PRECONDITION, "UNSUPPORTED_LAYOUT"),
    (CODE.UNAUTHENTICATED, "BAD_CREDENTIALS"),
    (CODE.PERMISSION_DENIED, "ROLE"),
    (CODE.UNIMPLEMENTED, ""),
]
# Decided by the content, or by what was found at the place.
PROVE_ALL = [
    (CODE.INVALID_ARGUMENT, "NON_FINITE"),
    (CODE.ALREADY_EXISTS, "SEQ_REUSED"),
    (CODE.ABORTED, "EPOCH_FENCED"),
    (CODE.ABORTED, "HISTORY_FORKED"),
    (CODE.NOT_FOUND, "SESSION_CLOSED"),
    (CODE.RESOURCE_EXHAUSTED, "TAPE_QUOTA"),
]


def forward(client: timernn.Client, session: timernn.Session) -> Any:
    """Send a chunk by itself."""
    del client
    return session.forward(XS)


def stream(client: timernn.Client, session: timernn.Session) -> Any:
    """Send a chunk on a stream."""
    del client
    (hs,) = session.stream([XS])
    return hs


def frame(client: timernn.Client, session: timernn.Session) -> Any:
    """Send a chunk in a frame."""
    (outcome,) = client.frame([(session, XS)])
    if isinstance(outcome, timernn.Error):
        raise outcome
    return outcome


@pytest.mark.parametrize("way", [forward, stream, frame])
@pytest.mark.parametrize(("code", "reason"), PROVE_NOTHING)
def test_what_proves_nothing_leaves_a_chunk_in_doubt(
    client: timernn.Client, stand_in: Any, refusal: Any, way: Way, code: Any, reason: str
) -> None:
    """Applied, its answer lost, then refused unseen: the same chunk is sent again and answered."""
    session = client.session("m")
    stand_in.fail_next("Forward", refusal(*LOST), after_applying=True)
    stand_in.fail_next("Forward", refusal(code, reason))
    with pytest.raises(timernn.Error) as caught:
        way(client, session)
    assert caught.value.code is code
    assert session.in_doubt
    hs = session.forward(XS) if way is not stream else session.forward(XS * 2)
    assert session.chunk_seq == (2 if way is stream else 1)
    assert hs[0, -1, 0] == (8 if way is stream else 4)


@pytest.mark.parametrize("way", [forward, stream, frame])
@pytest.mark.parametrize(("code", "reason"), PROVE_NOTHING)
def test_a_first_refusal_leaves_nothing_in_doubt(
    client: timernn.Client, stand_in: Any, refusal: Any, way: Way, code: Any, reason: str
) -> None:
    """Without an attempt of unknown outcome before it, every refusal is certain."""
    session = client.session("m")
    stand_in.fail_next("Forward", refusal(code, reason))
    with pytest.raises(timernn.Error) as caught:
        way(client, session)
    assert not caught.value.is_outcome_unknown
    assert not session.in_doubt


@pytest.mark.parametrize("way", [forward, stream, frame])
@pytest.mark.parametrize(("code", "reason"), PROVE_ALL)
def test_what_was_decided_at_the_place_ends_the_doubt(
    client: timernn.Client, stand_in: Any, refusal: Any, way: Way, code: Any, reason: str
) -> None:
    """A refusal for the content or for what stands there holds for the attempts before it too."""
    session = client.session("m")
    stand_in.fail_next("Forward", refusal(*LOST), refusal(code, reason))
    with pytest.raises(timernn.Error) as caught:
        way(client, session)
    assert not caught.value.is_outcome_unknown
    assert not session.in_doubt


def test_the_doubt_of_an_earlier_call_outlives_a_refusal(
    client: timernn.Client, stand_in: Any, refusal: Any
) -> None:
    """Settling that is refused unseen settles nothing."""
    session = client.session("m")
    stand_in.fail_next("Forward", refusal(*LOST, 60.0), after_applying=True)  # beyond the timeout
    with pytest.raises(timernn.UnknownOutcome):
        session.forward(XS)
    stand_in.fail_next("Forward", refusal(CODE.RESOURCE_EXHAUSTED, "STORE_FULL"))
    with pytest.raises(timernn.StoreFull):
        session.settle()
    assert session.in_doubt
    assert session.forward(XS)[0, -1, 0] == 4


def test_an_update_stays_in_doubt(client: timernn.Client, stand_in: Any, refusal: Any) -> None:
    """The step that may have been made is asked for again under its request id."""
    session = client.session("m", train=True)
    session.backward(session.forward(XS))
    stand_in.fail_next("Update", refusal(*LOST), refusal(CODE.RESOURCE_EXHAUSTED, "STORE_FULL"))
    with pytest.raises(timernn.StoreFull) as caught:
        session.update()
    assert caught.value.is_outcome_unknown
    session.update()
    assert len({request.request_id for request in stand_in.requests["Update"]}) == 1


def test_a_new_state_stays_in_doubt(client: timernn.Client, stand_in: Any, refusal: Any) -> None:
    """The epoch that may have begun is asked for again under its request id."""
    session = client.session("m")
    stand_in.fail_next("SetState", refusal(*LOST), refusal(CODE.PERMISSION_DENIED, "ROLE"))
    with pytest.raises(timernn.Role):
        session.set_state(np.zeros((1, 2)))
    assert session.in_doubt
    session.set_state(np.zeros((1, 2)))
    assert len({request.request_id for request in stand_in.requests["SetState"]}) == 1


def test_opening_tells_that_it_may_have_opened(
    client: timernn.Client, stand_in: Any, refusal: Any
) -> None:
    """A quota that refuses the second attempt does not speak for the first."""
    stand_in.fail_next("OpenSession", refusal(*LOST))
    stand_in.fail_next("OpenSession", refusal(CODE.RESOURCE_EXHAUSTED, "MAX_SESSIONS"))
    with pytest.raises(timernn.MaxSessions) as caught:
        client.session("m")
    assert caught.value.is_outcome_unknown


def test_a_sequence_of_which_a_part_is_applied_stays_in_doubt(
    client: timernn.Client, stand_in: Any, refusal: Any
) -> None:
    """Its second piece refused unseen, the same call goes on where it ended."""
    stand_in.limits.chunk_steps = 2
    session = client.session("m")
    stand_in.apply_next("Forward")
    stand_in.fail_next("Forward", refusal(CODE.RESOURCE_EXHAUSTED, "STORE_FULL"))
    with pytest.raises(timernn.StoreFull):
        session.forward(XS)
    assert session.in_doubt
    np.testing.assert_array_equal(session.forward(XS)[0, :, 0], [1, 2, 3, 4])


@pytest.mark.parametrize(
    ("text", "is_unknown"),
    [
        ("CLIENT: Received message larger than max (9 vs. 4)", True),
        ("SERVER: Sent message larger than max (9 vs. 4)", True),
        ("SERVER: Received message larger than max (9 vs. 4)", False),
        ("CLIENT: Sent message larger than max (9 vs. 4)", False),
    ],
)
def test_an_answer_that_is_too_large_answers_what_was_carried_out(
    text: str, *, is_unknown: bool
) -> None:
    """For gRPC refuses requests and answers with the same status; only an answer was preceded by work."""

    class Failed(grpc.RpcError):
        code = staticmethod(lambda: CODE.RESOURCE_EXHAUSTED)
        details = staticmethod(lambda: text)
        trailing_metadata = staticmethod(lambda: ())

    assert error_from_rpc(Failed()).is_outcome_unknown == is_unknown


def test_what_is_not_the_services_word_proves_nothing() -> None:
    """An interrupt may come at any point."""
    assert proof_of(KeyboardInterrupt()) is Proof.NOTHING
    assert proof_of(errors.Bug()) is Proof.NOTHING
