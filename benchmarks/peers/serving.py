"""What every peer's process does the same way: bind, say so in one line, stop on SIGTERM."""

import asyncio
import signal

import grpc


async def serve(server: grpc.aio.Server, name: str, port: int) -> None:
    """Start a server on loopback and wait for SIGTERM.

    Args:
        server: With its handlers added, not started.
        name: For the ready line, ``NAME ready on 127.0.0.1:PORT``.
        port: 0 picks a free one.
    """
    bound_port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    print(f"{name} ready on 127.0.0.1:{bound_port}", flush=True)
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()
    await server.stop(grace=0)
