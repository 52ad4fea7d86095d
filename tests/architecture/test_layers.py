"""The arrows between the packages hold, and a violation of each is caught."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("rnn_engine", "service", "timernn")


class Violation(NamedTuple):
    """An import that must not pass, and the contract that catches it."""

    module: str
    line: str
    contract: str


VIOLATIONS = [
    Violation("rnn_engine/layers.py", "import redis", "The engine knows neither"),
    Violation("rnn_engine/layers.py", "import service.domain", "The engine knows neither"),
    Violation("timernn/__init__.py", "import service.settings", "The client never imports"),
    Violation("timernn/__init__.py", "import redis", "The client never imports"),
    Violation("service/compute/__init__.py", "import grpc", "In the service only rpc"),
    Violation("service/store/keys.py", "import google.protobuf", "In the service only rpc"),
    Violation("service/rpc/__init__.py", "import redis.asyncio", "In the service only store"),
    Violation("service/domain/errors.py", "import service.store.keys", "The domain reaches no"),
    Violation("service/store/keys.py", "import service.rpc", "Layers of the service"),
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the packages and their contracts, to be spoiled."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignore)
    return tmp_path


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter over a tree, which comes before the installed packages."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    return subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, check=False
    )


def append(tree: Path, module: str, line: str) -> None:
    """Add a line to a module of the copy."""
    with (tree / module).open("a") as file:
        file.write(f"\n{line}\n")


def test_an_unspoiled_copy_keeps_every_contract(tree: Path) -> None:
    """The packages as they are pass, so what fails below fails for its reason."""
    result = lint_imports(tree)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("violation", VIOLATIONS, ids=lambda v: f"{v.module}: {v.line}")
def test_a_forbidden_import_is_caught(tree: Path, violation: Violation) -> None:
    """One import against an arrow breaks the contract that forbids it."""
    append(tree, violation.module, violation.line)
    assert f"{violation.contract}" in broken_contracts(lint_imports(tree))


def test_a_forbidden_import_through_another_module_is_caught(tree: Path) -> None:
    """The domain may not reach gRPC through a module that itself may use it."""
    (tree / "service" / "shortcut.py").write_text("import service.rpc\n")
    append(tree, "service/domain/errors.py", "import service.shortcut")
    assert "The domain reaches no" in broken_contracts(lint_imports(tree))


def broken_contracts(result: subprocess.CompletedProcess[str]) -> str:
    """The lines of a report that name a broken contract, joined."""
    assert result.returncode == 1, result.stdout + result.stderr
    return "\n".join(line for line in result.stdout.splitlines() if line.endswith("BROKEN"))


def foreign_imports(package: Path) -> set[str]:
    """The top-level names that a package imports beside itself, numpy and the standard library."""
    known = {package.name, "numpy", "__future__"} | sys.stdlib_module_names
    return {name for file in package.rglob("*.py") for name in imported_names(file)} - known


def imported_names(file: Path) -> set[str]:
    """The top-level names that a file imports absolutely, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").partition(".")[0])
    return names


def test_engine_imports_nothing_but_numpy() -> None:
    """The engine is arithmetic on arrays: numpy and the standard library are all it needs."""
    assert foreign_imports(ROOT / "rnn_engine") == set()


def test_a_foreign_import_in_the_engine_is_caught(tree: Path) -> None:
    """An import that no contract names, hidden in a function, is found all the same."""
    append(tree, "rnn_engine/layers.py", "def _late():\n    from scipy import linalg")
    assert foreign_imports(tree / "rnn_engine") == {"scipy"}
