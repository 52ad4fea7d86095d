"""From the command line, the environment and a file to the `Settings` of a server."""

from __future__ import annotations

import functools
import inspect
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.config_file import read_config
from service.cli.options import LIMIT_PREFIX, OPTIONS
from service.settings import Limits, Settings

if TYPE_CHECKING:
    from collections.abc import Callable


def takes_settings(command: Callable[[Settings], None]) -> Callable[..., None]:
    """Give a command that takes `Settings` an option for each of their fields, and --config."""
    parameters = [_config_parameter(), *(option.parameter() for option in OPTIONS)]

    @functools.wraps(command)
    def with_options(**values: Any) -> None:
        command(settings_from(values))

    # Typer reads these two attributes instead of the wrapper's signature.
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {p.name: p.annotation for p in parameters}
    del with_options.__wrapped__
    return with_options


def settings_from(values: dict[str, Any]) -> Settings:
    """Build the Settings from the options' values.

    Args:
        values: By option name: `batch_size` of the limits is `limit_batch_size`.
    """
    limits = {f.name: values[LIMIT_PREFIX + f.name] for f in fields(Limits)}
    others = {f.name: values[f.name] for f in fields(Settings) if f.name in values}
    return Settings(**others, limits=Limits(**limits))


def _config_parameter() -> inspect.Parameter:
    option = typer.Option(
        "--config",
        envvar="TIMERNN_CONFIG",
        metavar="FILE",
        help="File with settings, TOML; an option and its variable count more. Read at the start.",
        is_eager=True,  # the other options get their defaults from it
        callback=_take_config,
        rich_help_panel="Server",
    )
    return inspect.Parameter(
        "config",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[Path | None, option],
    )


def _take_config(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None and not context.resilient_parsing:
        context.default_map = read_config(path)
    return path
