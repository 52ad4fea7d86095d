"""The ten commands of docs/deployment.md, and how a test gives them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from instruments.processes import free_port
from pages import DOCS, Shell, Shown, commands_in, section_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

HEADING = "### From nothing to TLS, tokens and metrics"
COMMANDS = commands_in(section_of((DOCS / "deployment.md").read_text(), HEADING))


def follow(commands: Iterable[Shown], folder: Path, path: str) -> None:
    """Give the commands one after another, on ports that are free, in an empty folder that is also HOME."""
    ports = {"50051": str(free_port()), "9464": str(free_port())}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TIMERNN_")}
    with Shell(folder, {**kept, "HOME": str(folder), "PATH": path}) as shell:
        for shown in commands:
            command, output = shown.command, "\n".join(shown.output)
            for port, free in ports.items():
                command, output = command.replace(port, free), output.replace(port, free)
            shell.run(Shown(command, tuple(output.splitlines())), limit_s=240)
        assert shell.try_to_run("wait %1")[0] == 0
