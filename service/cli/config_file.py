"""The file of `timernn serve --config`: TOML, whose keys are the options' names.

What it says becomes the options' defaults, so an option and its variable count more. All of it is checked
here, so that a message can name the file and the key.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, Final

import typer

from service.cli.options import OPTIONS
from service.files import TomlError, parse_toml, read_file

if TYPE_CHECKING:
    from pathlib import Path

    from service.cli.options import ServeOption

_BY_NAME: Final = {option.name: option for option in OPTIONS if not option.is_hidden}
_LONGEST_SHOWN: Final = 64


class ConfigFileError(typer.BadParameter):
    """The file cannot be used; one line that names it, the key, what was expected and what came."""

    def format_message(self) -> str:
        """Return the line without the option's name before it: the error is in the file."""
        return str(self.message)


def read_config(path: Path) -> dict[str, Any]:
    """Return what a file says, by the name of the option's parameter.

    Raises:
        ConfigFileError: If it cannot be read, or says what no option takes.
    """
    source = f"--config {path}"
    try:
        document = parse_toml(read_file(path, takes_pipe=True))
    except OSError as error:
        raise ConfigFileError(f"{source}: {error.strerror}") from error
    except TomlError as error:
        raise ConfigFileError(f"{source}: {error}") from error
    values: dict[str, Any] = {}
    for key, value in document.items():
        name = key.replace("-", "_")
        if name not in _BY_NAME:
            raise ConfigFileError(f"{source}: {key!r} is no setting{_hint(name)}")
        if name in values:
            raise ConfigFileError(f"{source}: {key}: stands there twice, with - and with _")
        values[name] = _checked(_BY_NAME[name], value, f"{source}: {key}")
    return values


def _checked(option: ServeOption, value: object, where: str) -> Any:
    # A bool is an int to Python.
    if type(value) not in option.kind.toml:
        raise ConfigFileError(f"{where}: expected {option.kind.expected}, got {_shown(value)}")
    if option.name == "redis_url":
        _check_without_password(str(value), where)
    if option.kind.parse is None:
        return value
    try:
        return option.kind.parse(value)
    except typer.BadParameter as error:
        raise ConfigFileError(f"{where}: {error.message}") from error


def _check_without_password(url: str, where: str) -> None:
    from service.store.addresses import parse_store_url  # noqa: PLC0415 - not for other commands

    if not url:
        return
    try:
        store = parse_store_url(url)
    except ValueError as error:
        raise ConfigFileError(f"{where}: {error}") from error
    if (
        store.password
        or "ssl_password" in store.link_options
        or "password" in store.sentinel_credentials
    ):
        raise ConfigFileError(
            f"{where}: expected a URL without a password, got one with it: put the store's into a file, "
            "redis-password-file, or the URL into TIMERNN_REDIS_URL"
        )


def _shown(value: object) -> str:
    """Return a value for a message; what an array or a table holds stays out of it."""
    match value:
        case dict():
            return "a table"
        case list():
            return "an array"
        case bool():
            return str(value).lower()
    shown = repr(value)
    return shown if len(shown) <= _LONGEST_SHOWN else f"{shown[:_LONGEST_SHOWN]}…"


def _hint(name: str) -> str:
    close = difflib.get_close_matches(name, _BY_NAME, n=1, cutoff=0.7)
    if close:
        return f": did you mean {_BY_NAME[close[0]].key!r}?"
    return "; `timernn serve --help` lists them, without the dashes in front"
