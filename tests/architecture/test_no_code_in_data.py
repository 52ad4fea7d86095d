"""The code has nothing that would run what data says: no unpickling, no eval, no templates, no JSON into messages."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [
    path
    for package in ("rnn_engine", "service", "timernn")
    for path in (ROOT / package).rglob("*.py")
]
LOADERS = {
    "pickle",
    "cPickle",
    "_pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "jsonpickle",
    "yaml",
}
CALLS = {"eval", "exec", "compile", "__import__"}
NUMPY_LOADERS = {"load", "fromfile", "memmap", "loadtxt", "genfromtxt"}


def faults_of(source: str) -> list[str]:
    """Return what in a source could run what data says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = {alias.name.partition(".")[0] for alias in node.names}
            found += sorted(names & LOADERS)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found += sorted({module.partition(".")[0]} & LOADERS)
            if any("json_format" in name for name in (module, *(each.name for each in node.names))):
                found.append("json_format")
        elif isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id in CALLS:
                found.append(function.id)
            if (
                isinstance(function, ast.Attribute)
                and isinstance(function.value, ast.Name)
                and function.value.id in {"np", "numpy", "torch"}
                and function.attr in NUMPY_LOADERS
            ):
                found.append(f"{function.value.id}.{function.attr}")
    return found


def test_the_code_loads_no_code_from_data() -> None:
    """Weights are safetensors, records are structs, files of settings are TOML."""
    assert len(FILES) > 100
    found = {str(path.relative_to(ROOT)): faults_of(path.read_text()) for path in FILES}
    assert {path: faults for path, faults in found.items() if faults} == {}


def test_no_message_is_read_from_json() -> None:
    """Protobuf's reader of JSON recurses as deeply as a text says (CVE-2026-0994)."""
    assert [path for path in FILES if "json_format" in path.read_text()] == []


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "eval(text)", "np.load(path)", "torch.load(path)",
     "from google.protobuf import json_format", "import yaml.loader"],
)  # fmt: skip
def test_a_loader_is_found(source: str) -> None:
    """However it is written."""
    assert len(faults_of(source)) == 1
