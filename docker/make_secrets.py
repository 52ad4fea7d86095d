"""Makes the secrets of the compose deployment that are missing: `make_secrets.py FOLDER [--tls]`.

Always the store's password. With --tls also a certificate authority, a certificate for the replicas, one for
the balancer and one for a client, and two tokens: admin of tenant `default`, and operator for Prometheus. What is there
already is left alone, so that a restart changes nothing.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from service.security.roles import Role
from service.security.tokens import create_token

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

REPLICA, BALANCER, PROMETHEUS = 10001, 101, 65534  # the users of the three images
CLIENT = "client"
DAYS = 825
NAMES = ("timernn", "balancer", "localhost")


def main(folder: Path, *, has_tls: bool) -> None:
    """Make what is missing."""
    folder.chmod(0o755)
    # As a secret that an orchestrator mounts: whoever has the volume may read it, the store and replicas.
    write(folder / "store-password", secrets.token_hex(32).encode() + b"\n", 0o444)
    if has_tls:
        if not (folder / "ca.crt").exists():
            make_certificates(folder)
        make_tokens(folder)


def write(path: Path, data: bytes, mode: int, owner: int = 0) -> None:
    """Write a file that is not there yet, so that it is never seen half written."""
    if path.exists():
        return
    new = path.with_name(f".{path.name}.new")
    new.touch(mode=0o600)
    new.write_bytes(data)
    new.chmod(mode)
    os.chown(new, owner, owner)
    new.replace(path)


def make_certificates(folder: Path) -> None:
    """Make an authority and what it signs; its key is not kept."""
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = certificate("timernn compose", authority_key, None, authority_key)
    for name, owner in (("replica", REPLICA), ("balancer", BALANCER), (CLIENT, REPLICA)):
        key = ec.generate_private_key(ec.SECP256R1())
        signed = certificate(name, key, authority, authority_key)
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        write(folder / f"{name}.key", pem, 0o400, owner)
        write(folder / f"{name}.crt", signed.public_bytes(serialization.Encoding.PEM), 0o444)
    write(folder / "ca.crt", authority.public_bytes(serialization.Encoding.PEM), 0o444)


def certificate(
    name: str,
    key: EllipticCurvePrivateKey,
    issuer: x509.Certificate | None,
    issuer_key: EllipticCurvePrivateKey,
) -> x509.Certificate:
    """Sign a certificate: of the authority itself without an issuer, else of the client or a server."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=DAYS))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
    )
    if issuer is not None:
        names: list[x509.GeneralName] = [x509.DNSName(name)]
        purpose = ExtendedKeyUsageOID.CLIENT_AUTH
        if name != CLIENT:
            names = [x509.DNSName(each) for each in NAMES]
            names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
            purpose = ExtendedKeyUsageOID.SERVER_AUTH
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def make_tokens(folder: Path) -> None:
    """Make the file of tokens and the two tokens; the replicas' user owns all but Prometheus' one."""
    home = folder / "replica"
    home.mkdir(mode=0o700, exist_ok=True)
    tokens = home / "tokens.toml"
    if not tokens.exists():
        for role, name, owner in (
            (Role.ADMIN, "admin", REPLICA),
            (Role.OPERATOR, "prometheus", PROMETHEUS),
        ):
            token, _ = create_token(tokens, role, "default", name=name, expires=None)
            write(folder / f"{name}-token", token.encode(), 0o400, owner)
    for path in (home, *home.iterdir()):
        os.chown(path, REPLICA, REPLICA)


if __name__ == "__main__":
    main(Path(sys.argv[1]), has_tls="--tls" in sys.argv[2:])
