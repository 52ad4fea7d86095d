"""All commands under one name, and the handling of their errors."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import re
import textwrap
import traceback
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from service.cli import checkpoints, models, sessions, tenants, tokens
from service.cli.backup import backup, restore
from service.cli.doctor import doctor
from service.cli.extras import explain_missing
from service.cli.output import fail, warn
from service.cli.ping import ping
from service.cli.remote import TOKEN_VARIABLE, advise
from service.cli.serve import serve
from service.cli.top import top

if TYPE_CHECKING:
    import timernn

# Click's UsageError, which Typer keeps in another module from release to release.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

# What Typer shows of Pydantic's: before an error of ours, and for the variable of a flag, which takes no parser.
_PYDANTIC = {
    ": Value error, ": ": ",
    "Input should be a valid boolean, unable to interpret input": "expected true or false",
}


class PlainCommand(TyperCommand):
    """A command whose help is plain text, since Rich's tables cut long option names at 80 columns."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """Take the arguments of Typer's own command class."""
        super().__init__(*args, **{**options, "rich_markup_mode": None})

    def format_help_text(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]  # noqa: ARG002
        """Write the docstring, its prose cut into lines of the terminal's width, its examples as they are."""
        formatter.write("\n")
        for line in (self.help or "").splitlines():
            prose = not line.startswith(" ")
            cut = textwrap.fill(line, formatter.width, break_on_hyphens=False)
            formatter.write((cut if prose else line) + "\n")


app = typer.Typer(
    name="timernn",
    help="A stateful recurrent-network service: stream and train a TimeRNN over gRPC.",
    epilog="Each option can also be set by the environment variable named beside it.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.command(cls=PlainCommand)(serve)
app.command()(ping)
app.command()(doctor)
app.command()(top)
app.add_typer(models.app, name="models")
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(sessions.app, name="sessions")
app.add_typer(tenants.app, name="tenants")
app.add_typer(tokens.app, name="tokens")
app.command()(backup)
app.command()(restore)


def _print_version(value: bool) -> None:  # noqa: FBT001 - Typer's callback
    if value:
        print(f"timernn {version('timernn')}")
        raise typer.Exit


@app.callback(no_args_is_help=True)
def _root(
    context: typer.Context,
    *,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
) -> None:
    # Python shows warnings where there is no log; a command says in its one line why it failed.
    if context.invoked_subcommand != serve.__name__:
        logging.basicConfig(handlers=[logging.NullHandler()])


@functools.cache
def command_tree() -> Any:
    """Return all commands as Click has them; Typer takes much longer to make them than to run one."""
    tree = typer.main.get_command(app)
    for command in _all_commands(tree):
        # A paragraph becomes one line, which is cut where the terminal ends.
        command.help = re.sub(r"(?<=\S)\n(?=\S)", " ", inspect.cleandoc(command.help or ""))
    return tree


def _all_commands(tree: Any) -> list[Any]:
    commands = [tree]
    for command in commands:
        commands += getattr(command, "commands", {}).values()
    return commands


def known_variables() -> set[str]:
    """Return the environment variables that some command reads, by the options of all of them."""
    options = [option for command in _all_commands(command_tree()) for option in command.params]
    named = {str(option.envvar) for option in options if option.envvar}
    return {"TIMERNN_TRACEBACK", TOKEN_VARIABLE} | named


def _warn_of_unknown_variables() -> None:
    """Warn of a variable that no option reads: a misspelt setting would be ignored silently."""
    given = {name for name in os.environ if name.startswith("TIMERNN_")}
    for name in sorted(given - known_variables()) if given else ():
        warn(f"the environment variable {name} is set, and no option of this version reads it")


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; print an error as one line on stderr."""
    if "--supervised" not in arguments:  # once, not in every worker
        _warn_of_unknown_variables()
    try:
        code = command_tree()(arguments, prog_name="timernn", standalone_mode=False)
    except UsageError as error:
        if message := str(error.format_message()):  # type: ignore[attr-defined]  # Click's own
            # Without a message the help was printed instead.
            for of_pydantic, ours in _PYDANTIC.items():
                message = message.replace(of_pydantic, ours)
            fail(message)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001 - whatever it is, people get a line and no traceback
        if os.environ.get("TIMERNN_TRACEBACK"):
            traceback.print_exc()
        fail(explain(error))
        return 1
    return code if isinstance(code, int) else 0


def explain(error: Exception) -> str:
    """Return the message to print for an error that ended a command."""
    from timernn import Error  # noqa: PLC0415 - most commands end without one

    if isinstance(error, Error):
        return _explain_own(error)
    if isinstance(error, ModuleNotFoundError) and (text := explain_missing(error)):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    expected = isinstance(error, OSError) or type(error).__module__.startswith("service.")
    if expected and str(error):
        return str(error)
    return f"{type(error).__name__}: {error} (TIMERNN_TRACEBACK=1 shows where it came from)"


def _explain_own(error: timernn.Error) -> str:
    from timernn import NoServer, Unavailable  # noqa: PLC0415 - most commands end without one

    if text := advise(error):
        return f"{error.reason}: {text}"
    if isinstance(error, NoServer):
        return error.message
    if isinstance(error, Unavailable) and not error.reason:
        return f"no server answers: {error.message}"
    return str(error)
