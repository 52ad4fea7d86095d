"""The command that runs the model at length."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_COMMAND = Path(__file__).parent / "explore.py"


def test_all_rules_end_in_a_table() -> None:
    """Without violations the command succeeds and shows how the runs ended."""
    done = _run("--runs", "3", "--world", "quiet")
    assert done.returncode == 0
    assert "done 3" in done.stdout


def test_a_missing_rule_is_shown_with_its_violation() -> None:
    """`--broken RULE` succeeds when the model has noticed."""
    done = _run("--runs", "3", "--broken", "refused-unknown")
    assert done.returncode == 0
    assert "the trainer could not go on: SEQ_REUSED" in done.stdout


def test_a_rule_that_nobody_misses_fails() -> None:
    """Where nothing was noticed the command says so and fails."""
    done = _run("--runs", "1", "--world", "quiet", "--broken", "digest")
    assert done.returncode == 1
    assert "NOT NOTICED" in done.stdout


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(_COMMAND), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)
