"""The loop of one tenant among others: it sends on a timetable, whatever the server refuses."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from benchmarks.load.adapters import Session
from benchmarks.load.loops import Tally
from benchmarks.load.timernn_adapter import TimernnAdapter

Try = Callable[[Session], Awaitable[bool]]


async def run_tenant(
    adapter: TimernnAdapter,
    sessions: Sequence[Session],
    tally: Tally,
    rate: float,
    *,
    is_unary: bool,
) -> None:
    """Send `rate` requests a second, each session with one on its way; a refused one goes again when the next is due.

    Latency counts from sending. Where a tenant is refused it does not wait for as long as the server says.

    Args:
        adapter: The server.
        sessions: Share the rate equally, evenly apart, each with a stream of its own.
        tally: Where answers and refusals are counted.
        rate: Of all sessions together, requests/s.
        is_unary: Whether each is a call by itself.
    """
    began = time.perf_counter()
    await asyncio.gather(
        *(
            _run_session(
                adapter,
                session,
                tally,
                began + number / rate,
                interval=len(sessions) / rate,
                is_unary=is_unary,
            )
            for number, session in enumerate(sessions)
        )
    )


async def _run_session(
    adapter: TimernnAdapter,
    session: Session,
    tally: Tally,
    due: float,
    *,
    interval: float,
    is_unary: bool,
) -> None:
    if is_unary:
        await _keep_to(adapter.try_unary, session, tally, due, interval)
        return
    call = adapter.open_stream()
    await _keep_to(partial(adapter.try_stream, call), session, tally, due, interval)
    await call.done_writing()


async def _keep_to(send: Try, session: Session, tally: Tally, due: float, interval: float) -> None:
    going = True
    while going:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        sent = time.perf_counter()
        is_taken = await send(session)
        going = tally.count(sent) if is_taken else tally.refuse()
        due += interval
