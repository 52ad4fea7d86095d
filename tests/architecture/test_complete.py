"""What has to be written at several places is at each of them; CONTRIBUTING.md lists the places."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from service.domain import errors as domain_errors
from service.rpc.errors import _code_for
from service.store.scripts import library_of
from timernn import errors
from timernn._core import contract
from timernn._core.contract import Rpc
from timernn.v1 import model_service_pb2, session_service_pb2, time_rnn_service_pb2

ROOT = Path(__file__).resolve().parents[2]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCS, SERVICE = ROOT / "docs", ROOT / "service"
STUBS = (model_service_pb2, session_service_pb2, time_rnn_service_pb2)
METHODS = [
    f"/{service.full_name}/{method.name}"
    for stub in STUBS
    for service in stub.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


def reasons_in_the_service() -> set[tuple[str, str]]:
    """Return the domain's class and the reason of each refusal that is written out in the service."""
    found = set()
    for path in SERVICE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Name(id=kind), args=[ast.Constant(value=str(reason)), *_]):
                    is_refusal = isinstance(getattr(domain_errors, kind, None), type)
                    if is_refusal and re.fullmatch("[A-Z_]+", reason):
                        found.add((kind, reason))
    return found


@pytest.mark.parametrize("path", METHODS)
def test_the_client_knows_each_method_of_the_contract(path: str) -> None:
    """Each RPC stands in the client's table."""
    assert path in {rpc.path for rpc in vars(contract).values() if isinstance(rpc, Rpc)}


@pytest.mark.parametrize(("kind", "reason"), sorted(reasons_in_the_service()))
def test_the_client_has_a_class_for_each_reason_of_the_service(kind: str, reason: str) -> None:
    """A reason that the service writes is a class of the client's, with the same status code."""
    assert errors.BY_REASON[reason].CODE is _code_for(getattr(domain_errors, kind))


def test_each_lua_script_is_loaded() -> None:
    """A file in `lua/` that no module loads is a leftover."""
    texts = [path.read_text() for path in (SERVICE / "store").glob("*.py")]
    loaded = {name for text in texts for name in re.findall(r'load_script\("(\w+)"\)', text)}
    assert {path.stem for path in (SERVICE / "store" / "lua").glob("*.lua")} == loaded


# Run on the way by methods of other names: to say when a session expired, to create a model.
PART_OF_A_METHOD = {"read_expiry", "reserve_model"}


@pytest.mark.parametrize("module", ["sessions", "models"])
def test_a_lua_script_is_named_as_what_calls_it(module: str) -> None:
    """A script's constant and its method have its name, but for scripts that are a part of a method."""
    text = (SERVICE / "store" / f"{module}.py").read_text()
    for constant, name in re.findall(r'^(\w+) = load_script\("(\w+)"\)', text, re.MULTILINE):
        assert constant == f"_{name.upper()}"
        assert f"def {name}(" in text or name in PART_OF_A_METHOD


def test_each_library_file_is_named_by_a_script() -> None:
    """A file in `lua/lib/` that no script puts in front of itself is a leftover."""
    folder = SERVICE / "store" / "lua"
    named = {name for path in folder.glob("*.lua") for name in library_of(path.read_text())}
    assert {path.stem for path in (folder / "lib").glob("*.lua")} == named


@pytest.mark.parametrize("layer", ["domain", "store", "rpc"])
def test_each_module_of_a_layer_is_in_the_table(layer: str) -> None:
    """docs/architecture.md has a row for each module, and none for one that has gone."""
    page = (DOCS / "architecture.md").read_text()
    _, rest = re.split(rf"## The modules of (?:the )?{layer}\n", page)
    rows = re.findall(r"^\| `(\w+)` \|", rest.partition("\n## ")[0], re.MULTILINE)
    modules = [path.stem for path in (SERVICE / layer).glob("*.py")]
    assert sorted([*rows, "__init__"]) == sorted(modules)


def names_of_the_code() -> set[str]:
    """Return each method and attribute of each class, as `Class.name`."""
    names = set()
    for package in ("rnn_engine", "service", "timernn"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    parts = [each for each in ast.walk(node) if each is not node]
                    found = {each.name for each in parts if isinstance(each, FUNCTIONS)}
                    found |= {each.attr for each in parts if isinstance(each, ast.Attribute)}
                    names |= {f"{node.name}.{each}" for each in found}
    return names


def test_each_method_that_the_architecture_names_exists() -> None:
    """Who follows docs/architecture.md by name finds each `Class.method` of it."""
    named = re.findall(r"`([A-Z]\w+\.\w+)`", (DOCS / "architecture.md").read_text())
    assert named
    assert set(named) - names_of_the_code() == set()


def test_each_decision_is_in_the_index() -> None:
    """docs/adr/README.md links each page, by its number and title."""
    index = (DOCS / "adr" / "README.md").read_text()
    for page in (DOCS / "adr").glob("0*.md"):
        number, _, title = page.read_text().splitlines()[0].removeprefix("# ").partition(". ")
        assert f"| [{number}]({page.name}) | {title} |" in index


def test_each_place_of_the_glossary_exists() -> None:
    """A file that docs/glossary.md names as the place of a term is there."""
    page = (DOCS / "glossary.md").read_text()
    places = re.findall(r"`([\w/]+\.(?:py|lua|proto))`", page)
    assert places
    assert [place for place in places if not (ROOT / place).is_file()] == []


def test_each_test_that_the_security_page_names_exists() -> None:
    """Whoever doubts a row of docs/security.md can run its tests."""
    page = (DOCS / "security.md").read_text()
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", page)
    assert len(named) > 50
    for file, test in named:
        path = ROOT / "tests" / file
        assert path.is_file(), file
        assert f"def {test}(" in path.read_text(), f"{file}::{test}"


def test_each_demand_on_security_has_a_row_with_a_result() -> None:
    """S1 to S24; a demand without a test says so."""
    rows = re.findall(
        r"^\| S(\d+) \|.*\| ([^|]+) \|$", (DOCS / "security.md").read_text(), re.MULTILINE
    )
    assert [int(number) for number, _ in rows] == [*range(1, 25)]
    assert all(result.startswith(("met", "in part", "not done")) for _, result in rows)
