"""From the command line, the environment and a file to the `Settings` of a server."""

from __future__ import annotations

import functools
import inspect
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.config_file import read_config
from service.cli.options import LIMIT_PREFIX, OPTIONS, parse_path
from service.settings import Limits, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Collection


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


def config_option(names: Collection[str] = ()) -> Any:
    """Return Typer's option --config, whose file holds what a command's other options are by default.

    Args:
        names: The settings that the command takes from it; empty: all.
    """

    def take(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None and not context.resilient_parsing:
            said = read_config(path)
            context.default_map = {k: v for k, v in said.items() if k in names or not names}
        return path

    return typer.Option(
        "--config",
        envvar="TIMERNN_CONFIG",
        parser=parse_path,
        metavar="FILE",
        help="The server's file of settings, TOML; an option and its variable count more.",
        is_eager=True,  # the other options get their defaults from it
        callback=take,
        show_default=False,
    )


def _config_parameter() -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    shown = Annotated[Path | None, config_option()]
    return inspect.Parameter("config", kind, default=None, annotation=shown)
