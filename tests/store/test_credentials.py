"""The password of the store's user from a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from instruments.redis_servers import RedisServer
from service.domain.errors import Unavailable
from service.settings import Settings
from service.store.connect import open_store
from service.store.credentials import PasswordFileError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PASSWORD = "a password with / ? # @ : and %"  # noqa: S105 - of a store that lives for a test


@pytest.fixture
def locked_store() -> Iterator[RedisServer]:
    """A store that wants a password."""
    with RedisServer() as store:
        yield store


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The file of the password."""
    path = tmp_path / "password"
    path.write_text(PASSWORD + "\n")
    return path


async def check(store: RedisServer, path: Path, *, user: str = "") -> None:
    """Open the store with the password of a file, and check it."""
    settings = Settings(redis_password_file=str(path), store_timeout_ms=10_000)
    opened = await open_store(f"redis://{user}127.0.0.1:{store.port}", settings)
    try:
        await opened.check()
    finally:
        await opened.close()


def set_password(store: RedisServer, user: str, password: str) -> None:
    """Give a user of the store a password, and everything else."""
    import redis

    with redis.Redis(port=store.port) as client:
        client.execute_command("ACL", "SETUSER", user, "on", f">{password}", "~*", "+@all")
        client.execute_command("ACL", "SETUSER", "default", "off")


def change(path: Path, text: str) -> None:
    """Replace what a file holds."""
    path.write_text(text)


async def test_the_password_of_the_file_opens_the_store(
    locked_store: RedisServer, file: Path
) -> None:
    """The user is the URL's; characters that a URL would have to encode stand as they are."""
    set_password(locked_store, "timernn", PASSWORD)
    await check(locked_store, file, user="timernn@")


async def test_a_wrong_password_is_not_shown(locked_store: RedisServer, file: Path) -> None:
    """The error names neither the right one nor the wrong one."""
    set_password(locked_store, "timernn", "right")
    with pytest.raises(Unavailable) as caught:
        await check(locked_store, file, user="timernn@")
    shown = f"{caught.value!r} {caught.value.__cause__!r}"
    assert "AuthenticationError" in shown
    assert PASSWORD not in shown


async def test_a_changed_password_counts_for_new_connections(
    locked_store: RedisServer, file: Path
) -> None:
    """The file is read again, without a restart."""
    set_password(locked_store, "timernn", PASSWORD)
    settings = Settings(redis_password_file=str(file), store_timeout_ms=10_000)
    opened = await open_store(f"redis://timernn@127.0.0.1:{locked_store.port}", settings)
    try:
        await opened.check()
        locked_store.kill()
        locked_store.start()
        set_password(locked_store, "timernn", "another")
        change(file, "another")
        with pytest.raises(Unavailable, match="cannot be reached"):  # the old connection has ended
            await opened.check()
        await opened.check()
    finally:
        await opened.close()


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "No such file"), ("", "one line"), ("\n", "one line"), ("a\nb\n", "one line")],
)
async def test_a_file_without_a_password_is_refused(
    tmp_path: Path, content: str | None, expected: str
) -> None:
    """The message names the file, and nothing that it holds."""
    path = tmp_path / "password"
    if content is not None:
        path.write_text(content)
    settings = Settings(redis_password_file=str(path))
    with pytest.raises(PasswordFileError, match=expected) as caught:
        await open_store("redis://h", settings)
    assert str(path) in str(caught.value)


async def test_two_passwords_are_refused(file: Path) -> None:
    """Which of them would count is nobody's guess."""
    settings = Settings(redis_password_file=str(file))
    with pytest.raises(ValueError, match="the URL has a password"):
        await open_store("redis://:secret@h", settings)
