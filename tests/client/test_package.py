"""What `import timernn` brings, and how its names show in an editor and in `help()`."""

from __future__ import annotations

import inspect
import pickle
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import timernn
from timernn import aio, errors

_ROOT = Path(__file__).parents[2]
FRONTENDS = [timernn.Client, timernn.Session, aio.Client, aio.Session]


def printed_by(program: str) -> list[str]:
    """Run a program in a process of its own and return the words that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.split()


@pytest.mark.parametrize("server_module", ["timernn.v1.tensor_pb2", "service.app"])
def test_the_server_imports_the_stubs_without_the_client(server_module: str) -> None:
    """Neither a stub nor the server loads any other module of `timernn`."""
    program = f"import sys, {server_module}; print(*(m for m in sys.modules if m[:7] == 'timernn'))"
    names = printed_by(program)
    assert [m for m in names if m != "timernn" and not m.startswith("timernn.v1")] == []


@pytest.mark.parametrize("module", ["timernn._sync", "timernn.aio", "timernn.errors"])
def test_each_module_can_be_the_first(module: str) -> None:
    """The package's names are there whichever of its modules was imported first."""
    assert printed_by(f"import {module}, timernn; print(timernn.connect.__name__)") == ["connect"]


def test_a_chunk_imports_nothing_of_numpy() -> None:
    """An interrupt in the middle of an import would leave its lock held, for all other threads."""
    program = """
import sys, numpy, timernn
from timernn._core.convert import array_from_caller, copy_of_caller
before = set(sys.modules)
copy_of_caller(array_from_caller([[[1.0]]], "xs", dtype="float32", shape=(1, 1, 1)))
print(*(name for name in set(sys.modules) - before if name.startswith("numpy")))
"""
    assert printed_by(program) == []


def test_dir_names_everything_before_anything_was_used() -> None:
    """`dir(timernn)` has every public name and submodule, once, in a fresh process."""
    names = printed_by("import timernn; print(*dir(timernn))")
    assert {*timernn.__all__, "aio", "errors", "optimizers", "types", "v1"} <= set(names)
    assert len(names) == len(set(names))


def test_a_star_import_brings_every_name() -> None:
    """`from timernn import *` gives the names of `__all__` in a fresh process."""
    names = printed_by("from timernn import *; print(*globals())")
    assert set(timernn.__all__) <= set(names)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    """A misspelt name says so, as for any module."""
    with pytest.raises(AttributeError, match="module 'timernn' has no attribute 'Conect'"):
        timernn.Conect  # type: ignore[attr-defined]  # noqa: B018


def test_an_error_can_be_pickled_into_a_process_that_has_not_imported_the_package() -> None:
    """All of an error comes out of the pickle, where nothing of `timernn` was loaded before."""
    error = errors.SeqGap("a hole", metadata={"expected_seq": "3"})
    program = (
        f"import pickle; e = pickle.loads({pickle.dumps(error)!r});"
        "print(type(e).__name__, e.reason, e.metadata['expected_seq'], e.code.name, e.message)"
    )
    assert printed_by(program) == ["SeqGap", "SEQ_GAP", "3", "ABORTED", "a", "hole"]


def test_mypy_sees_every_name(tmp_path: Path) -> None:
    """`mypy --strict` knows each name by its own type, and refuses one that is not there."""
    pytest.importorskip("mypy")
    lines = ["import timernn", *(f"reveal_type(timernn.{name})" for name in timernn.__all__)]
    lines += ["timernn.Conect", "timernn.connect(7)"]
    (tmp_path / "names.py").write_text("\n".join(lines))
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(_ROOT / ".mypy_cache")]
    done = subprocess.run(
        [*command, str(tmp_path / "names.py")],
        capture_output=True,
        text=True,
        cwd=_ROOT,
        check=False,
        timeout=100,
    )
    revealed = [line for line in done.stdout.splitlines() if "Revealed type" in line]
    assert len(revealed) == len(timernn.__all__), done.stdout
    assert not [line for line in revealed if line.endswith('"Any"')]
    wrong = [line.partition("error: ")[2] for line in done.stdout.splitlines() if "error:" in line]
    assert [line.rpartition("[")[2] for line in wrong] == ["attr-defined]", "arg-type]"]


@pytest.mark.parametrize(
    "frontend", FRONTENDS, ids=lambda frontend: f"{frontend.__module__}.{frontend.__name__}"
)
def test_help_shows_results_and_nothing_of_the_core(frontend: type) -> None:
    """`help()` names what a method returns; every method has a docstring and its own class's name."""
    for name, method in inspect.getmembers(frontend, inspect.isfunction):
        if not name.startswith("_"):
            assert method.__doc__, name
            assert method.__qualname__ == f"{frontend.__name__}.{name}"
            assert "Op[" not in pydoc.plain(pydoc.render_doc(method)), name


def test_help_shows_what_a_method_of_the_core_ends_in() -> None:
    """A generator that ends in a ModelInfo is shown as a method that returns one."""
    for client in (timernn.Client, aio.Client):
        assert inspect.signature(client.get_model).return_annotation == "ModelInfo"


@pytest.mark.parametrize(
    ("frontend", "name"),
    [
        *(("Client", name) for name in ("session", "update", "frame")),
        ("Session", "fork"),
    ],
)
def test_both_frontends_document_a_method_alike(frontend: str, name: str) -> None:
    """What is written out in both, so that an editor shows it, says the same."""
    blocking, awaited = (
        getattr(getattr(timernn, frontend), name),
        getattr(getattr(aio, frontend), name),
    )
    assert inspect.getdoc(blocking) == inspect.getdoc(awaited)
