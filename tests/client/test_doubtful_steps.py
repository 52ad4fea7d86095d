"""Steps whose answer was lost: what settling them has done is said, also when nobody can know it any more."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest

import timernn

XS = np.ones((1, 4, 3), "f4")
DHS = np.ones((1, 4, 2), "f4")
CODE = grpc.StatusCode
MEMORY_S = 1800.0  # twice tape_ttl, which the stand-in does not report
FAR = 60.0  # a time to retry beyond the client's timeout


@pytest.fixture
def trainer(client: timernn.Client) -> timernn.Session:
    """A session whose newest chunk waits for its backward."""
    session = client.session("m", train=True)
    session.forward(XS)
    return session


def sleep(session: timernn.Session, seconds: float) -> None:
    """Let the clock of a session's client run on."""
    ages = session._core.context.ages
    now = ages.read
    ages.read = lambda: tuple(each + seconds for each in now())


def lose_step(session: timernn.Session, stand_in: Any, refusal: Any, *, inline: bool) -> None:
    """Make a step, in a backward or by itself, whose answer is lost."""
    lost = refusal(CODE.UNAVAILABLE, "UNKNOWN_OUTCOME", FAR)
    stand_in.fail_next("Backward" if inline else "Update", lost, after_applying=True)
    if not inline:
        session.backward(DHS)
    with pytest.raises(timernn.UnknownOutcome):
        ask(session, inline=inline)
    stand_in.requests.clear()


def ask(session: timernn.Session, *, inline: bool) -> Any:
    """Ask for the step."""
    return session.backward(DHS, update=timernn.Step()) if inline else session.update()


@pytest.mark.parametrize("inline", [False, True])
def test_a_step_that_nobody_may_remember_is_not_reported_as_refused(
    stand_in: Any, refusal: Any, trainer: timernn.Session, *, inline: bool
) -> None:
    """Older than the server's memory, and the head went on: nothing is sent, and the doubt ends."""
    lose_step(trainer, stand_in, refusal, inline=inline)
    sleep(trainer, MEMORY_S + 1)
    with pytest.raises(timernn.OutcomeLost, match="the head is version 2") as caught:
        ask(trainer, inline=inline)
    assert not caught.value.is_outcome_unknown
    assert (stand_in.requests["Update"], stand_in.requests["Backward"]) == ([], [])
    assert not trainer.in_doubt
    with pytest.raises(timernn.NoGradients):
        trainer.update()
    trainer.forward(XS)
    trainer.backward(DHS)
    assert trainer.update().number == 3


@pytest.mark.parametrize("inline", [False, True])
def test_a_step_that_is_remembered_is_asked_for_again(
    stand_in: Any, refusal: Any, trainer: timernn.Session, *, inline: bool
) -> None:
    """Within that time its answer comes, and it is made once."""
    lose_step(trainer, stand_in, refusal, inline=inline)
    sleep(trainer, MEMORY_S - 1)
    ask(trainer, inline=inline)
    assert trainer.version is not None
    assert (trainer.version.number, stand_in.version) == (2, 2)


@pytest.mark.parametrize("inline", [False, True])
def test_an_old_step_is_made_where_the_head_is_the_expected_one(
    stand_in: Any, refusal: Any, trainer: timernn.Session, *, inline: bool
) -> None:
    """Nobody has made any step since, so this one was not made."""
    trainer.backward(DHS) if not inline else None
    method = "Backward" if inline else "Update"
    stand_in.fail_next(method, refusal(CODE.UNAVAILABLE, "UNKNOWN_OUTCOME", FAR))
    with pytest.raises(timernn.UnknownOutcome):
        ask(trainer, inline=inline)
    sleep(trainer, MEMORY_S + 1)
    ask(trainer, inline=inline)
    assert stand_in.version == 2


def test_a_sleep_between_two_attempts_of_one_call_is_noticed(
    stand_in: Any, refusal: Any, trainer: timernn.Session
) -> None:
    """Suspended after the first attempt, the refusal of the second proves nothing."""
    trainer.backward(DHS)
    stand_in.fail_next("Update", refusal(CODE.UNAVAILABLE, "UNKNOWN_OUTCOME"), after_applying=True)
    stand_in.fail_next("Update", refusal(CODE.ABORTED, "VERSION_CONFLICT", head="2"))
    ages = trainer._core.context.ages
    now = ages.read
    slept = [0.0, 0.0, MEMORY_S + 1]  # by the number of attempts
    ages.read = lambda: tuple(each + slept[len(stand_in.requests["Update"])] for each in now())
    with pytest.raises(timernn.OutcomeLost):
        trainer.update()


def test_the_settled_step_answers_the_update_that_asks_for_it(
    client: timernn.Client, stand_in: Any, refusal: Any
) -> None:
    """A cut backward whose last piece found no room: update() makes its step and returns it."""
    session = cut_backward(client, stand_in, refusal)
    assert session.update().number == 2
    assert session.last_update is not None
    assert session.last_update.contribution_count == 2
    assert stand_in.requests["Update"] == []


def test_an_update_that_asks_for_another_step_says_which_was_made(
    client: timernn.Client, stand_in: Any, refusal: Any
) -> None:
    """The step in doubt counts, and took all that waited: the error names its version."""
    session = cut_backward(client, stand_in, refusal)
    with pytest.raises(timernn.NoGradients, match="is made and took all that waited") as caught:
        session.update(lr=0.5)
    assert caught.value.metadata["version"] == "2"
    assert session.version is not None
    assert session.version.number == 2


def cut_backward(client: timernn.Client, stand_in: Any, refusal: Any) -> timernn.Session:
    """Leave a backward of two pieces in doubt, whose second made no step on a full store."""
    stand_in.limits.chunk_steps = 2
    session = client.session("m", train=True)
    session.forward(XS)
    stand_in.apply_next("Backward")
    full = refusal(CODE.RESOURCE_EXHAUSTED, "STORE_FULL", recorded="true")
    stand_in.fail_next("Backward", full)
    with pytest.raises(timernn.StoreFull):
        session.backward(DHS, update=timernn.Step())
    assert session.in_doubt
    return session


def test_another_update_says_which_one_was_made(
    stand_in: Any, refusal: Any, trainer: timernn.Session
) -> None:
    """An update in doubt, then one with another rate: the first counts, and is named."""
    lose_step(trainer, stand_in, refusal, inline=False)
    with pytest.raises(timernn.NoGradients, match="is made and took all that waited"):
        trainer.update(lr=0.5)
    assert trainer.version is not None
    assert trainer.version.number == 2


def test_another_sessions_step_is_no_answer(
    client: timernn.Client, stand_in: Any, refusal: Any, trainer: timernn.Session
) -> None:
    """Settled on the way, it took nothing of this session, which has nothing to update."""
    other = client.session("m", train=True)
    lose_step(trainer, stand_in, refusal, inline=False)
    with pytest.raises(timernn.NoGradients, match="no backward"):
        other.update()


def test_a_step_made_with_a_backward_is_asked_for_by_itself(
    stand_in: Any, refusal: Any, trainer: timernn.Session
) -> None:
    """Its tape has expired, its gradient was recorded and consumed: the request id finds the step."""
    lose_step(trainer, stand_in, refusal, inline=True)
    gone = refusal(CODE.FAILED_PRECONDITION, "TAPE_MISSING", counted="true")
    stand_in.fail_next("Backward", gone)
    with pytest.raises(timernn.TapeMissing):
        ask(trainer, inline=True)
    assert trainer.update().number == 2
    assert stand_in.version == 2


@pytest.mark.parametrize("again", [True, False])
def test_a_servers_bug_behind_a_recorded_gradient_leaves_its_backward_in_doubt(
    stand_in: Any, refusal: Any, trainer: timernn.Session, *, again: bool
) -> None:
    """INTERNAL says nothing of what was recorded: asked again or settled, it counts once, and one step is made."""
    stand_in.fail_next("inline Update", refusal(CODE.INTERNAL, "BUG", id="1"))
    with pytest.raises(timernn.Bug) as caught:
        ask(trainer, inline=True)
    assert caught.value.is_outcome_unknown
    assert trainer.in_doubt
    ask(trainer, inline=True) if again else trainer.update()
    assert trainer.last_update is not None
    assert trainer.last_update.contribution_count == 1
    assert (stand_in.version, trainer.in_doubt, trainer._core.state.contributions()) == (
        2,
        False,
        [],
    )


async def test_the_asyncio_frontend_raises_it_too(
    stand_in: Any, refusal: Any, quick: timernn.RetryPolicy
) -> None:
    """An old step in doubt, and one that settling makes."""
    async with timernn.aio.connect(stand_in.address, timeout=5, retry=quick) as client:
        session = await client.session("m", train=True)
        await session.forward(XS)
        lost = refusal(CODE.UNAVAILABLE, "UNKNOWN_OUTCOME", FAR)
        stand_in.fail_next("Backward", lost, after_applying=True)
        with pytest.raises(timernn.UnknownOutcome):
            await session.backward(DHS, update=timernn.Step())
        assert (await session.update()).number == 2
        await session.forward(XS)
        await session.backward(DHS)
        stand_in.fail_next("Update", lost, after_applying=True)
        with pytest.raises(timernn.UnknownOutcome):
            await session.update()
        now = client._core.context.ages.read
        client._core.context.ages.read = lambda: tuple(each + MEMORY_S + 1 for each in now())
        with pytest.raises(timernn.OutcomeLost):
            await session.update()
