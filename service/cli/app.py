"""All commands under one name, and what becomes of their errors."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from service.cli.output import fail
from service.cli.serve import serve

# Click's UsageError, which Typer has under another module from release to release.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="timernn",
    help="A stateful recurrent-network service: stream and train a TimeRNN over gRPC.",
    epilog="Every option can also be set by the environment variable named beside it.",
    context_settings={"auto_envvar_prefix": "TIMERNN", "help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.command("serve")(serve)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print("v")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; print an error as one line on stderr."""
    try:
        code = app(arguments, prog_name="timernn", standalone_mode=False)
    except UsageError as error:
        fail(error.format_message())
        return 2
    return code if isinstance(code, int) else 0
