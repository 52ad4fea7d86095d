"""The server's certificate and key, checked before they are used."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from service.files import read_file
from service.security.files import SecretFileError

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes


@dataclass(frozen=True, slots=True)
class ServerCertificate:
    """What a server shows to its clients, and whom it believes.

    Attributes:
        chain: The certificate and those that it was signed by, PEM.
        key: The private key, PEM.
        client_ca: Signs the certificates that clients have to show, PEM; None: they need none.
        expires: When the first of the chain ends, UTC.
    """

    chain: bytes
    key: bytes
    client_ca: bytes | None
    expires: datetime

    def __repr__(self) -> str:
        """Leave the key out of logs."""
        return f"ServerCertificate(expires={self.expires:%Y-%m-%dT%H:%M:%SZ})"


def read_certificate(
    cert_file: Path, key_file: Path, client_ca_file: Path | None = None
) -> ServerCertificate:
    """Read a certificate, its key and the authority of the clients' certificates.

    Raises:
        SecretFileError: If a file cannot be read, the key is not the certificate's, or anybody on the
            machine may read the key.
    """
    chain, key = _read("certificate", cert_file), _read("key", key_file)
    if key_file.stat().st_mode & stat.S_IRWXO:
        text = f"{key_file}: expected a key that not everybody may read: run `chmod o= {key_file}`"
        raise SecretFileError(text)
    client_ca = _read("client CA", client_ca_file) if client_ca_file else None
    certificates = _parse(cert_file, chain)
    if client_ca is not None and client_ca_file is not None:
        _parse(client_ca_file, client_ca)
    _check_pair(cert_file, key_file, certificates[0], key=key)
    expires = min(one.not_valid_after_utc for one in certificates)
    return ServerCertificate(chain, key, client_ca, expires)


def check_files(
    cert_file: Path | None, key_file: Path | None, ca_file: Path | None, *, password: str = ""
) -> None:
    """Check the files by which a client of TLS shows who it is, and knows whom to believe.

    Args:
        cert_file: The certificate to show; None: none.
        key_file: Its private key; None: it is in the file of the certificate.
        ca_file: Who signs the other side's certificate; None: not said.
        password: Of the key; empty: it has none.

    Raises:
        SecretFileError: If one cannot be used.
    """
    if ca_file:
        _parse(ca_file, _read("CA", ca_file))
    if cert_file:
        chain, key_file = _parse(cert_file, _read("certificate", cert_file)), key_file or cert_file
        _check_pair(cert_file, key_file, chain[0], key=_read("key", key_file), password=password)


def _parse(path: Path, data: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise SecretFileError(f"{path}: expected certificates in PEM") from error


def _read(kind: str, path: Path) -> bytes:
    try:
        data = read_file(path)
    except OSError as error:
        raise SecretFileError(f"{path}: {error.strerror}") from error
    if not data.strip():
        raise SecretFileError(f"{path}: expected a {kind} in PEM, got an empty file")
    return data


def _check_pair(
    cert_file: Path, key_file: Path, leaf: x509.Certificate, *, key: bytes, password: str = ""
) -> None:
    """Compare what was read, not the files: they may have been replaced in between."""
    try:
        private = load_pem_private_key(key, password=password.encode() or None)
    except (ValueError, UnsupportedAlgorithm) as error:
        expected = "a private key in PEM, of this password" if password else "a private key in PEM"
        raise SecretFileError(f"{key_file}: expected {expected}") from error
    except TypeError as error:  # one has a password, and none was given; or the reverse
        expected = "a key with a password" if password else "a key without a password"
        raise SecretFileError(f"{key_file}: expected {expected}") from error
    if _public(private.public_key()) != _public(leaf.public_key()):
        raise SecretFileError(f"{key_file} is not the key of the certificate in {cert_file}")


def _public(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
