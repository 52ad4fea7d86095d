"""The way from nothing that docs/deployment.md shows, with the installation."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pages import Shown
from ten_commands import COMMANDS, follow

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_ten_commands_lead_from_nothing_to_tls_tokens_and_metrics(tmp_path: Path) -> None:
    """In an environment that has nothing but what the page installs."""
    install = COMMANDS[1]
    here = Shown(install.command.replace("PATH_OF_THE_CLONE", str(ROOT)), install.output)
    follow([COMMANDS[0], here, *COMMANDS[2:]], tmp_path, os.environ["PATH"])
