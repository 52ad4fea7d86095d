"""The runbooks of docs/operations.md: each command is given to a system that is broken in that way."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import threading
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import trustme

import timernn
from instruments.processes import free_port, wait_until
from instruments.redis_servers import RedisServer
from pages import DOCS, Shell, Shown, commands_in, section_of
from secured import write_files

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = section_of((DOCS / "operations.md").read_text(), "## Runbooks")
REMEDY = "**Remedy**"
# Where the machine has none: what the runbooks need of it, by redis-py.
REDIS_CLI = f"""#!{sys.executable}
import sys, redis
_, _, url, *words = sys.argv
answer = redis.Redis.from_url(url).execute_command(*words)
for line in answer if isinstance(answer, list) else [answer]:
    print("OK" if line is True else line.decode() if isinstance(line, bytes) else line)
"""


@dataclass(frozen=True)
class Scene:
    """A store, and a shell in a folder where a server may run, on ports that are free."""

    shell: Shell
    folder: Path
    store: RedisServer
    ports: dict[str, str]

    @property
    def address(self) -> str:
        """Where the server serves."""
        return f"127.0.0.1:{self.ports['50051']}"

    def serve(self, options: str = "") -> None:
        """Start the server of the runbooks."""
        ports = "--listen 127.0.0.1:50051 --metrics-listen 127.0.0.1:9464"
        command = f"timernn serve {ports} {options} 2> server.log &"
        self.run(Shown(command, ("timernn ready on 127.0.0.1:50051",)))

    def metrics(self) -> str:
        """Return what the server counts."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports['9464']}/metrics") as answer:
            return str(answer.read().decode())

    def follow(self, text: str) -> None:
        """Give the commands that stand in a part of the page."""
        commands = commands_in(text)
        assert commands
        for shown in commands:
            self.run(shown)

    def run(self, shown: Shown) -> None:
        """Give one command, on the ports of this scene."""
        self.shell.run(
            Shown(self._here(shown.command), tuple(self._here(line) for line in shown.output))
        )

    def _here(self, text: str) -> str:
        for port, free in self.ports.items():
            text = text.replace(port, free)
        return text


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """A store alone, and a shell with the variables of the runbooks."""
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    if not shutil.which("redis-cli"):
        (tmp_path / "redis-cli").write_text(REDIS_CLI)
        (tmp_path / "redis-cli").chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TIMERNN_")}
    with RedisServer() as store, Shell(tmp_path, {**kept, "PATH": path}) as shell:
        ports = {"50051": str(free_port()), "9464": str(free_port()), "6379": str(store.port)}
        made = Scene(shell, tmp_path, store, ports)
        made.follow(PAGE.partition("\n### ")[0])
        yield made


def runbook(heading: str) -> tuple[str, str]:
    """Return the checks of a runbook, and its remedy."""
    checks, _, remedy = section_of(PAGE, f"### {heading}").partition(REMEDY)
    return checks, remedy


def test_the_store_is_full(scene: Scene) -> None:
    """The chunk that was refused is applied under its number once there is room."""
    scene.serve()
    checks, remedy = runbook("The store is full")
    with timernn.connect(scene.address) as client:
        client.create_model("m", input_size=2, hidden_size=3, optimizer=timernn.SGD(lr=0.1))
        client.session("m", session_id="old").forward(np.ones((1, 1, 2)))
        session = client.session("m", session_id="s")
        session.forward(np.ones((1, 1, 2)))
        scene.store.ask("CONFIG", "SET", "maxmemory", 1000)
        with pytest.raises(timernn.StoreFull):
            session.forward(np.ones((1, 1, 2)))
        scene.follow(checks)
        before = session.chunk_seq
        scene.follow(remedy)
        session.forward(np.ones((1, 1, 2)))
        assert session.chunk_seq == before + 1


@pytest.mark.timeout(240)
def test_the_store_is_down(scene: Scene) -> None:
    """It ends, and comes back as a replica that refuses writes until it is made the primary."""
    scene.serve()
    checks, remedy = runbook("The store is down or fails over")
    scene.store.kill()
    log = scene.folder / "server.log"
    wait_until("the log to say so", lambda: "not serving" in log.read_text())
    scene.follow(checks)
    scene.store.start()
    scene.store.follow("127.0.0.1", free_port(), wait=False)
    scene.follow(remedy)


def test_certificates_and_tokens(scene: Scene) -> None:
    """A certificate without its key and tokens that others may read are put right while it serves."""
    authority, _ = write_files(scene.folder)
    issued = authority.issue_cert("localhost", "127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(scene.folder / "tls.crt")
    issued.private_key_pem.write_to_path(scene.folder / "tls.key")
    previous = scene.folder / "previous"
    previous.mkdir()
    for name in ("tls.crt", "tls.key"):
        shutil.copy(scene.folder / name, previous)
    authority.cert_pem.write_to_path(previous / "ca.crt")
    scene.serve("--tls-cert tls.crt --tls-key tls.key --tokens tokens.toml")
    checks, remedy = runbook("Certificates and tokens")
    trustme.CA().issue_cert("other").cert_chain_pems[0].write_to_path(scene.folder / "tls.crt")
    (scene.folder / "tokens.toml").chmod(0o644)
    wait_until(
        "both to be noticed", lambda: len(re.findall("file_errors{.* 1", scene.metrics())) == 2
    )
    scene.follow(checks)
    scene.follow(remedy)


@pytest.mark.timeout(240)
def test_overload(scene: Scene) -> None:
    """Many callers of a replica that takes one operation at once."""
    (scene.folder / "tenants.toml").write_text("[default]\n")
    scene.serve("--limit-operations-in-flight 1 --tenants tenants.toml")
    checks, remedy = runbook("Overload")
    with loaded(scene.address, callers=8):
        wait_until("a refusal", lambda: "OVERLOADED" in scene.metrics())
        scene.follow(checks)
        scene.follow(remedy)


def test_a_replica_does_not_start(scene: Scene) -> None:
    """A misspelt setting, then a store that would evict."""
    scene.store.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    (scene.folder / "timernn.toml").write_text(f'listen = "{scene.address}"\ndrain-sec = 5\n')
    _, steps = section_of(PAGE, "### A replica does not start or get ready").split("**Check and")
    scene.follow(steps)


@contextlib.contextmanager
def loaded(address: str, callers: int) -> Iterator[None]:
    """Let several sessions run chunks all the time."""
    stop = threading.Event()
    with timernn.connect(address) as client:
        sgd = timernn.SGD(lr=0.1)
        client.create_model("m", input_size=64, hidden_size=256, optimizer=sgd)

        def call() -> None:
            with contextlib.suppress(timernn.Overloaded):
                session = client.session("m", batch_size=8)
                while not stop.is_set():
                    session.forward(np.ones((8, 64, 64)))

        threads = [threading.Thread(target=call) for _ in range(callers)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()
