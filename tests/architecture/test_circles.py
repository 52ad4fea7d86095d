"""No module of a package imports, over whatever detours, itself; imports for type checkers count too."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TypeAlias

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("rnn_engine", "service", "timernn")

Graph: TypeAlias = dict[str, set[str]]


def import_graph(package: Path) -> Graph:
    """Return what each module of a package imports of the same package, anywhere in its file."""
    files = {name_of(file, package.parent): file for file in package.rglob("*.py")}
    return {name: imports_of(name, file) & files.keys() for name, file in files.items()}


def name_of(file: Path, root: Path) -> str:
    """Return the dotted name of a module; a package has that of its folder."""
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(name: str, file: Path) -> set[str]:
    """Return the dotted names that a file imports, of modules and of what is in them.

    `from a import b` is taken for the module a.b where there is one, and for a otherwise.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = absolute(node, name, is_package=file.name == "__init__.py")
            for alias in node.names:
                is_module = is_module_file(file, name, f"{source}.{alias.name}")
                names.add(f"{source}.{alias.name}" if is_module else source)
    return names


def absolute(node: ast.ImportFrom, name: str, *, is_package: bool) -> str:
    """Return the dotted name behind `from`, of a relative import too."""
    if not node.level:
        return node.module or ""
    package = name.split(".") if is_package else name.split(".")[:-1]
    parts = package[: len(package) - node.level + 1]
    return ".".join([*parts, node.module] if node.module else parts)


def is_module_file(file: Path, name: str, imported: str) -> bool:
    """Return whether a dotted name is a module beside the one that imports it, or below."""
    depth = len(name.split(".")) - (file.name != "__init__.py")
    root = file.parents[depth]
    path = root.joinpath(*imported.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def circular(graph: Graph) -> set[str]:
    """Return the modules from which a way of imports leads back to themselves."""
    return {name for name in graph if name in reachable(graph, name)}


def reachable(graph: Graph, start: str) -> set[str]:
    """Return the modules that a module imports, directly or through others."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_itself_through_others(package: str) -> None:
    """What a module imports never leads back to it."""
    assert circular(import_graph(ROOT / package)) == set()


SPOILED = {
    "a plain import": ("import p.b", "import p.a"),
    "for type checkers alone": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.b import B",
        "from p import a",
    ),
    "inside a function": ("def f():\n    from p import b", "from p.a import A"),
    "relative": ("from . import b", "from .a import A"),
}


@pytest.mark.parametrize("modules", SPOILED.values(), ids=SPOILED)
def test_a_circle_is_found_however_it_is_written(tmp_path: Path, modules: tuple[str, str]) -> None:
    """Two modules that import each other are both named, and one that imports them is not."""
    package = tmp_path / "p"
    package.mkdir()
    sources = {"__init__": "", "a": modules[0], "b": modules[1], "c": "from p import a, b"}
    for name, source in sources.items():
        (package / f"{name}.py").write_text(source)
    assert circular(import_graph(package)) == {"p.a", "p.b"}
