"""Client commands against a running server."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors.numpy

import timernn as library
from service.cli import main
from service.cli.app import command_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Timernn = Callable[..., Any]


def create(timernn: Timernn, name: str, *extra: str) -> Any:
    """Make a small model."""
    return timernn("models", "create", name, "--input-size=3", "--hidden-size=4", *extra)


def one_line(text: str) -> str:
    """Return the only line of a text."""
    assert text.count("\n") == 1, text
    return text.strip()


def test_ping_tells_who_answers(timernn: Timernn, server: Any) -> None:
    """A server that is ready gives exit code 0 and a line with its address."""
    answer = timernn("ping")
    assert answer.code == 0
    assert one_line(answer.out).startswith(f"{server.address} is ready: timernn ")


def test_ping_asks_no_proxy_of_the_environment(bare: Timernn, server: Any, nobody: str) -> None:
    """Neither for the loopback address nor, where one was chosen, in place of it."""
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy"), f"http://{nobody}")
    for extra in ({}, {"TIMERNN_PROXY": "environment"}):
        answer = bare("ping", "--server", server.address, **proxies, **extra)
        assert (answer.code, answer.err) == (0, "")


def test_a_failed_command_is_a_failed_process(bare: Timernn, server: Any) -> None:
    """The exit code and the one line reach whoever started the process."""
    failed = bare("models", "show", "nothing-here", TIMERNN_SERVER=server.address)
    assert (failed.code, failed.out) == (1, "")
    assert one_line(failed.err).startswith("timernn: MODEL_NOT_FOUND: ")


def test_ping_as_json_tells_the_limits(timernn: Timernn) -> None:
    """Every bound is there, spans in seconds."""
    shown = json.loads(timernn("ping", "--json").out)
    assert shown["serving"] is True
    assert shown["limits"]["chunk_steps"] == 4096
    assert shown["limits"]["default_ttl"] == 3600.0


def test_ping_without_a_server_fails_in_one_line(timernn: Timernn, nobody: str) -> None:
    """Nobody there is exit code 1, soon."""
    failed = timernn("ping", "--server", nobody, "--timeout", "1")
    assert (failed.code, failed.out) == (1, "")
    assert one_line(failed.err).startswith("timernn: no server at ")


def test_a_health_port_that_is_not_there_is_one_line(
    bare: Timernn, server: Any, nobody: str
) -> None:
    """As is a metrics port that is taken: in plain words, without Python's numbers."""
    failed = bare("ping", "--health", nobody)
    assert (failed.code, failed.err) == (1, f"timernn: {nobody}: Connection refused\n")
    failed = bare(
        *("serve", "--listen", "127.0.0.1:0", "--metrics-listen", server.address),
        *("--redis-url", f"unix://{server.log.parent}/store/store.sock"),
    )
    assert failed.code == 1
    said = f"timernn: cannot listen on {server.address}: Address already in use"
    assert failed.err.splitlines()[-1] == said


def test_a_created_model_is_shown(timernn: Timernn) -> None:
    """What was asked for is what stands on the server."""
    made = create(
        timernn, "shown", "--optimizer=adam", "--lr=0.002", "--set=beta2=0.95", "--dtype=float64"
    )
    assert one_line(made.out) == "created shown, weights version 1"
    shown = json.loads(timernn("models", "show", "shown", "--json").out)
    assert (shown["input_size"], shown["hidden_size"], shown["dtype"]) == (3, 4, "float64")
    assert shown["optimizer"] | {"kind": "adam", "lr": 0.002, "beta2": 0.95} == shown["optimizer"]


def test_models_are_listed_by_name(timernn: Timernn) -> None:
    """One line a model under a heading, sorted."""
    create(timernn, "list-b")
    create(timernn, "list-a")
    heading, *lines = timernn("models", "list").out.splitlines()
    names = [line.split()[0] for line in lines]
    assert heading.split()[:3] == ["MODEL", "D", "H"]
    assert [name for name in names if name.startswith("list-")] == ["list-a", "list-b"]


def test_a_name_that_is_taken_is_one_line(timernn: Timernn) -> None:
    """Creating a model twice fails with the reason."""
    create(timernn, "twice")
    failed = create(timernn, "twice")
    assert failed.code == 1
    assert "MODEL_EXISTS" in one_line(failed.err)


def test_a_script_may_create_its_model_again(timernn: Timernn) -> None:
    """With --exist-ok the same model is fine, another under its name is an error that says why."""
    create(timernn, "again")
    done = create(timernn, "again", "--exist-ok")
    assert (done.code, done.out) == (0, "there is again, weights version 1\n")
    failed = create(timernn, "again", "--exist-ok", "--optimizer", "adam")
    assert failed.code == 1
    assert "optimizer: it has SGD" in one_line(failed.err)


@pytest.mark.parametrize("words", [("models", "show"), ("models", "delete")])
def test_an_unknown_model_is_one_line(timernn: Timernn, words: tuple[str, ...]) -> None:
    """Naming a model that is not there fails with the reason."""
    failed = timernn(*words, "nothing-here")
    assert (failed.code, failed.out) == (1, "")
    assert one_line(failed.err).startswith("timernn: MODEL_NOT_FOUND: ")


def test_deleting_what_is_not_there_may_be_fine(timernn: Timernn) -> None:
    """With --missing-ok a script can delete again."""
    assert timernn("models", "delete", "nothing-here", "--missing-ok").code == 0


def test_a_deleted_model_is_gone(timernn: Timernn) -> None:
    """A deleted model is not found any more."""
    create(timernn, "gone")
    assert timernn("models", "delete", "gone").code == 0
    assert timernn("models", "show", "gone").code == 1


def test_exported_weights_can_be_read_by_others(timernn: Timernn, tmp_path: Path) -> None:
    """The file is plain safetensors with Wx, Wh and b."""
    create(timernn, "exported")
    file = tmp_path / "w.safetensors"
    done = timernn("models", "export", "exported", str(file))
    assert done.code == 0, done.err
    tensors = safetensors.numpy.load_file(file)
    assert {k: v.shape for k, v in tensors.items()} == {"Wx": (3, 4), "Wh": (4, 4), "b": (4,)}


def test_an_export_does_not_overwrite_by_accident(timernn: Timernn, tmp_path: Path) -> None:
    """An existing file stays as it is unless --force is given."""
    create(timernn, "careful")
    file = tmp_path / "precious"
    file.write_text("mine")
    refused = timernn("models", "export", "careful", str(file))
    assert (refused.code, file.read_text()) == (2, "mine")
    assert timernn("models", "export", "careful", str(file), "--force").code == 0


def test_imported_weights_are_the_next_version(
    timernn: Timernn, tmp_path: Path, rng: np.random.Generator
) -> None:
    """What comes out again is what went in."""
    create(timernn, "imported")
    tensors = {"Wx": (3, 4), "Wh": (4, 4), "b": (4,)}
    given = {name: rng.normal(size=shape).astype(np.float32) for name, shape in tensors.items()}
    safetensors.numpy.save_file(given, tmp_path / "in")
    done = timernn("models", "import", "imported", str(tmp_path / "in"))
    assert one_line(done.out) == "imported has weights version 2 now"
    timernn("models", "export", "imported", str(tmp_path / "out"))
    np.testing.assert_equal(safetensors.numpy.load_file(tmp_path / "out"), given)


def test_an_import_can_insist_on_the_version_it_replaces(timernn: Timernn, tmp_path: Path) -> None:
    """Somebody else's newer weights are not buried."""
    create(timernn, "raced")
    file = str(tmp_path / "w")
    timernn("models", "export", "raced", file)
    assert timernn("models", "import", "raced", file, "--expect-version=1").code == 0
    failed = timernn("models", "import", "raced", file, "--expect-version=1")
    assert failed.code == 1
    assert "VERSION_CONFLICT" in one_line(failed.err)


def test_a_file_that_is_no_weights_is_one_line(timernn: Timernn, tmp_path: Path) -> None:
    """Rubbish is refused with a reason."""
    create(timernn, "rubbish")
    (tmp_path / "r").write_bytes(b"not safetensors")
    failed = timernn("models", "import", "rubbish", str(tmp_path / "r"))
    assert failed.code == 1
    one_line(failed.err)


def test_sessions_are_listed_shown_and_closed(timernn: Timernn, server: Any) -> None:
    """A session that a program opened can be followed and ended from the command line."""
    create(timernn, "with-session")
    with (
        library.connect(server.address) as client,
        client.session("with-session", session_id="device-7", batch_size=2) as session,
    ):
        session.forward(np.zeros((2, 5, 3), np.float32))
    shown = json.loads(timernn("sessions", "list", "--model=with-session", "--json").out)
    assert [(s["session_id"], s["chunk_seq"]) for s in shown] == [("device-7", 1)]
    assert json.loads(timernn("sessions", "show", "device-7", "--json").out)["batch_size"] == 2
    assert one_line(timernn("sessions", "close", "device-7").out) == "closed device-7"
    failed = timernn("sessions", "show", "device-7")
    assert "SESSION_CLOSED" in one_line(failed.err)


def test_closing_an_unknown_session_is_one_line(timernn: Timernn) -> None:
    """A name that never existed is distinguished from one that has ended."""
    failed = timernn("sessions", "close", "never-was")
    assert failed.code == 1
    assert "SESSION_NOT_FOUND" in one_line(failed.err)


@pytest.mark.parametrize(
    "words",
    [
        ("models", "create", "x"),
        ("models", "create", "x", "--input-size=0", "--hidden-size=1"),
        ("models", "create", "x", "--input-size=1", "--hidden-size=1", "--set=beta3=1"),
        ("models", "create", "x", "--input-size=1", "--hidden-size=1", "--set=lr=fast"),
        ("models", "crate"),
        ("ping", "--srever=x"),
        ("ping", "--timeout=soon"),
    ],
)
def test_what_is_not_understood_is_exit_code_2(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    """Usage errors are one line, before any call is made."""
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert one_line(err).startswith("timernn: ")


def commands_below(words: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Yield the words of each command, and whether it only groups others."""
    below = getattr(command, "commands", {})
    yield words, bool(below)
    for name, each in below.items():
        yield from commands_below((*words, name), each)


@pytest.mark.parametrize(("words", "is_group"), list(commands_below((), command_tree())))
def test_every_command_explains_itself(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], *, is_group: bool
) -> None:
    """--help works everywhere, and commands show how they are used."""
    assert main([*words, "--help"]) == 0
    shown = capsys.readouterr().out
    assert is_group or f"timernn {' '.join(words)}" in shown.split("Example")[1]


def test_help_is_cut_where_the_terminal_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not also where the docstring's lines end, which left single words on lines of their own."""
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["doctor", "--help"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "store is asked too. Run beside the server, in its container, it also compares" in lines
