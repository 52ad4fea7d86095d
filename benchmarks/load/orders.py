"""The orders that a measuring process gets: one JSON line in, one JSON line out.

It stays alive between measurements, so that repetitions can alternate between servers without paying
for a new process, new connections or new sessions each time.
"""

import asyncio
import json
import sys
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


async def obey(name: str, handler: Handler) -> None:
    """Say that the process is ready, then carry out orders until stdin ends.

    Args:
        name: For the ready line.
        handler: Carries out one order. An error it raises is reported as {"error": text}.
    """
    print(f"client ready on {name}", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        try:
            result = await handler(json.loads(line))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, ValueError) as error:
            # Where it came from stands in the process's log.
            traceback.print_exc()
            result = {"error": str(error)}
        print(json.dumps(result), flush=True)
