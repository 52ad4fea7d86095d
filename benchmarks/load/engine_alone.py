"""The bare engine on the batches that a busy server would make, as ordered on stdin.

Run as ``python -m benchmarks.load.engine_alone --sizes 64 256 1024``.
"""

import argparse
import asyncio
import time
from typing import Any

import numpy as np

from benchmarks.load.loops import Tally
from benchmarks.load.orders import obey
from benchmarks.load.workload import Array, Sizes, make_chunk, make_weights
from rnn_engine import Params, rnn_forward_many


class EngineAlone:
    """Runs chunks of many sequences in one process, with no message and no store."""

    def __init__(self, sizes: Sizes) -> None:
        """Load the weights."""
        self._params = Params(**make_weights(sizes))
        self._xs = make_chunk(sizes)[None]
        self._zero = np.zeros((1, sizes.hidden), np.float32)

    async def measure(self, order: dict[str, Any]) -> dict[str, Any]:
        """Run batches of one chunk of each session.

        Args:
            order: sessions, seconds, warmup_s.
        """
        states = [self._zero] * order["sessions"]
        tally = Tally.begin(order["warmup_s"], order["seconds"])
        going = True
        while going:
            sent = time.perf_counter()
            states = self._advance(states)
            going = tally.count(sent, len(states))
        return dict(tally.summary())

    def _advance(self, states: list[Array]) -> list[Array]:
        hs = rnn_forward_many(self._params, [self._xs] * len(states), states)
        return [np.ascontiguousarray(rows[:, -1]) for rows in hs]


def main() -> None:
    """Obey orders until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs=3, required=True, metavar=("T", "D", "H"))
    alone = EngineAlone(Sizes(*parser.parse_args().sizes))
    asyncio.run(obey("engine", alone.measure))


if __name__ == "__main__":
    main()
