"""The client's process: runs the closed loops of loops.py against one server, as ordered on stdin.

Run as ``python -m benchmarks.load.client --server echo --target 127.0.0.1:PORT``.
"""

import argparse
import asyncio
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load import loops
from benchmarks.load.adapters import Adapter, Login, Session
from benchmarks.load.orders import obey
from benchmarks.load.peer_adapters import (
    AfternoonAdapter,
    EchoAdapter,
    MlserverAdapter,
    RedisAdapter,
)
from benchmarks.load.tenant_loop import run_tenant
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

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        """Keep the adapters, one a channel; sessions are opened as they are needed."""
        self._adapters = adapters
        self._sessions: list[list[Session]] = [[] for _ in adapters]

    async def measure(self, order: dict[str, Any]) -> dict[str, Any]:
        """Run one measurement.

        Args:
            order: mode (open, touch, unary, stream, frames, roam, paced or tenant), sessions, seconds,
                warmup_s; for stream also streams (0: one a session) and in_flight, for roam
                streams, for touch rounds, for paced rate (chunks/s), for tenant rate and is_unary.

        Returns:
            rate (chunks/s), p50_us, p99_us, messages, refused (a second); for open and touch nothing.
        """
        shares = await self._first_sessions(order["sessions"])
        tally = loops.Tally.begin(order["warmup_s"], order["seconds"])
        await asyncio.gather(
            *(
                _run(adapter, share, tally, order)
                for adapter, share in zip(self._adapters, shares, strict=True)
                if share
            )
        )
        return {} if order["mode"] in {"open", "touch"} else dict(tally.summary())

    async def _first_sessions(self, count: int) -> list[list[Session]]:
        """Return as many sessions, spread over the channels; open what is missing."""
        shares = []
        for number, adapter in enumerate(self._adapters):
            known = self._sessions[number]
            wanted = len(range(number, count, len(self._adapters)))
            if wanted > len(known):
                prefix = f"load-{os.getpid()}-{number}-{len(known)}"
                opened = await adapter.open(prefix, wanted - len(known))
                for session in opened:
                    session.index += len(known)
                known += opened
            shares.append(known[:wanted])
        return shares

    async def verify(self) -> None:
        """Check that the server does the job: outputs are right, state goes from chunk to chunk.

        Raises:
            ValueError: If an answer differs from plain NumPy.
        """
        adapter = self._adapters[0]
        if not adapter.has_state:
            return
        (session,) = await adapter.open(f"verify-{os.getpid()}", 1)
        for number, expected in enumerate(expected_outputs(adapter.sizes, VERIFIED_CHUNKS)):
            answer = await adapter.unary(session)
            adapter.accept(session, answer)
            error = float(np.max(np.abs(adapter.output_array(answer) - expected)))
            if error > TOLERANCE:
                raise ValueError(f"chunk {number + 1} differs from NumPy by {error:.2g}")


async def _run(
    adapter: Adapter, sessions: Sequence[Session], tally: loops.Tally, order: dict[str, Any]
) -> None:
    mode = order["mode"]
    if mode == "unary":
        await loops.run_unary(adapter, sessions, tally)
    elif mode == "stream":
        streams = order.get("streams") or len(sessions)
        await loops.run_streams(adapter, sessions, tally, streams, order.get("in_flight", 1))
    elif mode == "frames":
        await loops.run_frames(adapter, sessions, tally)
    elif mode == "roam":
        await loops.run_roaming(adapter, sessions, tally, order["streams"])
    elif mode == "paced":
        await loops.run_paced(adapter, sessions, tally, order["rate"])
    elif mode == "tenant" and isinstance(adapter, TimernnAdapter):
        await run_tenant(adapter, sessions, tally, order["rate"], is_unary=order["is_unary"])
    elif mode == "touch":
        await loops.touch(adapter, sessions, order["rounds"])


async def _serve(options: argparse.Namespace) -> None:
    sizes = Sizes(*options.sizes)
    make = ADAPTERS[options.server]
    if make is TimernnAdapter:
        login = Login(
            options.tls_ca.read_bytes() if options.tls_ca else b"",
            options.token_file.read_text().strip() if options.token_file else "",
        )
        make = partial(TimernnAdapter, login=login)
    adapters = [make(options.target, sizes) for _ in range(options.channels)]
    client = Client(adapters)
    await client.verify()
    await obey(options.target, client.measure)
    for adapter in adapters:
        await adapter.close()


def main() -> None:
    """Obey orders until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", required=True, choices=ADAPTERS)
    parser.add_argument("--target", required=True)
    parser.add_argument("--sizes", type=int, nargs=3, default=[16, 32, 64], metavar=("T", "D", "H"))
    parser.add_argument("--channels", type=int, default=1, help="connections, for several workers")
    parser.add_argument("--tls-ca", type=Path, help="who signed the server's certificate")
    parser.add_argument("--token-file", type=Path, help="token of each call")
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
