"""Steps of one model that several sessions of a client ask for at once: each is sent by one of them."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

import timernn

if TYPE_CHECKING:
    from collections.abc import Iterator

XS = np.ones((1, 4, 3), "f4")
DHS = np.ones((1, 4, 2), "f4")
SESSIONS = 8


@pytest.fixture
def trainers(client: timernn.Client) -> list[timernn.Session]:
    """Sessions of one model, each with a contribution."""
    sessions = [client.session("m", train=True) for _ in range(SESSIONS)]
    for session in sessions:
        session.forward(XS)
        session.backward(DHS)
    return sessions


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """A thread for each session."""
    with ThreadPoolExecutor(SESSIONS) as threads:
        yield threads


async def contributed(client: timernn.aio.Client, count: int) -> list[timernn.aio.Session]:
    """Open sessions of one model, each with a contribution."""
    sessions = [await client.session("m", train=True) for _ in range(count)]
    for session in sessions:
        await session.forward(XS)
        await session.backward(DHS)
    return sessions


def lose_step(session: timernn.Session, stand_in: Any, refusal: Any) -> None:
    """Make a step whose answer is lost, and for whose repetition the time does not suffice."""
    lost = refusal(grpc.StatusCode.UNAVAILABLE, "UNKNOWN_OUTCOME", 60.0)
    stand_in.fail_next("Update", lost, after_applying=True)
    with pytest.raises(timernn.UnknownOutcome):
        session.update()


def test_steps_of_threads_take_turns(
    trainers: list[timernn.Session], stand_in: Any, pool: ThreadPoolExecutor
) -> None:
    """Each is sent once, on the head that the one before has made."""
    with stand_in.hold("Update"):
        steps = [pool.submit(session.update) for session in trainers]
        stand_in.wait_for("Update")
    made = sorted(step.result(10).number for step in steps)
    assert made == list(range(2, SESSIONS + 2))
    expected = [request.expected_version.number for request in stand_in.requests["Update"]]
    assert expected == list(range(1, SESSIONS + 1))


async def test_steps_of_tasks_take_turns(stand_in: Any, quick: timernn.RetryPolicy) -> None:
    """Each is sent once, on the head that the one before has made."""
    async with timernn.aio.connect(stand_in.address, timeout=5, retry=quick) as client:
        sessions = await contributed(client, SESSIONS)
        made = await asyncio.gather(*(session.update() for session in sessions))
    assert sorted(version.number for version in made) == list(range(2, SESSIONS + 2))
    expected = [request.expected_version.number for request in stand_in.requests["Update"]]
    assert expected == list(range(1, SESSIONS + 1))


def test_backwards_that_step_take_turns(
    client: timernn.Client, stand_in: Any, pool: ThreadPoolExecutor
) -> None:
    """Each expects the head that the one before has made, whichever way that was made."""
    sessions = [client.session("m", train=True) for _ in range(3)]
    for session in sessions:
        session.forward(XS)
    sessions[0].backward(DHS)
    with stand_in.hold("Update"):
        first = pool.submit(sessions[0].update)
        stand_in.wait_for("Update")
        steps = [pool.submit(one.backward, DHS, update=timernn.Step()) for one in sessions[1:]]
        assert not any(step.done() for step in steps)
    assert first.result(10).number == 2
    for step in steps:
        step.result(10)
    made = [one.last_update.version.number for one in sessions[1:] if one.last_update]
    assert sorted(made) == [3, 4]
    expected = [one.update.expected_version.number for one in stand_in.requests["Backward"][1:]]
    assert expected == [2, 3]


async def test_backwards_of_tasks_that_step_take_turns(
    stand_in: Any, quick: timernn.RetryPolicy
) -> None:
    """Each expects the head that the one before has made."""
    async with timernn.aio.connect(stand_in.address, timeout=5, retry=quick) as client:
        sessions = [await client.session("m", train=True) for _ in range(3)]
        for session in sessions:
            await session.forward(XS)
        await asyncio.gather(*(one.backward(DHS, update=timernn.Step()) for one in sessions))
    expected = [one.update.expected_version.number for one in stand_in.requests["Backward"]]
    assert expected == [1, 2, 3]


def test_a_step_over_all_that_waits_takes_its_turn(
    trainers: list[timernn.Session],
    client: timernn.Client,
    stand_in: Any,
    pool: ThreadPoolExecutor,
) -> None:
    """It moves no head away from under another step of the same client."""
    with stand_in.hold("Update"):
        first = pool.submit(client.update, "m", [trainers[0].session_id])
        stand_in.wait_for("Update")
        second = pool.submit(trainers[1].update)
        assert not second.done()
    assert (first.result(10).version.number, second.result(10).number) == (2, 3)
    assert stand_in.requests["Update"][1].expected_version.number == 2


async def test_a_cancelled_step_gives_its_turn_to_the_next(
    stand_in: Any, quick: timernn.RetryPolicy
) -> None:
    """The next one settles it first, and then makes its own."""
    async with timernn.aio.connect(stand_in.address, timeout=5, retry=quick) as client:
        one, two = await contributed(client, 2)
        with stand_in.hold("Update"):
            first = asyncio.create_task(one.update())
            await asyncio.to_thread(stand_in.wait_for, "Update")
            second = asyncio.create_task(two.update())
            first.cancel()
            await asyncio.wait([first])
        assert (await second).number == 3
    ids = [request.request_id for request in stand_in.requests["Update"]]
    assert ids[0] == ids[1] != ids[2]


async def test_a_step_that_another_session_settled_is_returned_to_who_asks_again(
    stand_in: Any, quick: timernn.RetryPolicy
) -> None:
    """Cancelled, made by the next call of another session, and asked for once more: its result."""
    async with timernn.aio.connect(stand_in.address, timeout=5, retry=quick) as client:
        one, two = await contributed(client, 2)
        with stand_in.hold("Update"):
            first = asyncio.create_task(one.update(lr=0.5))
            await asyncio.to_thread(stand_in.wait_for, "Update")
            first.cancel()
            await asyncio.wait([first])
        assert (await two.update()).number == 3
        assert (await one.update(lr=0.5)).number == 2
        with pytest.raises(timernn.NoGradients):
            await one.update(lr=0.5)


def test_a_step_over_several_sessions_that_another_settled_is_returned_once(
    client: timernn.Client, trainers: list[timernn.Session], stand_in: Any, refusal: Any
) -> None:
    """To the same call again; afterwards nothing waits, for any of them."""
    lost = refusal(grpc.StatusCode.UNAVAILABLE, "UNKNOWN_OUTCOME", 60.0)
    stand_in.fail_next("Update", lost, after_applying=True)
    with pytest.raises(timernn.UnknownOutcome):
        client.update("m", sessions=trainers[:2])
    trainers[2].update()
    assert client.update("m", sessions=trainers[:2]).version.number == 2
    for trainer in trainers[:2]:
        with pytest.raises(timernn.NoGradients):
            trainer.update()


def test_another_step_than_the_settled_one_is_refused_by_its_version(
    trainers: list[timernn.Session], stand_in: Any, refusal: Any
) -> None:
    """Once, as where the session settled it itself."""
    lose_step(trainers[0], stand_in, refusal)
    trainers[1].update()
    with pytest.raises(timernn.NoGradients) as caught:
        trainers[0].update(lr=0.25)
    assert caught.value.metadata["version"] == "2"


@pytest.mark.parametrize("kind", ["forward", "frame", "stream"])
def test_a_step_under_way_is_no_reason_to_wait(
    trainers: list[timernn.Session],
    client: timernn.Client,
    stand_in: Any,
    pool: ThreadPoolExecutor,
    kind: str,
) -> None:
    """Chunks of another session of the model are applied meanwhile, and send nothing of the step."""
    one, two = trainers[:2]
    with stand_in.hold("Update"):
        step = pool.submit(one.update)
        stand_in.wait_for("Update")
        match kind:
            case "forward":
                two.forward(XS)
            case "frame":
                client.frame([(two, XS)])
            case "stream":
                list(two.stream([XS]))
        assert not step.done()
    assert step.result(10).number == 2
    assert len(stand_in.requests["Update"]) == 1


def test_a_step_in_doubt_is_settled_by_one_of_several_sessions(
    trainers: list[timernn.Session], stand_in: Any, refusal: Any, pool: ThreadPoolExecutor
) -> None:
    """Those who find it in doubt at once wait for the one that sends it."""
    lose_step(trainers[0], stand_in, refusal)
    with stand_in.hold("Update"):
        calls = [pool.submit(session.settle) for session in trainers]
        stand_in.wait_for("Update")
    for call in calls:
        call.result(10)
    assert len({request.request_id for request in stand_in.requests["Update"]}) == 1
    assert len(stand_in.requests["Update"]) == 2
    assert not any(session.in_doubt for session in trainers)
