"""Files that a command names: what never ends, is no file or is too large is refused in a line."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from service.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Timernn = Callable[..., Any]

TOO_LARGE = "expected at most 16 MiB, got more"
A_DEVICE = "expected a file, got a device"
A_PIPE = "expected a file, got a pipe"
READERS: dict[str, tuple[str, ...]] = {
    "serve --config": ("serve", "--config", "{}"),
    "serve --tokens": ("serve", "--tokens", "{}"),
    "serve --tenants": ("serve", "--tenants", "{}"),
    "serve --tls-cert": ("serve", "--tls-cert", "{}", "--tls-key", "no"),
    "serve --redis-password-file": (
        "serve", "--redis-url", "redis://127.0.0.1:1", "--redis-password-file", "{}",
    ),
    "serve ssl_ca_certs": ("serve", "--redis-url", "rediss://127.0.0.1:1?ssl_ca_certs={}"),
    "doctor --config": ("doctor", "--config", "{}"),
    "tokens list": ("tokens", "list", "--file", "{}"),
    "tokens create": ("tokens", "create", "--file", "{}", "--role", "infer", "--tenant", "a"),
    "tenants purge": (
        "tenants", "purge", "a", "--yes", "--redis-url", "redis://127.0.0.1:1",
        "--redis-password-file", "{}",
    ),
    "--token-file": ("models", "list", "--token-file", "{}"),
    "--tls-ca": ("models", "list", "--tls-ca", "{}"),
    "top --tls-ca": ("top", "--once", "--tls-ca", "{}"),
}  # fmt: skip
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "backup": ("backup", "{}"),
    "restore": ("restore", "{}"),
    "models export": ("models", "export", "m", "{}"),
    "models import": ("models", "import", "m", "{}"),
}
# Without a name serve does without the file, as by default.
MAY_BE_NOTHING = (
    "serve --tokens",
    "serve --tenants",
    "serve --tls-cert",
    "serve --redis-password-file",
)
TAKE_A_PIPE = ("--token-file", "--tls-ca", "top --tls-ca")
TAKE_AN_EMPTY_FILE = ("serve --config", "doctor --config")


@pytest.mark.parametrize("reader", READERS)
def test_a_device_that_never_ends_is_refused(
    reader: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As what it is, before a byte of it is read."""
    device = tmp_path / "device"
    device.symlink_to("/dev/zero")  # a lock stands beside the link
    assert A_DEVICE in refused(reader, str(device), tmp_path, capsys)


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_is_too_large_is_refused(
    reader: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the bound."""
    file = tmp_path / "large"
    with file.open("wb") as opened:
        opened.truncate(1 << 40)
    file.chmod(0o600)
    assert TOO_LARGE in refused(reader, str(file), tmp_path, capsys)


@pytest.mark.parametrize(
    "option", [name for name in READERS | ARGUMENTS if name not in MAY_BE_NOTHING]
)
def test_no_name_is_no_file(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the folder where the command runs."""
    assert "expected a file, got nothing" in refused(option, "", tmp_path, capsys)


def test_no_name_is_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded store's: it would be the one where the command runs."""
    nowhere = ("--redis-url", "redis://127.0.0.1:1")
    assert main(["serve", *nowhere, "--data-dir", ""]) == 2
    assert "expected a folder, got nothing" in capsys.readouterr().err


@pytest.mark.parametrize("reader", [name for name in READERS if name not in TAKE_AN_EMPTY_FILE])
def test_a_pipe_that_nobody_writes_into_is_no_wait(
    reader: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is read again when it changes takes none; to the others it is an empty file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    said = refused(reader, str(pipe), tmp_path, capsys)
    assert (A_PIPE in said) == (reader not in TAKE_A_PIPE)


def refused(reader: str, file: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command with a file; return its one line."""
    words = [word.replace("{}", file) for word in (READERS | ARGUMENTS)[reader]]
    if words[0] == "serve":
        words += ["--listen", "127.0.0.1:0", "--data-dir", str(folder / "store")]
    assert main(words) in (1, 2)
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), err
    return err


def test_weights_come_from_a_file_of_bounded_size(timernn: Timernn, tmp_path: Path) -> None:
    """A device, a pipe without a writer, and more than any server takes."""
    timernn("models", "create", "bounded", "--input-size=1", "--hidden-size=1")
    pipe, large = tmp_path / "pipe", tmp_path / "large"
    os.mkfifo(pipe)
    with large.open("wb") as opened:
        opened.truncate((4 << 30) + 1)
    for file, error in (
        ("/dev/zero", A_DEVICE),
        (str(large), "expected at most 4,096 MiB, got more"),
        (str(pipe), "expected a safetensors file with Wx, Wh and b, got nothing"),
    ):
        done = timernn("models", "import", "bounded", file)
        assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
        assert error in done.err


def test_weights_may_come_through_a_pipe(bare: Timernn, server: Any, tmp_path: Path) -> None:
    """As of a shell: `cat FILE | timernn models import MODEL /dev/stdin`."""
    for words in (
        ("create", "piped", "--input-size=64", "--hidden-size=64"),
        ("export", "piped", str(tmp_path / "weights")),
    ):
        assert bare("models", *words, TIMERNN_SERVER=server.address).code == 0
    command = [sys.executable, "-m", "service", "models", "import", "piped", "/dev/stdin"]
    data = (tmp_path / "weights").read_bytes()
    done = subprocess.run(
        [*command, "--server", server.address], input=data, capture_output=True, check=True
    )
    assert done.stdout == b"piped has weights version 2 now\n"


@pytest.mark.parametrize(("kind", "error"), [("device", A_DEVICE), ("pipe", A_PIPE)])
def test_a_backup_is_a_file(timernn: Timernn, tmp_path: Path, kind: str, error: str) -> None:
    """It is read from its end."""
    os.mkfifo(tmp_path / "pipe")
    file = "/dev/zero" if kind == "device" else str(tmp_path / "pipe")
    done = timernn("restore", file)
    assert (done.code, done.out) == (1, "")
    assert done.err == f"timernn: {file}: {error}\n"


@pytest.mark.parametrize("words", [("models", "export", "bounded"), ("backup",)])
def test_only_a_file_is_overwritten(timernn: Timernn, tmp_path: Path, words: tuple[str]) -> None:
    """Not a device or a pipe, in whose place a file would stand; and the folder has to be there."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for file, error in (
        (pipe, f"{pipe} is a device or a pipe, which a file would replace"),
        (tmp_path / "no" / "file", f"there is no folder {tmp_path / 'no'}"),
    ):
        done = timernn(*words, str(file), "--force")
        assert (done.code, done.out) == (2, "")
        assert done.err == f"timernn: Invalid value for 'FILE': {error}\n"
    assert pipe.is_fifo()


def test_a_token_on_stdin_is_a_line_of_bounded_length(bare: Timernn, tmp_path: Path) -> None:
    """A device on stdin ends as a token that is not known."""
    file = str(tmp_path / "tokens.toml")
    assert bare("tokens", "create", "--file", file, "--role=infer", "--tenant=a").code == 0
    command = [sys.executable, "-m", "service", "tokens", "revoke", "--file", file, "--token-stdin"]
    with open("/dev/zero", "rb") as zeros:  # noqa: PTH123
        done = subprocess.run(command, stdin=zeros, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, f"timernn: {file} has no such token\n")


def test_a_token_may_come_through_a_pipe(bare: Timernn, server: Any) -> None:
    """As of a shell: `--token-file <(vault read …)`."""
    command = [sys.executable, "-m", "service", "models", "list", "--server", server.address]
    done = subprocess.run(
        [*command, "--token-file", "/dev/stdin"],
        input=b"a-token\n",
        capture_output=True,
        check=True,
    )
    assert done.stdout.startswith(b"MODEL")
