"""Files that change under a running server: read again, or the last good value stays."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

from service.security import reload
from service.security.files import SecretFileError, read_private, replace_private
from service.security.reload import Reloaded

if TYPE_CHECKING:
    from pathlib import Path


def read_number(path: Path) -> int:
    """Read a file that holds a number."""
    try:
        return int(path.read_text())
    except (OSError, ValueError) as error:
        raise SecretFileError(f"{path}: expected a number") from error


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a file that holds 1."""
    path = tmp_path / "number"
    path.write_text("1")
    return path


def test_a_replaced_file_is_read_again(file: Path) -> None:
    """Once: without another change the next check finds nothing new."""
    number = Reloaded("number", [file], lambda: read_number(file))
    replace_private(file, "2")
    assert number.check()
    assert number.value == 2
    assert not number.check()


def test_a_swap_of_symbolic_links_is_a_change(tmp_path: Path) -> None:
    """Kubernetes mounts secrets as links to a folder, and swaps the link of the folder."""
    for name, text in (("first", "1"), ("second", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "number").write_text(text)
    (tmp_path / "data").symlink_to("first")
    file = tmp_path / "number"
    file.symlink_to("data/number")
    number = Reloaded("number", [file], lambda: read_number(file))
    (tmp_path / "next").symlink_to("second")
    (tmp_path / "next").replace(tmp_path / "data")
    assert number.check()
    assert number.value == 2


def test_a_broken_file_leaves_the_last_value_and_is_logged_once(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Until it is mended the error stands for whoever asks."""
    number = Reloaded("number", [file], lambda: read_number(file))
    replace_private(file, "many")
    assert not number.check()
    assert not number.check()
    assert (number.value, number.error) == (1, f"{file}: expected a number")
    assert [record.message for record in caplog.records] == [
        f"number: what was read before stays in use: {file}: expected a number"
    ]
    replace_private(file, "3")
    assert number.check()
    assert (number.value, number.error) == (3, None)


def test_a_deleted_file_means_what_was_agreed(file: Path) -> None:
    """With a value for it that counts at once; the file may come back."""
    number = Reloaded("number", [file], lambda: read_number(file), when_gone=lambda: 0)
    file.unlink()
    assert number.check()
    assert number.value == 0
    replace_private(file, "4")
    assert number.check()
    assert number.value == 4


def test_a_deleted_file_without_a_meaning_leaves_the_last_value(file: Path) -> None:
    """A certificate whose file is gone is still the one to show."""
    number = Reloaded("number", [file], lambda: read_number(file))
    file.unlink()
    assert not number.check()
    assert number.value == 1
    assert number.error is not None


def test_a_first_read_that_fails_is_an_error(tmp_path: Path) -> None:
    """A server does not start on what it cannot read."""
    missing = tmp_path / "missing"
    with pytest.raises(SecretFileError):
        Reloaded("number", [missing], lambda: read_number(missing))


def test_a_change_of_content_alone_is_a_change(file: Path) -> None:
    """Written in place, at the same size: the time of the change tells."""
    number = Reloaded("number", [file], lambda: read_number(file))
    before = file.stat()
    file.write_text("5")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    assert number.check()
    assert number.value == 5


def test_a_change_of_mode_alone_is_a_change(file: Path) -> None:
    """A file that others may read is refused; `chmod 600`, which the error advises, puts it right."""
    file.chmod(0o600)
    number = Reloaded("number", [file], lambda: int(read_private(file)))
    file.chmod(0o644)
    assert not number.check()
    assert number.error
    file.chmod(0o600)
    assert number.check()
    assert number.error is None


async def test_a_change_that_cannot_be_taken_over_does_not_end_the_watch(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one is handed on as if nothing had been."""
    monkeypatch.setattr(reload, "CHECK_S", 0.0)
    number = Reloaded("number", [file], lambda: read_number(file))
    got: list[int] = []
    seen = asyncio.Event()

    def on_change(value: int) -> None:
        got.append(value)
        seen.set()
        if value == 2:
            raise OSError("the file is being replaced")

    watching = asyncio.ensure_future(number.watch(on_change))
    for value in (2, 3):
        seen.clear()
        replace_private(file, str(value))
        await asyncio.wait_for(seen.wait(), 30)
    watching.cancel()
    assert got == [2, 3]
