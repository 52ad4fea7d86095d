"""How many Python calls a lone streamed chunk takes in the server.

The number hardly depends on the machine or on what else it does, so it shows what a change adds to the way of a
chunk where the time is lost in noise. It counts calls of Python functions and of functions in C that
Python calls by name, as cProfile sees them; gRPC's own are not among them.
"""

import asyncio
import signal
from collections.abc import Sequence
from typing import Any

from benchmarks.load.lab import Lab
from benchmarks.load.loops import read
from benchmarks.load.processes import Child
from benchmarks.load.timernn_adapter import TimernnAdapter
from benchmarks.load.workload import SMALL

WARM_UP_CHUNKS = 200
COUNTED_CHUNKS = 100
COUNTS = 10


def count_calls(lab: Lab, servers: Sequence[str]) -> dict[str, float]:
    """Return the Python calls of a chunk, the only one on its way, in each of these servers."""
    return {name: asyncio.run(_count(lab.profiled_server(name))) for name in servers}


async def _count(server: Child) -> float:
    """Return the smallest of several counts: in the others the server did something else besides."""
    adapter = TimernnAdapter(server.address, SMALL)
    (session,) = await adapter.open(f"calls-{server.process.pid}", 1)
    stream = adapter.open_stream()

    async def send(chunks: int) -> None:
        for _ in range(chunks):
            await stream.write(adapter.stream_request(session))
            adapter.accept(session, await read(stream))

    await send(WARM_UP_CHUNKS)
    counts = []
    for _ in range(COUNTS):
        _signal(server)
        await send(COUNTED_CHUNKS)
        counts.append(int(_signal(server)[-1]))
    await stream.done_writing()
    await adapter.close()
    return min(counts) / COUNTED_CHUNKS


def _signal(server: Child) -> list[str]:
    """Let the server begin to count, or end, and return the words that it answers with."""
    server.process.send_signal(signal.SIGUSR1)
    stdout: Any = server.process.stdout
    words: list[str] = stdout.readline().split()
    return words
