"""A real server as a process of its own, and commands against it.

The commands of a test run inside it, which saves a second each; that the process around them adds
nothing but its exit code is tested once a kind.
"""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from service.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

READY = "timernn ready on "
LIMIT_S = 60


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int
    out: str
    err: str


@dataclass
class Running:
    """A server that serves."""

    process: subprocess.Popen[str]
    address: str
    log: Path


def environment(**extra: str) -> dict[str, str]:
    """Return this process's environment without settings of the command line, and with some."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TIMERNN_")}
    return {**kept, "COLUMNS": "100", **extra}


def run(*arguments: str, **env: str) -> Finished:
    """Run `timernn` with these arguments to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=environment(**env),
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


@contextmanager
def running(folder: Path, *arguments: str, **env: str) -> Iterator[Running]:
    """Run a server on a free port with its store in folder; kill it at the end if it still runs."""
    log = folder / "server.log"
    command = [sys.executable, "-m", "service", "serve", "--listen", "127.0.0.1:0"]
    command += ["--data-dir", str(folder / "store"), *arguments]
    with log.open("a") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment(**env)
        )
    assert process.stdout is not None
    watchdog = threading.Timer(LIMIT_S, process.kill)
    watchdog.start()
    try:
        line = process.stdout.readline()
        watchdog.cancel()
        assert line.startswith(READY), log.read_text()
        yield Running(process, line.removeprefix(READY).strip(), log)
    finally:
        watchdog.cancel()
        process.terminate()
        try:
            process.wait(LIMIT_S)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


@pytest.fixture(scope="session")
def serving() -> Callable[..., AbstractContextManager[Running]]:
    """The function that runs a server, for tests that end it."""
    return running


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that the tests of client commands share, each under its own names."""
    with running(tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture
def timernn(server: Running, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finished]:
    """Run a client command against the shared server, within the test."""
    monkeypatch.setenv("TIMERNN_SERVER", server.address)

    def command(*arguments: str) -> Finished:
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            code = main(arguments)
        return Finished(code, out.getvalue(), err.getvalue())

    return command


@pytest.fixture(scope="session")
def bare() -> Callable[..., Finished]:
    """Run a command as a process of its own, against no server unless it is named."""
    return run


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address that is taken and answers to nobody: bound, not listening."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"
