"""Client certificates on the metrics port: the same entries of tokens stand behind them as on the clients' port."""

from __future__ import annotations

import http.client
import json
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
import trustme

from instruments.processes import ServiceProcess, wait_until
from service.security.roles import Role
from service.security.tokens import create_token

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass
class Port:
    """A metrics port that other machines can reach, of a server with client certificates and tokens.

    Attributes:
        number: Its number.
        server: Signed its certificate.
        clients: Signs those of its clients.
        clients_file: What the server reads of that.
        token: Of role ADMIN; its entry names no certificate.
    """

    number: int
    server: trustme.CA
    clients: trustme.CA
    clients_file: Path
    token: str

    def ask(
        self, path: str, name: str = "", *, token: str = "", authority: trustme.CA | None = None
    ) -> tuple[int, str]:
        """Send a request on a new connection, with a certificate of this name; return status and body."""
        context = ssl.create_default_context()
        self.server.configure_trust(context)
        if name:
            (authority or self.clients).issue_cert(name).configure_cert(context)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self.number, timeout=30, context=context
        )
        try:
            connection.request("GET", path, headers=headers)
            found = connection.getresponse()
            return found.status, found.read().decode()
        finally:
            connection.close()

    def is_refused(self, authority: trustme.CA) -> bool:
        """Return whether TLS refuses the certificates of an authority."""
        try:
            self.ask("/api/now", "viewer.example", authority=authority)
        except OSError:  # an alert, or a reset where the request was sent before it came
            return True
        return False


@pytest.fixture(scope="module", params=["1", "2"], ids=["one process", "two workers"])
def port(
    request: pytest.FixtureRequest, store_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Port]:
    """Run a server."""
    folder = tmp_path_factory.mktemp("certificates")
    server, clients = trustme.CA(), trustme.CA()
    issued = server.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(folder / "tls.key")
    (folder / "tls.key").chmod(0o600)
    chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
    (folder / "tls.crt").write_bytes(chain)
    clients.cert_pem.write_to_path(folder / "clients.pem")
    tokens = folder / "tokens.toml"
    token, _ = create_token(tokens, Role.ADMIN, "acme", name="admin", expires=None)
    for name, role in (("viewer", Role.INFER), ("scraper", Role.OPERATOR)):
        create_token(tokens, role, "acme", name=name, expires=None)
        with tokens.open("a") as file:  # to the last entry
            file.write(f'certificate = "{name}.example"\n')
    options = [
        *("--tls-cert", str(folder / "tls.crt"), "--tls-key", str(folder / "tls.key")),
        *("--tls-client-ca", str(folder / "clients.pem"), "--tokens", str(tokens)),
        *("--metrics-listen", "0.0.0.0:0", "--workers", request.param),
    ]
    with ServiceProcess(store_url, *options) as process:
        url = process.wait_for_line(r".*metrics on (https://\S+)")[1]
        number = urlsplit(url).port
        assert number is not None
        yield Port(number, server, clients, folder / "clients.pem", token)


def test_a_certificate_that_an_entry_names_is_a_login(port: Port) -> None:
    """On the page without a token, with the tenant and the role of the entry."""
    status, text = port.ask("/api/now", "viewer.example")
    now: dict[str, Any] = json.loads(text)
    assert (status, now["login"], now["tenant"], now["figures"]) == (200, "viewer", "acme", None)
    assert port.ask("/metrics", "viewer.example")[0] == 401


def test_a_certificate_scrapes_by_its_role(port: Port) -> None:
    """An operator's reads the metrics."""
    status, text = port.ask("/metrics", "scraper.example")
    assert status == 200
    assert "timernn_logins_total" in text


@pytest.mark.parametrize("name", ["", "stranger.example"])
def test_other_certificates_and_none_open_the_connection_alone(port: Port, name: str) -> None:
    """Then a token decides, and it counts before a certificate."""
    for path in ("/api/now", "/metrics"):
        assert port.ask(path, name)[0] == 401
        assert port.ask(path, name, token=port.token)[0] == 200
    assert port.ask("/api/now", "viewer.example", token="wrong")[0] == 401  # noqa: S106 - none


def test_no_client_can_say_which_certificate_it_has(port: Port) -> None:
    """The header of the supervisor counts only from the supervisor."""
    context = ssl.create_default_context()
    port.server.configure_trust(context)
    connection = http.client.HTTPSConnection("127.0.0.1", port.number, context=context)
    names = {"X-Forwarded-Certificate-Names": '["viewer.example"]'}
    connection.request("GET", "/api/now", headers=names)
    assert connection.getresponse().status == 401
    connection.close()


def test_a_new_authority_takes_the_place_of_the_old_one(port: Port) -> None:
    """Without a restart, for new connections."""
    old, renewed = port.clients, trustme.CA()
    assert not port.is_refused(old)
    assert port.is_refused(renewed)
    renewed.cert_pem.write_to_path(port.clients_file)
    wait_until("the new one counts", lambda: not port.is_refused(renewed))
    port.clients = renewed
    assert port.is_refused(old)
    assert port.ask("/api/now", "viewer.example")[0] == 200
