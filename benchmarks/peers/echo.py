"""A bare grpc.aio server: it reads a request's bytes and answers with bytes of the same size as a chunk's answer.

No protobuf, no state, no arithmetic: what is left is the message itself, the limit that the service is
measured against. Run as ``python -m benchmarks.peers.echo --answer-bytes 4096``.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator

import grpc

from benchmarks.peers.serving import serve

SERVICE = "timernn.benchmarks.Echo"


class Echo:
    """Answer each request with one fixed payload."""

    def __init__(self, answer_bytes: int) -> None:
        """Prepare the answer.

        Args:
            answer_bytes: Size of each answer, bytes.
        """
        self._answer = bytes(answer_bytes)

    async def unary(self, _request: bytes, _context: object) -> bytes:
        """Answer one call."""
        return self._answer

    async def stream(
        self, requests: AsyncIterator[bytes], _context: object
    ) -> AsyncIterator[bytes]:
        """Answer each message of a stream in turn."""
        async for _request in requests:
            yield self._answer


def handler(echo: Echo) -> grpc.GenericRpcHandler:
    """Register both calls without serializers, so that bytes pass as they are."""
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            "Unary": grpc.unary_unary_rpc_method_handler(echo.unary),
            "Stream": grpc.stream_stream_rpc_method_handler(echo.stream),
        },
    )


async def _run(port: int, answer_bytes: int) -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handler(Echo(answer_bytes)),))
    await serve(server, "echo", port)


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--answer-bytes", type=int, default=4096)
    options = parser.parse_args()
    asyncio.run(_run(options.port, options.answer_bytes))


if __name__ == "__main__":
    main()
