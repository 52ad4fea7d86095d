"""One time limit for many waits."""

from __future__ import annotations

import asyncio

import pytest

from service.deadlines import Deadlines


async def test_what_ends_in_time_gives_its_result() -> None:
    """The limit leaves no trace."""
    assert await Deadlines(60).bound(asyncio.sleep(0, "done")) == "done"


async def test_what_takes_longer_is_cancelled() -> None:
    """A waiting caller gets a TimeoutError, and may go on."""
    seen: list[str] = []

    async def wait_for_ever() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    deadlines = Deadlines(0.001)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await deadlines.bound(wait_for_ever())
    assert seen == ["cancelled"] * 2
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


async def test_what_ends_otherwise_when_cancelled_has_its_own_outcome() -> None:
    """Nothing is left of the cancellation: who waits is not taken for cancelled later."""

    async def fail_when_cancelled() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ConnectionError from None

    with pytest.raises(ConnectionError):
        await Deadlines(0.001).bound(fail_when_cancelled())
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


async def test_cleaning_up_after_a_cancellation_has_a_limit_of_its_own() -> None:
    """A caller that was cancelled before gets the TimeoutError like any other."""
    raised: list[type[BaseException]] = []

    async def clean_up() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            try:
                await Deadlines(0.001).bound(asyncio.Event().wait())
            except (TimeoutError, asyncio.CancelledError) as error:
                raised.append(type(error))
            raise

    cleaning = asyncio.create_task(clean_up())
    await asyncio.sleep(0)
    cleaning.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cleaning
    assert raised == [TimeoutError]


async def test_many_waits_each_have_the_whole_time() -> None:
    """Those that wait for ever are ended, in the order in which they began, and no others."""
    deadlines = Deadlines(0.02)
    ended: list[int] = []

    async def wait(number: int) -> None:
        waiting = asyncio.Event()
        if number % 2:
            waiting.set()
        try:
            await deadlines.bound(waiting.wait())
        except TimeoutError:
            ended.append(number)

    tasks = []
    for number in range(10):
        tasks.append(asyncio.create_task(wait(number)))
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert ended == [0, 2, 4, 6, 8]


async def test_a_cancelled_wait_is_cancelled() -> None:
    """Somebody else's word is not taken for the limit's."""
    waiting = asyncio.create_task(Deadlines(60).bound(asyncio.Event().wait()))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
