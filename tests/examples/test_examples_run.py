"""Both examples from end to end, as a person runs them but for less time."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from examples.server_process import ServerError, ServerProcess

if TYPE_CHECKING:
    from pathlib import Path


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run an example to its end."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def test_the_language_model_survives_its_server(tmp_path: Path) -> None:
    """A short training goes through the kill and loses nothing; the picture is there."""
    done = run(
        "examples.charlm", "--seconds=60", "--steps=60", "--characters=20",
        "--output", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Nothing was lost: 60 steps here, 60 chunks and 60 new versions" in done.stdout
    assert "the server is back after" in done.stdout
    assert (tmp_path / "charlm.png").read_bytes().startswith(b"\x89PNG")


def test_the_forecast_beats_the_naive_one(tmp_path: Path) -> None:
    """Learned online, it errs less than "as today" for each measurement."""
    done = run("examples.weather", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    gains = [int(line.split()[-1].rstrip("%")) for line in done.stdout.splitlines() if "%" in line]
    assert len(gains) == 4
    assert min(gains) > 0
    assert (tmp_path / "weather.png").read_bytes().startswith(b"\x89PNG")


def test_a_server_that_cannot_start_says_why_in_one_line(tmp_path: Path) -> None:
    """The server's own last words become the example's error."""
    server = ServerProcess(tmp_path)
    server.address = "nowhere"
    with pytest.raises(ServerError, match=r"did not start: timernn: Invalid value for '--listen'"):
        server.start()
    assert server.pid is None


def test_a_stopped_server_is_not_started_again(tmp_path: Path) -> None:
    """A restart that was under way when the program ended comes too late."""
    server = ServerProcess(tmp_path)
    server.stop()
    with pytest.raises(ServerError, match="not wanted any more"):
        server.kill_and_start()
