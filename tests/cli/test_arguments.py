"""Every option of every command: a wrong value is one line that names it, and nothing is done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from service.cli import main
from service.cli.app import command_tree, known_variables

if TYPE_CHECKING:
    from collections.abc import Iterator

# No number, no size, no choice, no address and no URL; a number that none of them takes.
WRONG = ("neither nor", "nan", "-1")
# A name that a host may have is no wrong address.
ADDRESSES = {"server", "listen", "tls_server_name"}
WRONG_ADDRESSES = ("neither nor", "host:port:port", "[::1")
# How Pydantic, Click and Typer say what this command says in its own words.
NOT_OURS = ("Input should", "is not one of", "is a directory", "does not exist")
# Any text is good for these; the server or the file system says what is not.
FREE = {"model", "hyperparameter", "failpoints", "worker", "worker_count", "data_dir"}
FREE |= {"file", "tenant", "name", "token_id"}
# What an option takes that has to be there and takes no number.
CHOSEN = {"role": "infer"}
# A port, where a server would begin to serve if it were let.
SAFE = ("--listen", "127.0.0.1:0")


class Option(NamedTuple):
    """One option of one command."""

    command: tuple[str, ...]
    name: str
    flag: str
    variable: str
    needed: tuple[str, ...]


def options(*, are_flags: bool = False) -> Iterator[Option]:
    """Go through the options of all commands that take a value, or through the flags."""
    commands: list[tuple[tuple[str, ...], Any]] = [((), command_tree())]
    for path, command in commands:
        for name, below in getattr(command, "commands", {}).items():
            commands.append(((*path, name), below))
        needed = tuple(
            word
            for each in command.params
            if each.required
            for word in (
                [each.opts[0], CHOSEN.get(each.name, "1")]
                if each.param_type_name == "option"
                else [__file__ if path[-1:] in {("import",), ("restore",)} else "x"]
            )
        )
        for option in command.params:
            is_checked = option.param_type_name == "option" and option.is_flag is are_flags
            if path and is_checked and option.name not in FREE:
                yield Option(path, option.name, option.opts[0], option.envvar or "", needed)


@pytest.mark.parametrize("option", list(options()), ids=lambda o: f"{'-'.join(o.command)} {o.flag}")
def test_a_wrong_value_is_one_line_that_names_the_option(
    option: Option, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 or 2, no traceback, nothing on stdout."""
    safe = SAFE if option.command == ("serve",) and option.name != "listen" else ()
    for value in WRONG_ADDRESSES if option.name in ADDRESSES else WRONG:
        code = main([*option.command, *option.needed, *safe, option.flag, value])
        captured = capsys.readouterr()
        assert code in (1, 2), (value, captured)
        assert captured.out == ""
        assert len(captured.err.splitlines()) == 1, (value, captured.err)
        assert option.flag in captured.err or option.name in captured.err, (value, captured.err)
        assert not any(words in captured.err for words in NOT_OURS), captured.err


def flags() -> Iterator[Option]:
    """Go through the flags of all commands that a variable can set."""
    for option in options(are_flags=True):
        if option.variable:
            yield option


@pytest.mark.parametrize("option", list(flags()), ids=lambda o: f"{'-'.join(o.command)} {o.flag}")
def test_a_flags_variable_says_true_or_false(
    option: Option, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anything else is one line that names the flag."""
    monkeypatch.setenv(option.variable, "maybe")
    assert main([*option.command, *option.needed]) == 2
    said = f"'{option.flag}' (env var: '{option.variable}'): expected true or false"
    assert capsys.readouterr().err == f"timernn: Invalid value for {said}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--input-size", "0"), "a whole number of at least 1, got '0'"),
        (("--input-size", "1.5"), "a whole number of at least 1, got '1.5'"),
        (("--seed", "-1"), "a whole number of at least 0, got '-1'"),
        (("--lr", "nan"), "a number of at least 0, got 'nan'"),
        (("--timeout", "0"), "a number of at least 0.001, got '0'"),
        (("--dtype", "int8"), "one of float32, float64, got 'int8'"),
        (("--tls-ca", ""), "a file, got nothing"),
    ],
)
def test_client_commands_refuse_a_value_as_serve_does(
    capsys: pytest.CaptureFixture[str], words: tuple[str, str], said: str
) -> None:
    """Numbers, choices and files, in the same words."""
    size = () if "--input-size" in words else ("--input-size", "1")
    assert main(["models", "create", "x", *size, "--hidden-size", "1", *words]) == 2
    assert capsys.readouterr().err.endswith(f"): expected {said}\n")


def test_a_variable_that_nobody_reads_is_warned_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A misspelt setting is not ignored in silence; what some command reads is no mistake."""
    for name in ("TIMERNN_LISTENN", "TIMERNN_LIMIT_REPLAY_WINDOW", "TIMERNN_SERVER"):
        monkeypatch.setenv(name, "7")
    assert main(["models", "list", "--timeout", "zero"]) == 2
    warning, _ = capsys.readouterr().err.splitlines()
    assert "TIMERNN_LISTENN is set" in warning


def test_settings_and_options_of_the_client_commands_are_known() -> None:
    """Each option's variable is one that a command reads."""
    assert {"TIMERNN_LISTEN", "TIMERNN_PROXY", "TIMERNN_LR", "TIMERNN_JSON"} <= known_variables()
