"""A chunk that was applied and cannot be computed again: metadata once, and the session goes on behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
import redis

import timernn
from service.domain.types import ModelKey
from service.store import keys

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.store.embedded import EmbeddedStore

    Way = Callable[[timernn.Client, timernn.Session, Any], Any]

XS = np.ones((1, 4, 3), "f4")
CODE = grpc.StatusCode
LOST = (CODE.UNAVAILABLE, "UNKNOWN_OUTCOME")
PASSED = (CODE.FAILED_PRECONDITION, "REPLAY_WINDOW_PASSED")


def forward(_: timernn.Client, session: timernn.Session, xs: Any) -> Any:
    """Send a chunk by itself."""
    return session.forward(xs)


def stream(_: timernn.Client, session: timernn.Session, xs: Any) -> Any:
    """Send a chunk on a stream."""
    (hs,) = session.stream([xs])
    return hs


def frame(client: timernn.Client, session: timernn.Session, xs: Any) -> Any:
    """Send a chunk in a frame."""
    (outcome,) = client.frame([(session, xs)])
    if isinstance(outcome, timernn.Error):
        raise outcome
    return outcome


def lose_outputs(stand_in: Any, refusal: Any, chunk_seq: int = 1) -> None:
    """Let the next chunk be applied, its answer be lost, and its outputs be gone after that."""
    stand_in.fail_next("Forward", refusal(*LOST), after_applying=True)
    stand_in.gone.add(chunk_seq)


@pytest.mark.parametrize("way", [forward, stream, frame])
def test_a_session_goes_on_behind_a_chunk_whose_outputs_are_gone(
    client: timernn.Client, stand_in: Any, refusal: Any, way: Way
) -> None:
    """The error says that it is applied; state and number are those behind it."""
    session = client.session("m")
    lose_outputs(stand_in, refusal)
    with pytest.raises(timernn.ReplayWindowPassed) as caught:
        way(client, session, XS)
    metadata = caught.value.metadata
    assert (metadata["applied"], metadata["chunk_seq"]) == ("true", "1")
    assert (session.chunk_seq, session.h[0, 0], session.in_doubt) == (1, 4, False)
    assert way(client, session, XS)[0, -1, 0] == 8
    assert stand_in.steps_of(session.session_id) == [4, 4]


@pytest.mark.parametrize("way", [forward, frame, stream])
def test_a_cut_sequence_is_applied_to_its_end(
    client: timernn.Client, stand_in: Any, refusal: Any, way: Way
) -> None:
    """Its second piece has no outputs any more: the third is applied all the same, each once."""
    stand_in.limits.chunk_steps = 2
    session = client.session("m")
    stand_in.apply_next("Forward")
    lose_outputs(stand_in, refusal, 2)
    with pytest.raises(timernn.ReplayWindowPassed, match="chunk 2 was applied"):
        way(client, session, np.ones((1, 6, 3)))
    assert (session.chunk_seq, session.h[0, 0]) == (3, 6)
    assert stand_in.steps_of(session.session_id) == [2, 2, 2]


def test_a_stream_gives_out_all_other_outputs(
    client: timernn.Client, stand_in: Any, refusal: Any
) -> None:
    """Going on with the chunk behind it, the outputs of those in flight come, applied once."""
    session = client.session("m")
    chunks = [np.ones((1, t, 3)) for t in (1, 2, 3, 4)]
    stand_in.apply_next("Forward")
    lose_outputs(stand_in, refusal, 2)
    got: list[float] = []
    with pytest.raises(timernn.ReplayWindowPassed, match="chunk 2 was applied"):
        got.extend(hs[0, -1, 0] for hs in session.stream(chunks))
    got += [hs[0, -1, 0] for hs in session.stream(chunks[2:])]
    assert got == [1, 6, 10]
    assert stand_in.steps_of(session.session_id) == [1, 2, 3, 4]


def test_lost_outputs_that_nobody_wants_raise_nothing(
    client: timernn.Client, stand_in: Any, refusal: Any
) -> None:
    """Settling a chunk in doubt brings the session behind it; its output is dropped anyway."""
    session = client.session("m")
    stand_in.fail_next("Forward", refusal(*LOST, 60.0), after_applying=True)  # beyond the timeout
    with pytest.raises(timernn.UnknownOutcome):
        session.forward(XS)
    stand_in.gone.add(1)
    session.settle()
    assert (session.chunk_seq, session.in_doubt) == (1, False)


def test_a_chunk_without_outputs_waits_for_no_gradient(
    client: timernn.Client, stand_in: Any, refusal: Any
) -> None:
    """There is no loss of what nobody saw: the backward before it comes next."""
    session = client.session("m", train=True)
    hs = session.forward(XS)
    lose_outputs(stand_in, refusal, 2)
    with pytest.raises(timernn.ReplayWindowPassed):
        session.forward(XS)
    session.backward(hs)
    assert stand_in.requests["Backward"][-1].chunk_seq == 1


def test_what_is_not_on_record_either_is_refused(
    client: timernn.Client, stand_in: Any, refusal: Any
) -> None:
    """Asked for less and refused again: the refusal is the answer, and nothing is in doubt."""
    session = client.session("m")
    stand_in.fail_next("Forward", *[refusal(*PASSED, applied="true")] * 2)
    with pytest.raises(timernn.ReplayWindowPassed):
        session.forward(XS)
    assert (session.chunk_seq, session.in_doubt) == (0, False)
    assert len(stand_in.requests["Forward"]) == 2


async def test_the_asyncio_frontend_goes_on_as_well(
    stand_in: Any, refusal: Any, quick: timernn.RetryPolicy
) -> None:
    """By itself, on a stream and in a frame."""
    async with timernn.aio.connect(stand_in.address, timeout=5, retry=quick) as client:
        session = await client.session("m")
        lose_outputs(stand_in, refusal)
        with pytest.raises(timernn.ReplayWindowPassed):
            await session.forward(XS)
        lose_outputs(stand_in, refusal, 2)
        with pytest.raises(timernn.ReplayWindowPassed):
            [hs async for hs in session.stream([XS])]
        lose_outputs(stand_in, refusal, 3)
        (outcome,) = await client.frame([(session, XS)])
        assert isinstance(outcome, timernn.ReplayWindowPassed)
        assert (session.chunk_seq, session.h[0, 0]) == (3, 12)


@pytest.mark.parametrize("way", [forward, stream, frame])
def test_a_chunk_of_weights_that_are_gone_is_passed_on_a_real_server(
    replicas: list[str], store: EmbeddedStore, model_id: str, rng: np.random.Generator, way: Way
) -> None:
    """Applied, never answered, its weights superseded and dropped: state and token come from the record."""
    xs = rng.normal(size=(1, 3, 3))
    with timernn.connect(replicas[:1]) as one, timernn.connect(replicas[1:]) as other:
        weights = one.create_model(model_id, input_size=3, hidden_size=2, seed=1)
        session = other.session(model_id, f"{model_id}-s")
        twin = one.session(model_id, f"{model_id}-s")
        twin.forward(xs)  # as an attempt of the other's whose answer was lost
        kept = one.get_weights(model_id)
        one.put_weights(model_id, Wx=kept.Wx, Wh=kept.Wh, b=kept.b)
        tag = keys.model_tag(ModelKey("default", model_id))
        with redis.Redis.from_url(store.url) as raw:
            raw.hdel(keys.versions_key(tag), weights.head.number.to_bytes(8, "big"))
        with pytest.raises(timernn.ReplayWindowPassed):
            way(other, session, xs)
        assert session.chunk_seq == 1
        np.testing.assert_array_equal(session.h, twin.h)
        way(other, session, xs)
        assert other.get_session(session.session_id).chunk_seq == 2
