"""docs/deployment.md leads from nothing to TLS, tokens and metrics in ten commands, which are run here."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ten_commands import COMMANDS, follow

INSTALLATION = 2  # tests/faults/test_installation.py runs these, which take a minute


def test_there_are_ten_commands() -> None:
    """Not more, however much a server can do."""
    assert len(COMMANDS) == 10


def test_they_lead_to_tls_tokens_and_metrics(tmp_path: Path) -> None:
    """From the third on, with this installation; each succeeds and prints what the page shows."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    follow(COMMANDS[INSTALLATION:], tmp_path, path)
