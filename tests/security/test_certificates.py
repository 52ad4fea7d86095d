"""The server's certificate: a pair that belongs together, or an error that names the file."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from service.security.certificates import read_certificate
from service.security.files import SecretFileError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass
class Pair:
    """A certificate and its key in files."""

    cert: Path
    key: Path


def write_pair(folder: Path, ends: datetime | None = None) -> Pair:
    """Write a new certificate of a new authority, and its key."""
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", not_after=ends)
    folder.mkdir(exist_ok=True)
    pair = Pair(folder / "tls.crt", folder / "tls.key")
    pair.cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    pair.key.write_bytes(issued.private_key_pem.bytes())
    pair.key.chmod(0o600)
    return pair


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """Return a pair that belongs together."""
    return write_pair(tmp_path)


def test_a_pair_is_read_with_its_end(tmp_path: Path) -> None:
    """The end is that of the certificate, in UTC."""
    ends = datetime(2031, 2, 3, tzinfo=UTC)
    pair = write_pair(tmp_path, ends)
    found = read_certificate(pair.cert, pair.key)
    assert found.expires == ends
    assert (found.chain, found.key) == (pair.cert.read_bytes(), pair.key.read_bytes())
    assert found.client_ca is None


def test_the_key_stays_out_of_logs(pair: Pair) -> None:
    """What is printed of a certificate holds its end alone."""
    assert "PRIVATE" not in repr(read_certificate(pair.cert, pair.key))


def test_the_key_of_another_certificate_is_refused(tmp_path: Path, pair: Pair) -> None:
    """Found out here, because gRPC would only refuse each connection."""
    other = write_pair(tmp_path / "other")
    with pytest.raises(SecretFileError, match=r"other/tls\.key is not the key of the certificate"):
        read_certificate(pair.cert, other.key)


def test_a_key_that_everybody_may_read_is_refused(pair: Pair) -> None:
    """A group may, as in a secret that an orchestrator mounts."""
    pair.key.chmod(0o640)
    read_certificate(pair.cert, pair.key)
    pair.key.chmod(0o644)
    with pytest.raises(SecretFileError, match="expected a key that not everybody may read"):
        read_certificate(pair.cert, pair.key)


def test_a_key_with_a_password_is_refused(pair: Pair) -> None:
    """Nobody is there to type it."""
    key = load_pem_private_key(pair.key.read_bytes(), password=None)
    locked = key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )
    pair.key.write_bytes(locked)
    with pytest.raises(SecretFileError, match="expected a key without a password"):
        read_certificate(pair.cert, pair.key)


@pytest.mark.parametrize(
    ("part", "content", "error"),
    [
        ("cert", b"", "expected a certificate in PEM, got an empty file"),
        ("cert", b"nonsense", "expected certificates in PEM"),
        ("key", b"nonsense", "expected a private key in PEM"),
        ("cert", None, "No such file or directory"),
    ],
)
def test_what_is_no_pem_is_named(pair: Pair, part: str, content: bytes | None, error: str) -> None:
    """The error begins with the file."""
    path: Path = getattr(pair, part)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(SecretFileError, match=rf"^{path}: {error}"):
        read_certificate(pair.cert, pair.key)


def test_an_authority_of_clients_is_checked(tmp_path: Path, pair: Pair) -> None:
    """With nonsense in its place nobody could connect."""
    authority = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(authority)
    assert read_certificate(pair.cert, pair.key, authority).client_ca == authority.read_bytes()
    authority.write_text("nonsense")
    with pytest.raises(SecretFileError, match=r"ca\.pem: expected certificates in PEM"):
        read_certificate(pair.cert, pair.key, authority)
