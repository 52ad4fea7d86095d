"""What the tools of others say about the files of a deployment."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HADOLINT = shutil.which("hadolint") or shutil.which(
    "hadolint", path=str(Path(sys.executable).parent)
)


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed (`make operate` does)")
def test_hadolint_finds_nothing_in_the_dockerfile(docker: Path) -> None:
    """But for what the file itself excepts, with a reason."""
    assert HADOLINT is not None
    done = subprocess.run(
        [HADOLINT, str(docker / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_takes_the_unit(docker: Path) -> None:
    """No unknown setting, no bad value; that the program is not installed here is no matter."""
    done = subprocess.run(
        ["systemd-analyze", "verify", str(docker / "systemd/timernn.service")],  # noqa: S607
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "timernn.service" in line]
    assert [line for line in said if "is not executable" not in line] == []
