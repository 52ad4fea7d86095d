"""The closed loops: every client sends its next chunk when the answer before has come.

Three ways to send: unary calls, streams with one chunk of a session in flight (ping-pong) or several
(pipelined), and frames, where one stream message carries a chunk of each session. Answers count when they
arrive between the end of the warm-up and the deadline; what is in flight then is waited for, not counted.
"""

import asyncio
import random
import time
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.load.adapters import Adapter, Session

FRAME_SESSIONS = 64


@dataclass(slots=True)
class Tally:
    """What one measurement saw.

    Attributes:
        start: When counting begins, seconds of the monotonic clock.
        deadline: When sending ends.
        latencies: From send to answer, seconds; one for each counted message.
        chunk_count: Counted chunks; more than messages where these are frames.
    """

    start: float
    deadline: float
    latencies: "array[float]" = field(default_factory=lambda: array("d"))
    chunk_count: int = 0

    @classmethod
    def begin(cls, warmup_s: float, seconds: float) -> "Tally":
        """Start the clock now."""
        start = time.perf_counter() + warmup_s
        return cls(start, start + seconds)

    def count(self, sent: float, chunks: int = 1) -> bool:
        """Count one answer.

        Args:
            sent: When its request was sent.
            chunks: How many chunks it carries.

        Returns:
            Whether there is time for another one.
        """
        now = time.perf_counter()
        if now >= self.deadline:
            return False
        if now >= self.start:
            self.latencies.append(now - sent)
            self.chunk_count += chunks
        return True

    def summary(self) -> dict[str, float]:
        """Return the rate in chunks a second and the latency's percentiles in microseconds."""
        ordered = sorted(self.latencies)
        if not ordered:
            message = "no answer arrived inside the measured time; measure longer"
            raise ValueError(message)
        return {
            "rate": self.chunk_count / (self.deadline - self.start),
            "p50_us": 1e6 * ordered[len(ordered) // 2],
            "p99_us": 1e6 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
            "messages": len(ordered),
        }


async def run_unary(adapter: Adapter, sessions: Sequence[Session], tally: Tally) -> None:
    """Let every session's client call in a loop of its own."""
    await asyncio.gather(*(_call_in_a_loop(adapter, session, tally) for session in sessions))


async def _call_in_a_loop(adapter: Adapter, session: Session, tally: Tally) -> None:
    going = True
    while going:
        sent = time.perf_counter()
        answer = await adapter.unary(session)
        going = tally.count(sent)
        adapter.accept(session, answer)


async def run_streams(
    adapter: Adapter, sessions: Sequence[Session], tally: Tally, stream_count: int, in_flight: int
) -> None:
    """Spread the sessions over streams and keep `in_flight` chunks of each session on the way."""
    shares = [sessions[first::stream_count] for first in range(stream_count)]
    await asyncio.gather(*(_run_stream(adapter, share, tally, in_flight) for share in shares))


async def _run_stream(
    adapter: Adapter, sessions: Sequence[Session], tally: Tally, in_flight: int
) -> None:
    call = adapter.open_stream()
    flights = _Flights(adapter)
    for _ in range(in_flight):
        for session in sessions:
            await flights.send(call, session)
    while flights.count:
        answer = await call.read()
        session, sent = flights.land(answer)
        going = tally.count(sent)
        adapter.accept(session, answer)
        if going:
            await flights.send(call, session)
    await call.done_writing()


class _Flights:
    """The chunks that one stream has sent and not got back."""

    def __init__(self, adapter: Adapter) -> None:
        self.count = 0
        self._adapter = adapter
        self._in_order: deque[tuple[Session, float]] = deque()
        self._by_index: dict[int, deque[tuple[Session, float]]] = {}

    async def send(self, call: Any, session: Session) -> None:
        flight = (session, time.perf_counter())
        self._queue(session.index).append(flight)
        self.count += 1
        await call.write(self._adapter.stream_request(session))

    def land(self, answer: Any) -> tuple[Session, float]:
        self.count -= 1
        index = -1 if self._adapter.ordered_stream else self._adapter.session_index(answer)
        return self._queue(index).popleft()

    def _queue(self, index: int) -> "deque[tuple[Session, float]]":
        if self._adapter.ordered_stream:
            return self._in_order
        return self._by_index.setdefault(index, deque())


async def run_frames(
    adapter: Adapter, sessions: Sequence[Session], tally: Tally, in_flight: int
) -> None:
    """Send a chunk of every session in each message, `in_flight` messages on the way."""
    call = adapter.open_stream()
    flights: deque[float] = deque()
    for _ in range(in_flight):
        flights.append(time.perf_counter())
        await call.write(adapter.frame_request(sessions))
    while flights:
        # A server may answer a frame in parts; the next one goes when the whole is there.
        missing = len(sessions)
        while missing:
            answer = await call.read()
            missing -= adapter.accept_frame(sessions, answer)
        going = tally.count(flights.popleft(), len(sessions))
        if going:
            flights.append(time.perf_counter())
            await call.write(adapter.frame_request(sessions))
    await call.done_writing()


async def run_roaming(
    adapter: Adapter, sessions: Sequence[Session], tally: Tally, stream_count: int
) -> None:
    """Let each of some streams carry one chunk at a time, each of a session drawn at random.

    What a gateway with many devices does; no server can keep all of its sessions at hand.
    """
    rng = random.Random(0)  # noqa: S311 - which session is next is no secret
    busy: set[int] = set()
    await asyncio.gather(*(_roam(adapter, sessions, tally, rng, busy) for _ in range(stream_count)))


async def _roam(
    adapter: Adapter,
    sessions: Sequence[Session],
    tally: Tally,
    rng: random.Random,
    busy: set[int],
) -> None:
    call = adapter.open_stream()
    going = True
    while going:
        place = rng.randrange(len(sessions))
        if place in busy:
            continue
        busy.add(place)
        sent = time.perf_counter()
        await call.write(adapter.stream_request(sessions[place]))
        answer = await call.read()
        going = tally.count(sent)
        adapter.accept(sessions[place], answer)
        busy.remove(place)
    await call.done_writing()


async def touch(adapter: Adapter, sessions: Sequence[Session], rounds: int) -> None:
    """Send every session some chunks, in frames, as fast as one stream goes."""
    call = adapter.open_stream()
    for first in range(0, len(sessions), FRAME_SESSIONS):
        share = sessions[first : first + FRAME_SESSIONS]
        for _ in range(rounds):
            await call.write(adapter.frame_request(share))
            missing = len(share)
            while missing:
                missing -= adapter.accept_frame(share, await call.read())
    await call.done_writing()


async def run_paced(
    adapter: Adapter, sessions: Sequence[Session], tally: Tally, rate: float
) -> None:
    """Send on a timetable, one stream a session, whether or not the server keeps up.

    Latency counts from the time a chunk was due, so a stall shows in every chunk that waited for it.

    Args:
        adapter: The server.
        sessions: Share the rate equally, evenly apart.
        tally: Where answers are counted.
        rate: Of all sessions together, chunks/s.
    """
    interval = len(sessions) / rate
    begin = time.perf_counter()
    await asyncio.gather(
        *(
            _run_timetable(adapter, session, tally, begin + number / rate, interval)
            for number, session in enumerate(sessions)
        )
    )


async def _run_timetable(
    adapter: Adapter, session: Session, tally: Tally, due: float, interval: float
) -> None:
    call = adapter.open_stream()
    going = True
    while going:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        await call.write(adapter.stream_request(session))
        answer = await call.read()
        going = tally.count(due)
        adapter.accept(session, answer)
        due += interval
    await call.done_writing()
