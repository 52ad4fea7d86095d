"""The `timernn` command where a client alone is installed: it says in one line what is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Each stands for an install without it; what the extra `server` brings, and nothing that a client needs.
SERVER_PACKAGES = ("typer", "redis", "hiredis", "threadpoolctl", "grpc_health", "grpc_reflection")
_RUN_WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from service.cli import main
sys.exit(main({arguments!r}))
"""


def run_without(packages: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process that cannot import some packages."""
    program = _RUN_WITHOUT.format(packages=packages, arguments=list(arguments))
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("arguments", [(), ("--help",), ("--version",), ("serve",), ("ping",)])
def test_a_client_s_install_says_how_to_get_the_command(arguments: tuple[str, ...]) -> None:
    """One line on stderr, exit code 1, no traceback."""
    done = run_without(SERVER_PACKAGES, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    expected = "timernn: the command needs the package typer: pip install 'timernn[server]'\n"
    assert done.stderr == expected


@pytest.mark.parametrize("package", [name for name in SERVER_PACKAGES if name != "typer"])
def test_half_an_install_names_what_is_missing(package: str) -> None:
    """A package that only a server needs is named once one is to be run."""
    done = run_without((package,), "serve", "--listen", "127.0.0.1:0")
    assert (done.returncode, done.stdout) == (1, "")
    expected = f"timernn: the command needs the package {package}: pip install 'timernn[server]'\n"
    assert done.stderr == expected
