"""The closed loops: every client sends its next chunk when the answer to the last one has arrived.

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

import grpc

from benchmarks.load.adapters import Adapter, Session

FRAME_SESSIONS = 64
STREAM_SESSIONS = 50_000  # touched over one stream


@dataclass(slots=True)
class Tally:
    """What one measurement saw.

    Attributes:
        start: When counting begins, seconds of the monotonic clock.
        deadline: When sending ends.
        latencies: From send to answer, seconds; one for each counted message.
        chunk_count: Counted chunks; more than messages where these are frames.
        refused_count: Counted refusals of a server that was asked for too much.
    """

    start: float
    deadline: float
    latencies: "array[float]" = field(default_factory=lambda: array("d"))
    chunk_count: int = 0
    refused_count: int = 0

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

    def refuse(self) -> bool:
        """Count one refusal; return whether there is time for another request."""
        now = time.perf_counter()
        self.refused_count += self.start <= now < self.deadline
        return now < self.deadline

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
            "refused": self.refused_count / (self.deadline - self.start),
        }


async def read(call: Any) -> Any:
    """Read the next answer of a stream.

    Raises:
        ValueError: If the server ended the stream instead.
        grpc.aio.AioRpcError: If it ended it with an error.
    """
    answer = await call.read()
    if answer is grpc.aio.EOF:
        raise ValueError(f"the server ended the stream: {await call.code()} {await call.details()}")
    return answer


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
    if len(sessions) * in_flight == 1:
        await _ping_pong(adapter, call, sessions[0], tally)
    else:
        await _pipeline(adapter, call, list(sessions) * in_flight, tally)
    await call.done_writing()


async def _ping_pong(adapter: Adapter, call: Any, session: Session, tally: Tally) -> None:
    going = True
    while going:
        sent = time.perf_counter()
        await call.write(adapter.stream_request(session))
        answer = await read(call)
        going = tally.count(sent)
        adapter.accept(session, answer)


async def _pipeline(
    adapter: Adapter, call: Any, first_round: Sequence[Session], tally: Tally
) -> None:
    """Write from one task and read from another.

    A client that writes all it may before it reads blocks itself and the server, once both
    directions' windows are full.
    """
    to_send: asyncio.Queue[Session] = asyncio.Queue()
    for session in first_round:
        to_send.put_nowait(session)
    flights = _Flights(adapter)
    writer = asyncio.create_task(_write_from(to_send, call, flights))
    try:
        missing = len(first_round)
        while missing:
            for index, answer in adapter.parts(await read(call)):
                session, sent = flights.land(index)
                adapter.accept(session, answer)
                if tally.count(sent):
                    to_send.put_nowait(session)
                else:
                    missing -= 1
    finally:
        writer.cancel()


async def _write_from(to_send: "asyncio.Queue[Session]", call: Any, flights: "_Flights") -> None:
    while True:
        await call.write(flights.depart(await to_send.get()))


class _Flights:
    """The chunks that one stream has sent and not got back."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._in_order: deque[tuple[Session, float]] = deque()
        self._by_index: dict[int, deque[tuple[Session, float]]] = {}

    def depart(self, session: Session) -> Any:
        """Return the message to send now."""
        self._queue(session.index).append((session, time.perf_counter()))
        return self._adapter.stream_request(session)

    def land(self, index: int) -> tuple[Session, float]:
        """Return the session of the next answer and when its request was sent."""
        return self._queue(index).popleft()

    def _queue(self, index: int) -> "deque[tuple[Session, float]]":
        if self._adapter.ordered_stream:
            return self._in_order
        return self._by_index.setdefault(index, deque())


async def run_frames(adapter: Adapter, sessions: Sequence[Session], tally: Tally) -> None:
    """Send frames over one stream, as a gateway with many devices does.

    A frame carries a chunk of each of `FRAME_SESSIONS` sessions. It goes again when all of its answers
    are there; a server may answer it in parts, or parts of several frames at once.
    """
    call = adapter.open_stream()
    by_index = {session.index: session for session in sessions}
    frames = [
        _Frame(sessions[first : first + FRAME_SESSIONS])
        for first in range(0, len(sessions), FRAME_SESSIONS)
    ]
    frame_of = {session.index: frame for frame in frames for session in frame.sessions}
    for frame in frames:
        await call.write(frame.depart(adapter))
    under_way = len(frames)
    while under_way:
        for index, answer in adapter.parts(await read(call)):
            adapter.accept(by_index[index], answer)
            frame = frame_of[index]
            frame.missing -= 1
            if frame.missing:
                continue
            if tally.count(frame.sent, len(frame.sessions)):
                await call.write(frame.depart(adapter))
            else:
                under_way -= 1
    await call.done_writing()


@dataclass(slots=True)
class _Frame:
    """Sessions whose chunks travel together."""

    sessions: Sequence[Session]
    sent: float = 0.0
    missing: int = 0

    def depart(self, adapter: Adapter) -> Any:
        """Return the message to send now."""
        self.sent, self.missing = time.perf_counter(), len(self.sessions)
        return adapter.frame_request(self.sessions)


def _accept_parts(adapter: Adapter, by_index: dict[int, Session], message: Any) -> int:
    parts = adapter.parts(message)
    for index, answer in parts:
        adapter.accept(by_index[index], answer)
    return len(parts)


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
        answer = await read(call)
        going = tally.count(sent)
        adapter.accept(sessions[place], answer)
        busy.remove(place)
    await call.done_writing()


async def touch(adapter: Adapter, sessions: Sequence[Session], rounds: int) -> None:
    """Send every session some chunks, in frames, as fast as one stream goes.

    A new stream now and then: one that lasts for minutes is asked to move.
    """
    for first in range(0, len(sessions), STREAM_SESSIONS):
        await _touch(adapter, sessions[first : first + STREAM_SESSIONS], rounds)


async def _touch(adapter: Adapter, sessions: Sequence[Session], rounds: int) -> None:
    call = adapter.open_stream()
    for first in range(0, len(sessions), FRAME_SESSIONS):
        share = sessions[first : first + FRAME_SESSIONS]
        by_index = {session.index: session for session in share}
        for _ in range(rounds):
            await call.write(adapter.frame_request(share))
            missing = len(share)
            while missing:
                missing -= _accept_parts(adapter, by_index, await read(call))
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
        answer = await read(call)
        going = tally.count(due)
        adapter.accept(session, answer)
        due += interval
    await call.done_writing()
