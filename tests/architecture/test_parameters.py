"""Few functions take many arguments by position: at the call nobody sees which is which."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("rnn_engine", "service", "timernn")
GENERATED = ROOT / "timernn" / "v1"

MOST_BY_POSITION = 3
"""Parameters that a function may take by position, without self or cls."""

FEWER_THAN = 40
"""Functions with more: mostly steps of the engine's arithmetic, which take arrays in the formula's order."""


def crowded_functions(source: str) -> list[str]:
    """Return the names of the functions in a module that take too many arguments by position."""
    return [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and len(positional_parameters(node.args)) > MOST_BY_POSITION
    ]


def positional_parameters(parameters: ast.arguments) -> list[str]:
    """Return the names of the parameters that can be given by position, without self or cls."""
    names = [each.arg for each in [*parameters.posonlyargs, *parameters.args]]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def test_few_functions_take_more_than_three_arguments_by_position() -> None:
    """Over all packages fewer than 40 functions do, generated stubs left out."""
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    crowded = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in sorted(files)
        if GENERATED not in file.parents
        for name in crowded_functions(file.read_text())
    ]
    assert len(crowded) < FEWER_THAN, "\n".join(crowded)


@pytest.mark.parametrize(
    ("source", "is_crowded"),
    [
        ("def f(a, b, c): ...", False),
        ("def f(a, b, c, *, d): ...", False),
        ("def f(a, b, c, d=0): ...", True),
        ("async def f(a, b, /, c, d): ...", True),
        ("class K:\n    def f(self, a, b, c): ...", False),
        ("class K:\n    def f(self, a, b, c, d): ...", True),
    ],
)
def test_what_can_be_given_by_position_is_counted(source: str, *, is_crowded: bool) -> None:
    """Keyword-only parameters and self do not count, parameters with a default do."""
    assert crowded_functions(source) == ["f"] * is_crowded
