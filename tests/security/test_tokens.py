"""Tokens in their file: what is kept of them, who is found by one, how entries come and go."""

from __future__ import annotations

import hashlib
import os
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.security.files import SecretFileError
from service.security.roles import Role
from service.security.tokens import (
    create_token,
    parse_tokens,
    read_tokens,
    revoke_tokens,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return where a file of tokens may be made."""
    return tmp_path / "tokens.toml"


def create(file: Path, name: str = "one", role: Role = Role.TRAIN, tenant: str = "acme") -> str:
    """Add a token without an end."""
    return create_token(file, role, tenant, name=name, expires=None)[0]


def test_a_token_is_found_as_it_was_made(file: Path) -> None:
    """Tenant, role, name and end come back from the file."""
    ends = datetime(2031, 5, 1, tzinfo=UTC)
    presented, made = create_token(file, Role.ADMIN, "acme", name="ci", expires=ends)
    found = read_tokens(file).find(presented)
    assert found == made
    assert (made.tenant, made.role, made.name, made.expires) == ("acme", Role.ADMIN, "ci", ends)


def test_the_file_is_private_and_holds_digests_only(file: Path) -> None:
    """Mode 0600, the SHA-256 of the token, and nowhere its secret part."""
    presented = create(file)
    text = file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    assert hashlib.sha256(presented.encode()).hexdigest() in text
    assert presented[20:] not in text


def test_tokens_have_256_bits_and_differ(file: Path) -> None:
    """43 characters of base64 beside the id; none is like another."""
    made = [create(file, f"t{number}") for number in range(50)]
    secrets = {one.split("_", 2)[2] for one in made}
    assert len(secrets) == 50
    assert {len(secret) for secret in secrets} == {43}


@given(st.text(max_size=80))
def test_what_is_no_token_finds_nothing(text: str) -> None:
    """Whatever is presented is compared and refused, without an error."""
    digest = hashlib.sha256(b"timernn_0123456789ab_" + b"x" * 43).hexdigest()
    tokens = parse_tokens(entry(sha256=digest), "test")
    assert tokens.find(text) is None


def test_the_right_id_with_another_secret_finds_nothing(file: Path) -> None:
    """The id is no secret and opens nothing."""
    presented = create(file)
    assert read_tokens(file).find(presented[:-43] + "A" * 43) is None


def test_an_expired_token_says_so(file: Path) -> None:
    """It is valid up to its end, and not from then on."""
    ends = datetime(2030, 1, 1, tzinfo=UTC)
    _, token = create_token(file, Role.INFER, "acme", name="short", expires=ends)
    assert not token.has_expired(ends - timedelta(seconds=1))
    assert token.has_expired(ends)


@pytest.mark.parametrize("by", ["name", "token_id", "presented"])
def test_a_revoked_token_is_gone(file: Path, by: str) -> None:
    """By its name, its id or itself; the others stay, and so do people's comments."""
    kept, gone = create(file, "kept"), create(file, "gone")
    file.write_text("# for the weather team\n" + file.read_text())
    ways = {"name": "gone", "token_id": gone[8:20], "presented": gone}
    assert revoke_tokens(file, **{by: ways[by]}).name == "gone"
    tokens = read_tokens(file)
    assert tokens.find(gone) is None
    assert tokens.find(kept) is not None
    assert "# for the weather team" in file.read_text()


def test_a_file_whose_last_token_was_revoked_takes_another(file: Path) -> None:
    """It can be read in between, and afterwards has the new one alone."""
    create(file, "one")
    revoke_tokens(file, name="one")
    assert len(read_tokens(file)) == 0
    create(file, "two")
    assert [token.name for token in read_tokens(file)] == ["two"]


def test_to_revoke_an_unknown_token_is_an_error(file: Path) -> None:
    """Nobody is to believe that a token is gone which never was there."""
    create(file)
    with pytest.raises(LookupError, match="no such token"):
        revoke_tokens(file, name="other")


def test_a_name_stands_for_one_token(file: Path) -> None:
    """The log has to tell them apart."""
    create(file, "ci")
    with pytest.raises(ValueError, match="there is a token 'ci' already"):
        create(file, "ci")


def test_commands_at_once_lose_no_token(file: Path) -> None:
    """Each change takes the lock: 16 made from 8 threads are all there."""

    def make(number: int) -> None:
        create(file, f"a{number}")
        create(file, f"b{number}")

    threads = [threading.Thread(target=make, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_tokens(file)) == 16


def test_a_file_that_others_may_read_is_refused(file: Path) -> None:
    """The error names the mode and the command that mends it."""
    create(file)
    file.chmod(0o640)
    with pytest.raises(SecretFileError, match="expected mode 0600, got 0640: run `chmod 600"):
        read_tokens(file)


def entry(**changes: str) -> str:
    """Return a file with one entry; a change of None leaves a field out."""
    fields = {
        "id": "0123456789ab",
        "name": "ci",
        "tenant": "acme",
        "role": "train",
        "sha256": "0" * 64,
    } | changes
    lines = [f'{name} = "{value}"' for name, value in fields.items() if value != "-"]
    return "\n".join(["[[token]]", *lines, "created = 2026-01-01T00:00:00Z", ""])


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("token =\n", r"not valid TOML: at line 1, column 8"),
        ("token = " + "[" * 5000, "not valid TOML: nested too deeply"),
        ("[[tokens]]\n", "expected .* tables only, got 'tokens'"),
        ("token = 3\n", r"expected each token as a \[\[token\]\] table"),
        (entry(role="root"), "token 1: role: expected one of infer, train, admin, operator"),
        (entry(id="xyz"), "token 1: id: expected 12 hexadecimal digits"),
        (entry(tenant="a b"), "token 1: tenant: expected a name"),
        (entry(sha256="short"), "token 1: sha256: expected 64 hexadecimal digits"),
        (entry(name="-"), "token 1: 'name' is missing"),
        (entry(rolle="x"), "token 1: 'rolle' is not known"),
        (entry() + entry(name="b", sha256="1" * 64), "token 2: id: token 1 has the same one"),
        (entry() + entry(id="0" * 12, sha256="1" * 64), "token 2: name: token 1 has the same one"),
        (entry() + entry(id="0" * 12, name="b"), "token 2: sha256: token 1 has the same one"),
        (
            entry(certificate="a.example")
            + entry(id="0" * 12, name="b", sha256="1" * 64, certificate="a.example"),
            "token 2: certificate: token 1 has the same one",
        ),
        (entry(certificate=""), "token 1: certificate: expected a subject alternative name"),
        (entry() + 'expires = "tomorrow"\n', "token 1: expires: expected a time such as"),
        (entry() + "expires = 2030-01-01T00:00:00\n", "token 1: expires: expected a time such as"),
    ],
)
def test_an_entry_that_is_not_valid_refuses_the_file(text: str, error: str) -> None:
    """The error names the entry and the field, and repeats no value."""
    with pytest.raises(SecretFileError, match=error):
        parse_tokens(text, "tokens.toml")


def test_entries_that_share_only_what_they_may_are_read() -> None:
    """Tenant, role and the lack of a certificate stand for nobody alone."""
    second = entry(id="0" * 12, name="b", sha256="1" * 64)
    assert [token.name for token in parse_tokens(entry() + second, "tokens.toml")] == ["ci", "b"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_mounted_file_may_be_read_by_its_group(file: Path) -> None:
    """So an orchestrator mounts a secret: another user owns it."""
    create(file)
    os.chown(file, 12345, 0)
    file.chmod(0o440)
    assert len(read_tokens(file)) == 1
    file.chmod(0o460)
    with pytest.raises(SecretFileError, match="got 0460"):
        read_tokens(file)
