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
    needed: tuple[str, ...]


def options() -> Iterator[Option]:
    """Go through the options of all commands that take a value."""
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
            is_checked = option.param_type_name == "option" and not option.is_flag
            if path and is_checked and option.name not in FREE:
                yield Option(path, option.name, option.opts[0], needed)


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
