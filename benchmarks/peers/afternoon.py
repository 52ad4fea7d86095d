"""The server that a competent user writes in an afternoon: grpc.aio, torch.nn.RNN, Redis GET and SET.

It keeps each session's hidden state in Redis as the service does, and nothing else: no exactly-once, no
epochs, no batching across sessions. The code is what its author would call done: torch on one thread in
inference mode, tensors made over the received bytes without a copy, the asyncio Redis client with the
hiredis parser. The network runs on the event loop, which is faster for chunks of this size than handing
it to a thread. Run as ``python -m benchmarks.peers.afternoon --redis-url URL --weights FILE.npz``.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import redis.asyncio
import torch

from benchmarks.peers import afternoon_pb2, afternoon_pb2_grpc
from benchmarks.peers.serving import serve

SESSION_TTL_S = 3600
MAX_MESSAGE_BYTES = 16 << 20


def load_network(weights: Path) -> torch.nn.RNN:
    """Build torch's network from saved weights.

    Args:
        weights: An npz file with Wx (D, H), Wh (H, H) and b (H,), float32.

    Returns:
        The network, batch first, in evaluation mode.
    """
    saved = np.load(weights)
    network = torch.nn.RNN(*saved["Wx"].shape, batch_first=True)
    with torch.no_grad():
        network.weight_ih_l0.copy_(torch.from_numpy(saved["Wx"].T.copy()))
        network.weight_hh_l0.copy_(torch.from_numpy(saved["Wh"].T.copy()))
        network.bias_ih_l0.copy_(torch.from_numpy(saved["b"]))
        network.bias_hh_l0.zero_()
    return network.eval()


class Afternoon(afternoon_pb2_grpc.AfternoonServiceServicer):
    """Run chunks, with h in Redis between them."""

    def __init__(self, network: torch.nn.RNN, store: "redis.asyncio.Redis") -> None:
        """Keep the network and the Redis client."""
        self._network = network
        self._store = store

    async def Forward(  # noqa: N802 - the name is the contract's
        self, request: afternoon_pb2.Chunk, _context: object
    ) -> afternoon_pb2.Outputs:
        """Run one chunk."""
        return await self._advance(request)

    async def Stream(  # noqa: N802 - the name is the contract's
        self, requests: AsyncIterator[afternoon_pb2.Chunk], _context: object
    ) -> AsyncIterator[afternoon_pb2.Outputs]:
        """Run chunks as they come."""
        async for request in requests:
            yield await self._advance(request)

    async def _advance(self, request: afternoon_pb2.Chunk) -> afternoon_pb2.Outputs:
        key = "h:" + request.session_id
        saved = await self._store.get(key)
        hs, h = self._run(request.xs, request.steps, saved)
        await self._store.set(key, h, ex=SESSION_TTL_S)
        return afternoon_pb2.Outputs(hs=hs)

    @torch.inference_mode()
    def _run(self, data: bytes, steps: int, saved: bytes | None) -> tuple[bytes, bytes]:
        xs = torch.frombuffer(bytearray(data), dtype=torch.float32).view(1, steps, -1)
        h0 = None
        if saved is not None:
            h0 = torch.frombuffer(bytearray(saved), dtype=torch.float32).view(1, 1, -1)
        hs, h = self._network(xs, h0)
        return hs.numpy().tobytes(), h.numpy().tobytes()


async def _run(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    limits = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ]
    server = grpc.aio.server(options=limits)
    store = redis.asyncio.Redis.from_url(options.redis_url)
    servicer = Afternoon(load_network(options.weights), store)
    afternoon_pb2_grpc.add_AfternoonServiceServicer_to_server(servicer, server)
    await serve(server, "afternoon", options.port)
    await store.aclose()


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    asyncio.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
