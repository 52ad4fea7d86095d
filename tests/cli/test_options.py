"""The options of serve: every setting, with its name, its variable and its explanation."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import typer
from typer.testing import CliRunner

from service.cli import main
from service.cli.options import (
    HIDDEN,
    LIMIT_PREFIX,
    LIMITS_HELP,
    SETTINGS_HELP,
    format_bytes,
    parse_address,
    parse_bytes,
)
from service.cli.settings import takes_settings
from service.listening import is_loopback
from service.settings import Limits, Settings

if TYPE_CHECKING:
    from collections.abc import Mapping


def settings_of(*arguments: str, env: Mapping[str, str] | None = None) -> Settings:
    """Return what a command with serve's options gets for these arguments."""
    got: list[Settings] = []
    app = typer.Typer()
    app.command()(takes_settings(got.append))
    result = CliRunner().invoke(app, list(arguments), env=env, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return got[0]


def test_every_setting_is_explained() -> None:
    """A setting without a help text, and a help text without a setting, are reported here."""
    assert set(SETTINGS_HELP) == {f.name for f in fields(Settings)} - {"limits"}
    assert set(LIMITS_HELP) == {f.name for f in fields(Limits)}


def test_no_option_s_name_is_cut_at_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that ends in dots cannot be typed."""
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["serve", "--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    names = {f.name for f in fields(Settings)} - {"limits", *HIDDEN}
    names |= {LIMIT_PREFIX + f.name for f in fields(Limits)}
    assert {"--" + name.replace("_", "-") for name in names} <= set(shown.split())


def test_without_options_the_defaults_hold() -> None:
    """Nothing is changed on the way through the command line."""
    assert settings_of() == Settings()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--listen", "[::1]:0"), replace(Settings(), listen="[::1]:0")),
        (("--data-dir", "/d"), replace(Settings(), data_dir=Path("/d"))),
        (("--session-cache-bytes", "2KiB"), replace(Settings(), session_cache_bytes=2048)),
        (("--log-level", "DEBUG"), replace(Settings(), log_level="debug")),
        (("--durability", "replica"), replace(Settings(), durability="replica")),
        (
            ("--limit-replay-window", "7"),
            replace(Settings(), limits=replace(Limits(), replay_window=7)),
        ),
    ],
)
def test_an_option_sets_its_field_alone(arguments: tuple[str, ...], expected: Settings) -> None:
    """Each option reaches the field that it is named after."""
    assert settings_of(*arguments) == expected


def test_every_option_has_an_environment_variable() -> None:
    """TIMERNN_ and the option's name in capitals sets it, for every number among the limits."""
    numbers = {f.name: 1000 + i for i, f in enumerate(fields(Limits))}
    env = {f"TIMERNN_{LIMIT_PREFIX.upper()}{name.upper()}": str(n) for name, n in numbers.items()}
    assert settings_of(env=env) == replace(Settings(), limits=Limits(**numbers))


def test_an_option_wins_over_its_variable() -> None:
    """What was typed counts more than what was in the environment."""
    settings = settings_of("--listen", "127.0.0.1:1", env={"TIMERNN_LISTEN": "127.0.0.1:2"})
    assert settings.listen == "127.0.0.1:1"


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("17", 17), ("1KiB", 1024), ("16 mib", 16 << 20), ("2GiB", 2 << 30)],
)
def test_sizes_are_read_with_their_unit(text: str, count: int) -> None:
    """Bytes, KiB, MiB and GiB are understood in any case."""
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1.5MiB", "3 zB", "1e6"])
def test_what_is_no_size_is_refused(text: str) -> None:
    """The message says what a size looks like."""
    with pytest.raises(typer.BadParameter, match="such as 1048576 or 16MiB"):
        parse_bytes(text)


@pytest.mark.parametrize("count", [0, 1, 1000, 1024, 16 << 20, 3 << 30])
def test_a_written_size_reads_as_itself(count: int) -> None:
    """format_bytes and parse_bytes undo each other."""
    assert parse_bytes(format_bytes(count)) == count


@pytest.mark.parametrize(
    "text", ["localhost:50051", "0.0.0.0:0", "[::1]:65535", "host.example:1", "unix:/s"]
)
def test_addresses_are_accepted(text: str) -> None:
    """Names, IPv4 and bracketed IPv6 go through unchanged."""
    assert parse_address(text) == text


@pytest.mark.parametrize(
    "text", ["", "unix:", "localhost", ":1", "::1:5", "host:65536", "host:x", "a b:1"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    """The message says what an address looks like."""
    with pytest.raises(typer.BadParameter, match="expected HOST:PORT"):
        parse_address(text)


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        ("127.0.0.1:1", True),
        ("127.8.9.1:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:/run/timernn.sock", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.7:1", False),
        ("timernn:1", False),
    ],
)
def test_only_loopback_addresses_pass_as_local(listen: str, *, expected: bool) -> None:
    """Everything that another machine might reach is not loopback."""
    assert is_loopback(listen) is expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--limit-max-ttl-ms", "600000"),
            (
                "'--limit-default-ttl-ms': expected --limit-min-ttl-ms to --limit-max-ttl-ms, "
                "1000 to 600000, got 3600000"
            ),
        ),
        (
            ("--limit-default-ttl-ms", "999"),
            (
                "'--limit-default-ttl-ms': expected --limit-min-ttl-ms to --limit-max-ttl-ms, "
                "1000 to 604800000, got 999"
            ),
        ),
        (
            ("--limit-min-ttl-ms", "604800001"),
            "'--limit-min-ttl-ms': expected at most --limit-max-ttl-ms, 604800000, got 604800001",
        ),
        (
            ("--durability", "replica", "--durability-timeout-ms", "500"),
            "'--durability-timeout-ms': expected less than --store-timeout-ms, 500, got 500",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    """One line that names one of them and what the other allows; the exit code is 2."""
    assert main(["serve", *arguments]) == 2
    assert capsys.readouterr().err == f"timernn: Invalid value for {message}\n"
