"""Closed loops through the client library, in a process of its own.

Imports nothing of this project but `timernn`, so that the same loops can be run with the library of an
earlier checkout: `PYTHONPATH=CHECKOUT python -P library_loops.py ADDRESS`. Prints a ready line, then answers
each order, a JSON line such as {"scenario": "forward", "seconds": 2}, with a JSON line of figures.
"""

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import numpy as np

import timernn

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS, STEPS, INPUTS, HIDDEN = 1, 16, 32, 64
FRAME_SESSIONS = 64
ROUND = 100  # chunks between two readings of the clock
XS = np.random.default_rng(0).standard_normal((ROWS, STEPS, INPUTS)).astype(np.float32)


class Loops:
    """One client, its model and its sessions; each loop runs until its time is over."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._client = timernn.connect(address)
        self._model = f"library-{time.time_ns()}"
        self._client.create_model(self._model, input_size=INPUTS, hidden_size=HIDDEN)
        self._session = self._client.session(self._model)
        self._sessions = [self._client.session(self._model) for _ in range(FRAME_SESSIONS)]
        self._scenarios: dict[str, Callable[[float], int]] = {
            "forward": self._forward,
            "stream, 1 in flight": lambda until: self._stream(until, 1),
            "stream, 4 in flight": lambda until: self._stream(until, 4),
            "frame of 64": self._frame,
            "asyncio forward": lambda until: asyncio.run(self._forward_asyncio(until)),
        }

    def measure(self, scenario: str, seconds: float) -> dict[str, float]:
        """Run one loop.

        Args:
            scenario: Which, by its name in the table.
            seconds: How long.

        Returns:
            rate (chunks/s), client_us (processor time of this process a chunk, microseconds).
        """
        run = self._scenarios[scenario]
        run(time.perf_counter() + min(0.2, seconds))
        wall, work = time.perf_counter(), time.process_time()
        chunks = run(wall + seconds)
        wall, work = time.perf_counter() - wall, time.process_time() - work
        return {"rate": chunks / wall, "client_us": 1e6 * work / chunks}

    def _forward(self, until: float) -> int:
        return sum(self._session.forward(XS).shape[0] for _ in rounds(until))

    def _stream(self, until: float, in_flight: int) -> int:
        return sum(
            1
            for _ in islice(rounds(until), 0, None, ROUND)
            for _ in self._session.stream([XS] * ROUND, in_flight=in_flight)
        )

    def _frame(self, until: float) -> int:
        chunks = [(session, XS) for session in self._sessions]
        count = 0
        while time.perf_counter() < until:
            answers = self._client.frame(chunks)
            count += sum(isinstance(answer, np.ndarray) for answer in answers)
        return count

    async def _forward_asyncio(self, until: float) -> int:
        async with timernn.aio.connect(self._address) as client:
            session = await client.session(self._model)
            count = 0
            for _ in rounds(until):
                await session.forward(XS)
                count += 1
            return count


def rounds(until: float) -> Iterator[int]:
    """Count, reading the clock every `ROUND` times, until time is over."""
    for number in cycle(range(ROUND)):
        if number == 0 and time.perf_counter() >= until:
            return
        yield number


def main() -> None:
    """Serve orders until stdin ends."""
    loops = Loops(sys.argv[1])
    print(f"library ready on {sys.argv[1]}", flush=True)
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        print(json.dumps(loops.measure(order["scenario"], order["seconds"])), flush=True)


if __name__ == "__main__":
    main()
