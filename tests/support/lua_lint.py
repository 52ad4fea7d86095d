"""Checks the store's Lua scripts and their library; run by scripts/lint.sh, decided in docs/adr/0024.

It finds what Lua itself reports only once the line runs, or never: names that nothing defines, writes
to globals, variables and functions without a use, names that hide others, numbers and formats without
a name, functions that stand in two files or are long, and arguments that a script's head does not describe.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tree_sitter_lua
from tree_sitter import Language, Parser

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tree_sitter import Node

FOLDER = Path(__file__).resolve().parents[2] / "service" / "store" / "lua"
# What the server gives a script: Lua 5.1's names that are of use here, and its own.
GLOBALS = frozenset(
    {"ARGV", "KEYS", "ipairs", "math", "pairs", "redis", "select", "string", "struct"}
)
GLOBALS |= {"table", "tonumber", "tostring", "type", "unpack"}
MOST_FUNCTION_LINES = 25
MOST_MAIN_LINES = 35  # of a script beside its functions
MOST_COLUMNS = 120
LEAST_NAMED = 10  # a number from here on has to have a name
_PARSER = Parser(Language(tree_sitter_lua.language()))
_LIBRARY = re.compile(r"^-- Library: (.+)$", re.MULTILINE)
_ARGUMENT = re.compile(r"\b(KEYS|ARGV)\[(\d+)\]")


@dataclass
class _Name:
    line: int
    is_used: bool = False


@dataclass
class _Scope:
    outer: _Scope | None = None
    names: dict[str, _Name] = field(default_factory=dict)

    def find(self, name: str) -> _Name | None:
        return self.names.get(name) or (self.outer.find(name) if self.outer else None)


class _File:
    """One file, its findings, and what it defines and takes from elsewhere at its top level."""

    def __init__(self, path: Path, library: dict[str, _File]) -> None:
        self.path = path
        self.text = path.read_text("utf-8")
        self.findings: list[tuple[int, str]] = []
        self.foreign: set[str] = set()  # used here, defined by the library
        self.library = self._library_names(library)
        self.top = _Scope()
        # A shebang is no Lua: it is made a comment of the same length.
        source = self.text.replace("#!", "--", 1) if self.text.startswith("#!") else self.text
        self.tree = _PARSER.parse(source.encode()).root_node
        self._check()

    def _library_names(self, library: dict[str, _File]) -> set[str]:
        found: set[str] = set()
        for name in (name for names in _LIBRARY.findall(self.text) for name in names.split(", ")):
            if name in library:
                found |= library[name].library | set(library[name].top.names)
            else:
                self.findings.append((1, f"no library file is named {name}"))
        return found

    def _check(self) -> None:
        for node in _walk(self.tree):
            if node.type == "ERROR" or node.is_missing:
                self._report(node, "not Lua")
                return
        self._block(self.tree, self.top)
        for node in _walk(self.tree):
            self._check_literal(node)
        self._check_lines()
        self._check_head()

    def _report(self, node: Node, text: str) -> None:
        self.findings.append((node.start_point.row + 1, text))

    # --- names ----------------------------------------------------------------------------------------

    def _declare(self, node: Node, scope: _Scope) -> None:
        name = _text(node)
        if name == "_":
            return
        if scope.find(name) or name in self.library or name in GLOBALS:
            self._report(node, f"{name} hides another {name}")
        scope.names[name] = _Name(node.start_point.row + 1)

    def _use(self, node: Node, scope: _Scope, *, is_written: bool = False) -> None:
        name, found = _text(node), scope.find(_text(node))
        if found:
            found.is_used |= not is_written
        elif is_written:
            self._report(node, f"{name} is assigned, and no local variable")
        elif name in self.library:
            self.foreign.add(name)
        elif name not in GLOBALS:
            self._report(node, f"{name} is not defined")

    def _block(self, node: Node, scope: _Scope) -> None:
        for child in node.named_children:
            self._visit(child, scope)
        if scope is not self.top or self.path.parent.name != "lib":
            for name, declared in scope.names.items():
                if not declared.is_used:
                    self.findings.append((declared.line, f"{name} is never used"))

    def _visit(self, node: Node, scope: _Scope) -> None:
        match node.type:
            case "variable_declaration":
                self._local(node, scope)
            case "assignment_statement":
                self._assignment(node, scope)
            case "function_declaration" | "function_definition":
                self._function(node, scope)
            case "for_statement":
                self._loop(node, scope)
            case "block" | "do_statement" | "repeat_statement":
                self._block(node, _Scope(scope))
            case "identifier":
                self._use(node, scope)
            case "dot_index_expression" | "method_index_expression":
                self._visit(node.named_children[0], scope)
            case "field" if len(node.named_children) > 1 and not _text(node).startswith("["):
                self._visit(node.named_children[1], scope)
            case _:
                for child in node.named_children:
                    self._visit(child, scope)

    def _local(self, node: Node, scope: _Scope) -> None:
        (inner,) = node.named_children
        targets, *values = [inner] if inner.type == "variable_list" else inner.named_children
        for value in values:
            self._visit(value, scope)
        for target in targets.children_by_field_name("name"):
            self._declare(target, scope)

    def _assignment(self, node: Node, scope: _Scope) -> None:
        targets, values = node.named_children
        self._visit(values, scope)
        for target in targets.named_children:
            if target.type == "identifier":
                self._use(target, scope, is_written=True)
            else:
                self._visit(target, scope)

    def _function(self, node: Node, scope: _Scope) -> None:
        name = node.child_by_field_name("name")
        if name and node.children[0].type == "local":
            self._declare(name, scope)
        elif name:
            self._use(name, scope, is_written=True)
        inner = _Scope(scope)
        for parameter in node.child_by_field_name("parameters").named_children:  # type: ignore[union-attr]
            if parameter.type == "identifier":
                self._declare(parameter, inner)
        lines = node.end_point.row - node.start_point.row + 1
        if lines > MOST_FUNCTION_LINES:
            self._report(node, f"a function of {lines} lines, at most {MOST_FUNCTION_LINES}")
        body = node.child_by_field_name("body")
        self._block(body, inner) if body else None

    def _loop(self, node: Node, scope: _Scope) -> None:
        clause = node.child_by_field_name("clause")
        inner = _Scope(scope)
        for child in clause.named_children if clause else ():
            if child.type == "variable_list":
                for name in child.children_by_field_name("name"):
                    self._declare(name, inner)
            elif clause and child == clause.child_by_field_name("name"):
                self._declare(child, inner)
            else:
                self._visit(child, scope)
        body = node.child_by_field_name("body")
        self._block(body, inner) if body else None

    # --- the rest -------------------------------------------------------------------------------------

    def _check_literal(self, node: Node) -> None:
        text = _text(node)
        is_index = node.parent is not None and node.parent.type == "bracket_index_expression"
        is_large = node.type == "number" and not is_index and float(text) >= LEAST_NAMED
        is_format = node.type == "string" and text.startswith("'>")
        if (is_large or is_format) and not _is_constant(node):
            self._report(node, f"{text} has no name: local NAME <const> = {text}")

    def _check_lines(self) -> None:
        for number, line in enumerate(self.text.splitlines(), 1):
            if len(line) > MOST_COLUMNS:
                self.findings.append((number, f"{len(line)} columns, at most {MOST_COLUMNS}"))
        rows: set[int] = set()
        for node in self.tree.named_children:
            is_main = node.type not in ("comment", "function_declaration")
            if is_main and not _text(node).startswith("local "):
                rows |= set(range(node.start_point.row, node.end_point.row + 1))
        if len(rows) > MOST_MAIN_LINES:
            text = f"{len(rows)} lines beside functions and variables, at most {MOST_MAIN_LINES}"
            self.findings.append((1, text))

    def _check_head(self) -> None:
        lines = self.text.splitlines()
        start = 1 if lines[0].startswith("#!") else 0
        end = next((i for i, line in enumerate(lines) if i >= start and line[:2] != "--"), start)
        head, body = "\n".join(lines[:end]), "\n".join(lines[end:])
        described = set(_ARGUMENT.findall(head.replace("…]", "]")))
        for name, number in sorted(set(_ARGUMENT.findall(body)) - described):
            self.findings.append((1, f"{name}[{number}] is not in the head"))


def _text(node: Node) -> str:
    return node.text.decode() if node.text else ""


def _walk(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from _walk(child)


def _is_constant(node: Node) -> bool:
    above: Node | None = node
    while above is not None and above.type != "variable_declaration":
        above = above.parent
    return above is not None and "<const>" in _text(above)


def _read(folder: Path) -> list[_File]:
    """Read the library, a file after those that it names, and then the scripts."""
    library: dict[str, _File] = {}
    waiting = sorted((folder / "lib").glob("*.lua"))
    while waiting:
        names = {path.stem for path in waiting}
        ready = [path for path in waiting if not names & set(_named(path))] or waiting
        library |= {path.stem: _File(path, library) for path in ready}
        waiting = [path for path in waiting if path not in ready]
    return [*library.values(), *(_File(path, library) for path in sorted(folder.glob("*.lua")))]


def _named(path: Path) -> list[str]:
    return [
        name for names in _LIBRARY.findall(path.read_text("utf-8")) for name in names.split(", ")
    ]


def findings(folder: Path = FOLDER) -> list[str]:
    """Return what is wrong in a folder of scripts with a folder `lib`, a line each."""
    files = _read(folder)
    used = {name for file in files for name in file.foreign}
    defined = Counter(name for file in files for name in file.top.names)
    for file in files:
        is_library = file.path.parent.name == "lib"
        for name, at in file.top.names.items():
            if is_library and name not in used and not at.is_used:
                file.findings.append((at.line, f"{name} is used by no script"))
            is_function = f"local function {name}(" in file.text
            if defined[name] > 1 and (is_function or name.isupper()):
                file.findings.append((at.line, f"{name} stands in {defined[name]} files"))
    return [
        f"{file.path.relative_to(folder)}:{line}: {text}"
        for file in files
        for line, text in sorted(file.findings)
    ]


if __name__ == "__main__":
    sys.exit("\n".join(findings()) or None)
