"""Two releases beside each other: one from its wheel, one from this checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from instruments.processes import ServiceProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
UPGRADE = ROOT / "tests" / "upgrade"
WHEELS = sorted((UPGRADE / "wheels").glob("*.whl"))


@dataclass(frozen=True)
class Release:
    """One release's code, run by this interpreter with the packages that the tests have.

    Attributes:
        folder: Where its packages are.
    """

    folder: Path

    @classmethod
    def of_wheel(cls, wheel: Path, folder: Path) -> Release:
        """Unpack a wheel into a folder.

        That installs one of pure Python without its dependencies, where there is no pip as well.
        """
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        return cls(folder)

    @property
    def env(self) -> dict[str, str]:
        """Variables with which a process imports this release's packages before any other."""
        return {"PYTHONPATH": str(self.folder)}

    def server(self, store_url: str) -> ServiceProcess:
        """Prepare a server of this release; an empty URL gives it a store of its own."""
        return ServiceProcess(store_url, env=self.env)

    def run(self, *command: str) -> str:
        """Run a program of this interpreter with this release's code; return what it prints."""
        done = subprocess.run(
            [sys.executable, "-P", *command], env=os.environ | self.env, check=True, timeout=60,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        return done.stdout

    @contextmanager
    def program(self, address: str, model: str) -> Iterator[Program]:
        """Run `program.py` with this release's client library."""
        with subprocess.Popen(
            [sys.executable, "-P", str(UPGRADE / "program.py"), address, model],
            env=os.environ | self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            try:
                yield Program(process)
            finally:
                process.kill()


@dataclass(frozen=True)
class Program:
    """A running `program.py`, which does one part after another."""

    process: subprocess.Popen[str]

    def begin_part(self) -> None:
        """Let it do its next part."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end_part(self) -> dict[str, str]:
        """Wait for the part's end; return the digests of what the program has got, by name."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the program failed; its traceback is on stderr"
        digests: dict[str, str] = json.loads(line)
        return digests
