"""`timernn serve` as a process: its one line, its exit code, its errors."""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING, Any

import pytest

from service.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Serving = Any
Run = "Callable[..., Any]"


def one_line(text: str) -> str:
    """Return the only line of a text."""
    assert text.count("\n") == 1, text
    return text.strip()


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_stopped_exits_with_0(
    serving: Serving, tmp_path: Path, sign: signal.Signals
) -> None:
    """SIGTERM and Ctrl-C end a server well, and stdout had the ready line alone."""
    with serving(tmp_path) as server:
        server.process.send_signal(sign)
        rest, _ = server.process.communicate(timeout=60)
        assert (server.process.returncode, rest) == (0, "")


def test_the_ready_line_names_the_port_that_was_picked(
    serving: Serving, bare: Callable[..., Any], tmp_path: Path
) -> None:
    """Port 0 becomes a real one, on which the server answers."""
    with serving(tmp_path) as server:
        assert int(server.address.rpartition(":")[2]) > 0
        assert bare("ping", "--server", server.address).code == 0


def test_a_killed_server_s_models_are_there_again(
    serving: Serving, bare: Callable[..., Any], tmp_path: Path
) -> None:
    """What was acknowledged before kill -9 is found by the next server on the same folder."""
    with serving(tmp_path) as first:
        created = bare(
            "models", "create", "kept", "--input-size=2", "--hidden-size=3",
            "--server", first.address,
        )  # fmt: skip
        assert created.code == 0, created.err
        first.process.kill()
        first.process.wait()
    with serving(tmp_path) as second:
        assert bare("models", "show", "kept", "--server", second.address).code == 0


def test_settings_come_from_the_environment(
    serving: Serving, bare: Callable[..., Any], tmp_path: Path
) -> None:
    """A limit set by its variable is the limit that the server reports."""
    with serving(tmp_path, TIMERNN_LIMIT_REPLAY_WINDOW="9") as server:
        shown = bare("ping", "--json", "--server", server.address).out
    assert '"replay_window": 9' in shown


def test_an_address_that_others_reach_is_warned_of(serving: Serving, tmp_path: Path) -> None:
    """Without encryption or login, a wildcard address is worth a line."""
    with serving(tmp_path, "--listen", "0.0.0.0:0", "--insecure") as server:
        assert "0.0.0.0:0 may be reached from other machines" in server.log.read_text()


def test_a_bad_redis_url_is_one_line(bare: Callable[..., Any]) -> None:
    """A URL of no known kind is refused before anything starts."""
    failed = bare("serve", "--listen", "127.0.0.1:0", "--redis-url", "http://localhost")
    assert failed.code == 1
    assert "redis://" in one_line(failed.err)


def test_a_store_that_does_not_answer_is_one_line(bare: Callable[..., Any], nobody: str) -> None:
    """A server that cannot reach its store says so and does not become ready."""
    failed = bare("serve", "--listen", "127.0.0.1:0", "--redis-url", f"redis://{nobody}/0")
    assert (failed.code, failed.out) == (1, "")
    assert one_line(failed.err).startswith("timernn: ")


def test_a_folder_in_use_is_one_line(
    serving: Serving, bare: Callable[..., Any], tmp_path: Path
) -> None:
    """A second server on the same folder gets an error that names the owner."""
    with serving(tmp_path):
        failed = bare("serve", "--listen", "127.0.0.1:0", "--data-dir", str(tmp_path / "store"))
    assert failed.code == 1
    assert "another process runs a store" in one_line(failed.err)


def test_a_port_in_use_is_one_line(
    serving: Serving, bare: Callable[..., Any], tmp_path: Path
) -> None:
    """Two servers cannot share one port by accident."""
    with serving(tmp_path) as server:
        data = str(tmp_path / "other")
        failed = bare("serve", "--listen", server.address, "--data-dir", data)
    assert failed.code == 1
    assert server.address in one_line(failed.err)


@pytest.mark.parametrize("text", ["before_commit=exit", "before_lunch=exit", "before_commit=dance"])
@pytest.mark.parametrize("is_variable", [False, True], ids=["option", "variable"])
def test_failpoints_are_refused_in_production(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    *,
    is_variable: bool,
) -> None:
    """Neither an option nor a variable lets a server die on purpose unless --testing stands beside it."""
    if is_variable:
        monkeypatch.setenv("TIMERNN_FAILPOINTS", text)
    options = () if is_variable else ("--failpoints", text)
    assert main(["serve", "--listen", "127.0.0.1:0", *options]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "--failpoints" in one_line(said.err)


def test_the_log_tells_the_start_and_at_debug_each_call(
    serving: Serving, bare: Callable[..., Any], tmp_path: Path
) -> None:
    """Version, store and durability once; then a line a call, with its status; each with the process."""
    env = {"TIMERNN_LOG_LEVEL": "debug", "TIMERNN_LOG_LEVLE": "info"}
    with serving(tmp_path, **env) as server:
        bare("sessions", "show", "nobody", "--server", server.address)
        log = server.log.read_text()
        who = f"pid {server.process.pid}"
    assert re.search(
        rf"INFO {who} .*timernn \S+ serves on {server.address}; store unix:.*primary", log
    )
    debug = [line for line in log.splitlines() if " DEBUG " in line]
    assert any(re.search(rf"{who} .*/GetSession NOT_FOUND in [0-9.]+ ms", line) for line in debug)
    assert all(" service." in line for line in debug)
    assert "variable TIMERNN_LOG_LEVLE is set, and no option of this version reads it" in log
