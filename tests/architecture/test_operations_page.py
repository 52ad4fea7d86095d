"""docs/operations.md has every setting, every metric and every reason, as they are in the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import operations_page
from service.domain import errors as domain_errors
from service.domain.errors import DomainError
from service.domain.ports import Absence
from service.metrics.families import FAMILIES
from service.rpc import errors as rpc_errors
from timernn import errors

ROOT = Path(__file__).parents[2]
PAGE = operations_page.PAGE.read_text()
ROWS = dict(re.findall(r"^\| `([A-Z_]+)` \| ([A-Z_]+) \| ", PAGE, re.MULTILINE))


def kind_of(name: str) -> type[DomainError] | None:
    """Return the class of refusals of this name, if it is one."""
    kind = getattr(domain_errors, name, None) or getattr(rpc_errors, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, DomainError) else None


def reasons() -> dict[str, str]:
    """Return each reason that a caller may get, with its status: the server's and the library's own."""
    found = {reason: kind.CODE.name for reason, kind in errors.BY_REASON.items()}
    found |= {absence.value: "NOT_FOUND" for absence in Absence}
    for path in (ROOT / "service").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Name(id=name), args=[ast.Constant(value=str(reason)), *_]):
                    kind = kind_of(name)
                    if kind is not None and kind is not rpc_errors.UnknownService:
                        found[reason] = rpc_errors.code_of(kind(reason, "")).name
    return found


def test_the_tables_are_as_the_code() -> None:
    """Settings, limits and metrics; `make operations-docs` writes them anew."""
    assert operations_page.written(PAGE) == PAGE, "run `make operations-docs`"


@pytest.mark.parametrize(("reason", "status"), sorted(reasons().items()))
def test_each_reason_is_explained(reason: str, status: str) -> None:
    """With its status, and what a client or an operator does."""
    assert ROWS.get(reason) == status


def test_no_reason_is_explained_that_is_not_there() -> None:
    """One that was renamed or dropped leaves no row behind."""
    assert set(ROWS) - set(reasons()) == set()


def test_each_line_of_the_log_that_is_explained_is_one_that_the_server_writes() -> None:
    """Compared by the longest part of it that is no placeholder."""
    rows = re.findall(r"^\| (?:INFO|WARNING|ERROR|DEBUG).*? \| (`.*?) \| ", PAGE, re.MULTILINE)
    source = "\n".join(path.read_text() for path in (ROOT / "service").rglob("*.py"))
    lines = [line for row in rows for line in re.findall("`(.*?)`", row)]
    parts = [max(re.split(r"\b[A-Z]+\b|…|[0-9.]+", line), key=len).strip() for line in lines]
    assert parts
    assert [part for part in parts if part not in source] == []


@pytest.mark.parametrize("page", ["deployment", "operations", "security"])
def test_each_metric_and_alert_that_a_page_names_exists(page: str) -> None:
    """A renamed one would send its reader nowhere; a pattern of several has a bracket or a bar."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    alerts = (ROOT / "docker/prometheus/alerts.yml").read_text()
    metrics = set(re.findall(r"\b((?:timernn|grpc_server)_[a-z_]+[a-z])\b(?![(\[_])", text))
    series = {name + end for name in FAMILIES for end in ("", "_sum", "_count", "_bucket")}
    assert metrics - series == set()
    named = set(re.findall(r"`(Timernn[A-Z]\w+)`", text))
    assert named - set(re.findall(r"alert: (\w+)", alerts)) == set()
