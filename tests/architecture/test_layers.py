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
    """An import that must not pass, and how the report of a broken contract names it."""

    file: str
    line: str
    reported: str


VIOLATIONS = [
    Violation("rnn_engine/layers.py", "import redis", "rnn_engine.layers -> redis"),
    Violation(
        "rnn_engine/params.py", "import service.domain", "rnn_engine.params -> service.domain"
    ),
    Violation("timernn/__init__.py", "import service.settings", "timernn -> service.settings"),
    Violation("timernn/__init__.py", "import redis", "timernn -> redis"),
    Violation("service/compute/__init__.py", "import grpc", "service.compute -> grpc"),
    Violation("service/store/keys.py", "import google.protobuf", "service.store.keys -> google"),
    Violation("service/rpc/__init__.py", "import redis.asyncio", "service.rpc -> redis"),
    Violation(
        "service/domain/types.py",
        "import service.store.keys",
        "service.domain.types -> service.store.keys",
    ),
    Violation("service/store/keys.py", "import service.rpc", "service.store.keys -> service.rpc"),
    Violation(
        "timernn/_core/session_state.py",
        "import timernn._core.intents",
        "timernn._core.session_state -> timernn._core.intents",
    ),
    Violation(
        "timernn/_core/doubts.py",
        "import timernn._core.client",
        "timernn._core.doubts -> timernn._core.client",
    ),
    # Not forbidden itself, but it leads to what is.
    Violation(
        "service/domain/errors.py",
        "import service.detour",
        "service.domain.errors -> service.detour",
    ),
]


def copied(folder: Path) -> Path:
    """Copy the packages and their contracts into a folder, to be spoiled there."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    for package in PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / package, ignore=ignore)
    return folder


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter over a tree, which comes before the installed packages."""
    command: list[str | Path] = [
        Path(sys.executable).with_name("lint-imports"),
        "--no-cache",
        "--no-logo",
    ]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    return subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, check=False
    )


def append(tree: Path, file: str, line: str) -> None:
    """Add a line to a file of the copy."""
    with (tree / file).open("a") as module:
        module.write(f"\n{line}\n")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What import-linter says of a copy with every violation in it."""
    tree = copied(tmp_path_factory.mktemp("spoiled"))
    (tree / "service" / "detour.py").write_text("import service.rpc\n")
    for violation in VIOLATIONS:
        append(tree, violation.file, violation.line)
    result = lint_imports(tree)
    assert "Broken contracts" in result.stdout, result.stdout + result.stderr
    return result.stdout.partition("Broken contracts")[2]


def test_the_packages_keep_every_contract(tmp_path: Path) -> None:
    """The packages as they are pass, so what is reported below is reported for its reason."""
    result = lint_imports(copied(tmp_path))
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("violation", VIOLATIONS, ids=lambda v: v.reported)
def test_a_forbidden_import_is_caught(report: str, violation: Violation) -> None:
    """Each import against an arrow is named in the report."""
    assert f"{violation.reported} (l." in report


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


def test_a_foreign_import_in_the_engine_is_caught(tmp_path: Path) -> None:
    """An import that no contract names, hidden in a function, is found all the same."""
    tree = copied(tmp_path)
    append(tree, "rnn_engine/layers.py", "def _late():\n    from scipy import linalg")
    assert foreign_imports(tree / "rnn_engine") == {"scipy"}
