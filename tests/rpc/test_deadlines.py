"""One time limit for many waits."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from service.deadlines import Deadlines

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    Run = Callable[[Coroutine[Any, Any, None]], None]

HELD_S = 0.2  # longer than the limit of what waits

LOOPS = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])


def hold_loop(duration_s: float) -> None:
    """Let nothing else run in this thread, as a long computation does."""
    time.sleep(duration_s)


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


@LOOPS
@pytest.mark.parametrize(
    "is_asked_first", [True, False], ids=["held while it waits", "held before it asks"]
)
def test_time_in_which_the_loop_is_held_does_not_count(run: Run, *, is_asked_first: bool) -> None:
    """The answer came in time and lies in the socket, or the question has only just been asked."""

    async def scene() -> None:
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)
        deadlines = Deadlines(0.05)

        async def ask() -> bytes:
            return await deadlines.bound(reader.readexactly(1))

        with theirs, contextlib.closing(writer):
            other = asyncio.create_task(deadlines.bound(asyncio.sleep(0.02)))  # the timer ticks
            await asyncio.sleep(0)
            if not is_asked_first:
                hold_loop(HELD_S)
            asking = asyncio.create_task(ask())
            await asyncio.sleep(0)
            if is_asked_first:
                hold_loop(HELD_S)
            theirs.send(b"!")
            assert await asking == b"!"
            await other

    run(scene())


@LOOPS
def test_a_loop_that_is_held_again_and_again_still_ends_a_wait(run: Run) -> None:
    """Between its holds it runs, and that time counts."""

    async def scene() -> None:
        deadlines = Deadlines(0.01)
        waiting = asyncio.create_task(deadlines.bound(asyncio.Event().wait()))
        while not waiting.done():
            hold_loop(0.005)
            await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            await waiting

    run(scene())
