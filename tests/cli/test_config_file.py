"""`timernn serve --config FILE`: settings by the options' names, below option and variable."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer
from typer.testing import CliRunner

from service.cli import main
from service.cli.options import CHOICES, OPTIONS
from service.cli.serve import serve
from service.cli.settings import takes_settings
from service.settings import Limits, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ROOT = Path(__file__).parents[2]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return where the file is."""
    return tmp_path / "timernn.toml"


def settings_of(file: Path, *arguments: str, env: Mapping[str, str] | None = None) -> Settings:
    """Return what a server gets with this file."""
    got: list[Settings] = []
    app = typer.Typer()
    app.command()(takes_settings(got.append))
    words = [f"--config={file}", *arguments]
    result = CliRunner().invoke(app, words, env=env, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return got[0]


def test_each_setting_may_stand_in_the_file(file: Path) -> None:
    """Every option's name without the dashes in front, with its default as it is or another value."""
    lines: list[str] = []
    expected: dict[str, Any] = {}
    for option in OPTIONS:
        if option.is_hidden or option.name in CHOICES:
            continue
        if isinstance(option.default, bool):
            expected[option.name], text = True, "true"
        elif isinstance(option.default, int | float):
            expected[option.name], text = option.default + 1, str(option.default + 1)
        else:
            expected[option.name], text = type(option.default)("unix:/s"), '"unix:/s"'
        lines.append(f"{option.key} = {text}")
    file.write_text("\n".join(lines))
    limits = {f.name: expected.pop(f"limit_{f.name}") for f in fields(Limits)}
    assert settings_of(file) == replace(Settings(), limits=Limits(**limits), **expected)


def test_an_option_counts_more_than_its_variable_and_that_more_than_the_file(file: Path) -> None:
    """And the file more than the default, which holds for what none of them says."""
    file.write_text("workers = 2\nstore-connections = 3\nmax-batch-rows = 4\ninsecure = true\n")
    env = {"TIMERNN_WORKERS": "20", "TIMERNN_STORE_CONNECTIONS": "30", "TIMERNN_INSECURE": "false"}
    settings = settings_of(file, "--workers=200", env=env)
    expected = replace(Settings(), workers=200, store_connections=30, max_batch_rows=4)
    assert settings == expected


def test_a_variable_names_the_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """TIMERNN_CONFIG, as every option has a variable."""
    file.write_text("workers = 0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIMERNN_CONFIG", str(file))
        assert main(["serve"]) == 2
    assert f"{file}: workers: expected a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["session-cache-bytes", "session_cache_bytes"])
def test_a_name_may_have_dashes_or_underscores(file: Path, key: str) -> None:
    """As on the command line, or as in the variable."""
    file.write_text(f'{key} = "2MiB"')
    assert settings_of(file).session_cache_bytes == 2 << 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("workerz = 1", "'workerz' is no setting: did you mean 'workers'?"),
        ("testing = true", "'testing' is no setting; `timernn serve --help` lists them"),
        ("[limits]", "'limits' is no setting"),
        (
            "[serve]",
            "'serve' is no setting; `timernn serve --help` lists them",
        ),  # nothing is like it
        ('tls-cert = "a"\ntls_cert = "b"', "tls_cert: stands there twice"),
        ('workers = "4"', "workers: expected a whole number of at least 1, got '4'"),
        ("workers = 0", "workers: expected a whole number of at least 1, got 0"),
        ("workers = true", "workers: expected a whole number of at least 1, got true"),
        ("workers = 1.5", "workers: expected a whole number of at least 1, got 1.5"),
        ("drain-s = nan", "drain-s: expected a number of at least 0, got nan"),
        ("drain-s = -0.5", "drain-s: expected a number of at least 0, got -0.5"),
        ('insecure = "yes"', "insecure: expected true or false, got 'yes'"),
        ("data-dir = 1", "data-dir: expected a path, got 1"),
        ("session-cache-bytes = -1", "session-cache-bytes: expected bytes, such as 1048576"),
        ('session-cache-bytes = "1.5MiB"', "session-cache-bytes: expected bytes, such as 1048576"),
        ('durability = "both"', "durability: expected one of primary, replica, got 'both'"),
        ('listen = "here"', "listen: expected HOST:PORT, such as 127.0.0.1:50051, got 'here'"),
        ('redis-url = "http://h"', "redis-url: expected"),
        ("a = = b", "not valid TOML: "),
        ("a = " + "[" * 5000, "not valid TOML: nested too deeply"),
        ("\xff", "expected UTF-8 text"),
    ],
)
def test_a_bad_file_is_one_line(
    file: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    """It names the file, the key, what was expected and what came; the exit code is 2."""
    file.write_bytes(text.encode("latin-1"))
    assert main(["serve", "--config", str(file)]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith(f"timernn: --config {file}: {message}")


def test_a_file_that_is_not_there_is_one_line(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that was asked for is never left out silently."""
    assert main(["serve", "--config", str(file)]) == 2
    assert capsys.readouterr().err == f"timernn: --config {file}: No such file or directory\n"


@pytest.mark.parametrize(
    "url",
    [
        '"redis://user:hunter2@store:6379/0"',
        '"redis://store:6379/0?password=hunter2"',
        '"redis+sentinel://store/main?sentinel_password=hunter2"',
        '"rediss://store:6379/0?ssl_password=hunter2"',
        '"redis://user:hunt/er2@store"',
        '["redis://user:hunter2@store"]',
    ],
)
def test_a_password_is_refused_and_not_repeated(
    file: Path, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    """It belongs into a file of its own, since this one may be read by many."""
    file.write_text(f"redis-url = {url}")
    assert main(["serve", "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"timernn: --config {file}: redis-url: expected ")
    assert "hunt" not in said
    assert "er2" not in said


def test_workers_serve_with_what_the_file_says(
    serving: Any, bare: Callable[..., Any], tmp_path: Path, file: Path
) -> None:
    """What an option takes back does not come again from the file in a worker."""
    file.write_text('workers = 2\nlimit-replay-window = 9\ntenants = "no-such-file"\n')
    with serving(tmp_path, "--config", str(file), "--tenants", "") as server:
        shown = bare("ping", "--json", "--server", server.address).out
    assert '"replay_window": 9' in shown


def test_the_examples_are_files_that_a_server_takes(file: Path) -> None:
    """That of --help, those of docs/deployment.md, and the file beside the systemd unit."""
    in_help = re.findall(r"(?:^ +[a-z-]+ = .+\n)+", serve.__doc__ or "", re.MULTILINE)
    on_page = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/deployment.md").read_text(), re.DOTALL)
    of_unit = (ROOT / "docker/systemd/timernn.toml").read_text()
    assert in_help
    for text in (*in_help, *on_page, of_unit):
        file.write_text(text)
        assert settings_of(file) != Settings()
