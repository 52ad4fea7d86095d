"""The client's process: runs the closed loops of loops.py against one server, as ordered on stdin.

Run as ``python -m benchmarks.load.client --server echo --target 127.0.0.1:PORT``.
"""

import argparse
import asyncio
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.load.adapters import Adapter, Session
from benchmarks.load.loops import Tally, run_frames, run_paced, run_streams, run_unary
from benchmarks.load.orders import obey
from benchmarks.load.peer_adapters import (
    AfternoonAdapter,
    EchoAdapter,
    MlserverAdapter,
    RedisAdapter,
)
from benchmarks.load.timernn_adapter import TimernnAdapter
from benchmarks.load.workload import Sizes, expected_outputs

VERIFIED_CHUNKS = 3
TOLERANCE = 1e-4

ADAPTERS: dict[str, Callable[[str, Sizes], Adapter]] = {
    "echo": EchoAdapter,
    "afternoon": AfternoonAdapter,
    "mlserver": MlserverAdapter,
    "redis": RedisAdapter,
    "timernn": TimernnAdapter,
}


class Client:
    """Runs one measurement after another against one server."""

    def __init__(self, adapter: Adapter) -> None:
        """Keep the adapter; sessions are opened as they are needed."""
        self._adapter = adapter
        self._sessions: list[Session] = []

    async def _first_sessions(self, count: int) -> list[Session]:
        known = len(self._sessions)
        if count > known:
            opened = await self._adapter.open(f"load-{os.getpid()}-{known}", count - known)
            for session in opened:
                session.index += known
            self._sessions += opened
        return self._sessions[:count]

    async def measure(self, order: dict[str, Any]) -> dict[str, Any]:
        """Run one measurement.

        Args:
            order: mode (open, unary, stream, frames or paced), sessions, seconds, warmup_s; for
                stream also streams (0: one a session) and in_flight, for paced the rate.

        Returns:
            rate (chunks/s), p50_us, p99_us, messages; for open nothing.
        """
        sessions = await self._first_sessions(order["sessions"])
        if order["mode"] == "open":
            return {}
        tally = Tally.begin(order["warmup_s"], order["seconds"])
        if order["mode"] == "unary":
            await run_unary(self._adapter, sessions, tally)
        elif order["mode"] == "stream":
            streams = order.get("streams") or len(sessions)
            in_flight = order.get("in_flight", 1)
            await run_streams(self._adapter, sessions, tally, streams, in_flight)
        elif order["mode"] == "frames":
            await run_frames(self._adapter, sessions, tally, order.get("in_flight", 1))
        else:
            await run_paced(self._adapter, sessions, tally, order["rate"])
        return dict(tally.summary())

    async def verify(self) -> None:
        """Check that the server does the job: outputs are right, state goes from chunk to chunk.

        Raises:
            ValueError: If an answer differs from plain NumPy.
        """
        if not self._adapter.has_state:
            return
        (session,) = await self._adapter.open(f"verify-{os.getpid()}", 1)
        for number, expected in enumerate(expected_outputs(self._adapter.sizes, VERIFIED_CHUNKS)):
            answer = await self._adapter.unary(session)
            self._adapter.accept(session, answer)
            error = float(np.max(np.abs(self._adapter.output_array(answer) - expected)))
            if error > TOLERANCE:
                raise ValueError(f"chunk {number + 1} differs from NumPy by {error:.2g}")


async def _run(options: argparse.Namespace) -> None:
    adapter = ADAPTERS[options.server](options.target, Sizes(*options.sizes))
    client = Client(adapter)
    await client.verify()
    await obey(options.target, client.measure)
    await adapter.close()


def main() -> None:
    """Obey orders until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", required=True, choices=ADAPTERS)
    parser.add_argument("--target", required=True)
    parser.add_argument("--sizes", type=int, nargs=3, default=[16, 32, 64], metavar=("T", "D", "H"))
    asyncio.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
