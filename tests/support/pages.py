"""Commands that a page shows, and a shell in which a test gives them as a reader would."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

DOCS: Final = Path(__file__).parents[2] / "docs"
_MARK: Final = "=== exit code"
_LIMIT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Shown:
    """A command of a page.

    Attributes:
        command: What follows the prompt, with its further lines.
        output: The lines that the page shows after it.
    """

    command: str
    output: tuple[str, ...]


def section_of(page: str, heading: str) -> str:
    """Return what stands below a heading, up to the next one of its level or above."""
    _, found, rest = page.partition(f"\n{heading}\n")
    assert found, f"there is no {heading!r}"
    level = len(heading) - len(heading.lstrip("#"))
    return re.split(rf"\n#{{1,{level}}} ", rest)[0]


def commands_in(text: str) -> list[Shown]:
    """Return the commands of all console blocks of a text, in their order."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, *rest = re.split(r"(?<!\\)\n", part, maxsplit=1)
            found.append(Shown(command, tuple("".join(rest).splitlines())))
    return found


class Shell:
    """A bash that keeps its variables and jobs from command to command."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._log = folder / "shell.log"
        with self._log.open("w") as log:
            self._bash = subprocess.Popen(
                ["bash", "--noprofile", "--norc"],  # noqa: S607 - the reader's
                cwd=folder, env=environment, text=True, start_new_session=True,
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self._read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        """End the shell with everything that it has started."""
        os.killpg(self._bash.pid, signal.SIGTERM)
        try:
            self._bash.wait(_LIMIT_S)
        finally:
            assert self._bash.stdin is not None
            self._bash.stdin.close()

    def run(self, shown: Shown, limit_s: float = _LIMIT_S) -> None:
        """Give a command, which must succeed and print each line that the page shows; … is anything."""
        code, printed = self.try_to_run(shown.command, limit_s)
        assert code == 0, f"{shown.command}\n{printed}"
        for line in shown.output:
            printed += self._wait_for(".*".join(map(re.escape, line.split("…"))), printed, limit_s)

    def try_to_run(self, command: str, limit_s: float = _LIMIT_S) -> tuple[int, str]:
        """Give a command; return its exit code and what was printed meanwhile."""
        assert self._bash.stdin is not None
        self._bash.stdin.write(f'{command}\necho "{_MARK} $? "\n')
        self._bash.stdin.flush()
        printed = self._wait_for(f"{_MARK} ", "", limit_s)
        before, _, after = printed.partition(_MARK)
        return int(after.split()[0]), before

    def _wait_for(self, pattern: str, printed: str, limit_s: float) -> str:
        """Return what is printed until a pattern is; what was printed already counts too."""
        until, more = time.monotonic() + limit_s, ""
        while not re.search(pattern, printed + more):
            assert time.monotonic() < until, f"no {pattern!r} in\n{printed}{more}"
            time.sleep(0.02)
            more += self._new()
        return more

    def _new(self) -> str:
        with self._log.open() as log:
            log.seek(self._read)
            text = log.read()
            self._read = log.tell()
        return text
