"""TLS on the client's side, against real handshakes: what is believed, what is said when it fails."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import trustme

import timernn
from instruments.processes import wait_until
from timernn._core.tls import Certificates
from timernn.v1 import model_service_pb2 as model_pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FRONTENDS = ("blocking", "asyncio")
TOKEN = "t0k"  # noqa: S105  # a stand-in for one
PAST = (datetime(2020, 1, 1, tzinfo=UTC), datetime(2021, 1, 1, tzinfo=UTC))


class Echo:
    """A server that answers GetServerInfo with the names in its client's certificate, or metadata.

    Attributes:
        address: Where it listens.
    """

    def __init__(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self._server = grpc.server(ThreadPoolExecutor(2))
        self._server.add_generic_rpc_handlers((_Handler(),))
        anywhere = "127.0.0.1:0"
        if credentials is None:
            port = self._server.add_insecure_port(anywhere)
        else:
            port = self._server.add_secure_port(anywhere, credentials)
        self.address = f"127.0.0.1:{port}"
        self._server.start()

    def stop(self) -> None:
        """Stop at once."""
        self._server.stop(None).wait()


class _Handler(grpc.GenericRpcHandler):
    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        sent: dict[str, Any] = dict(details.invocation_metadata)

        def answer(_: bytes, context: grpc.ServicerContext) -> bytes:
            proved: Any = context.auth_context()
            (name,) = proved.get("x509_subject_alternative_name", [b""])
            return model_pb.GetServerInfoResponse(
                replica_id=name.decode(),
                server_version=f"{sent.get('authorization')} {sent.get('x-team')}",
            ).SerializeToString()

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """The authority that signs everybody's certificate."""
    return trustme.CA()


def issued(authority: trustme.CA, name: str = "127.0.0.1", **dates: Any) -> tuple[bytes, bytes]:
    """Return a key and its certificate, PEM."""
    made = authority.issue_cert(name, **dates)
    return made.private_key_pem.bytes(), b"".join(blob.bytes() for blob in made.cert_chain_pems)


def write(folder: Path, authority: trustme.CA, name: str = "client.example") -> timernn.TLS:
    """Write a certificate, its key and the authority's into a folder; return a TLS of the files."""
    key, cert = issued(authority, name)
    pem = authority.cert_pem.bytes()
    for file, content in (("client.key", key), ("client.crt", cert), ("ca.pem", pem)):
        (folder / file).write_bytes(content)
    return timernn.TLS(folder / "ca.pem", folder / "client.crt", str(folder / "client.key"))


@pytest.fixture
def serve(authority: trustme.CA) -> Iterator[Callable[..., str]]:
    """Make a server of a kind; returns its address."""
    servers: list[Echo] = []

    def make(kind: str) -> str:
        credentials = None
        if kind != "plaintext":
            dates: dict[str, Any] = {}
            if kind == "expired":
                dates = dict(zip(("not_before", "not_after"), PAST, strict=True))
            pair = issued(
                authority, "other.example" if kind == "other name" else "127.0.0.1", **dates
            )
            is_mutual = kind == "mutual"
            credentials = grpc.ssl_server_credentials(
                [pair],
                authority.cert_pem.bytes() if is_mutual else None,
                require_client_auth=is_mutual,
            )
        servers.append(Echo(credentials))
        return servers[-1].address

    yield make
    for server in servers:
        server.stop()


def ask(frontend: str, address: str, **options: Any) -> timernn.ServerInfo:
    """Ask a server who it is, with a client of its own."""
    if frontend == "blocking":
        with timernn.connect(address, **options) as client:
            return client.server_info()

    async def run() -> timernn.ServerInfo:
        async with timernn.aio.connect(address, **options) as client:
            return await client.server_info()

    return asyncio.run(run())


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("kind", ["one name", "other name"])
def test_a_server_is_believed_by_its_certificate(
    serve: Callable[..., str], authority: trustme.CA, frontend: str, kind: str
) -> None:
    """An authority as PEM; and a name, where the address's is not the certificate's."""
    name = "other.example" if kind == "other name" else None
    tls = timernn.TLS(ca=authority.cert_pem.bytes(), server_name=name)
    assert ask(frontend, serve(kind), tls=tls).server_version == "None None"


@pytest.fixture
def balancer(authority: trustme.CA) -> Iterator[str]:
    """What demands a certificate and is not gRPC's own server, as a balancer; yields its address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2"])
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with suppress(OSError), context.wrap_socket(connection, server_side=True):
                    pass

    thread = threading.Thread(target=accept)
    thread.start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_balancer_that_demands_a_certificate_is_said_in_words(
    balancer: str, authority: trustme.CA, frontend: str
) -> None:
    """Its alert comes after the client's side of the handshake, and gRPC names it in its own way."""
    with pytest.raises(timernn.TlsFailed, match="it may demand a certificate of the client"):
        ask(
            frontend,
            balancer,
            tls=timernn.TLS(ca=authority.cert_pem.bytes()),
            connect_timeout=2.0,
        )


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize(
    ("kind", "trusts", "words"),
    [
        ("plaintext", "right", "it speaks no TLS; connect without tls"),
        ("one name", "nothing", "it may expect TLS; tls=True or a timernn.TLS"),
        ("one name", "another", "not signed by an authority that this client trusts"),
        ("one name", "the public ones", "not signed by an authority that this client trusts"),
        ("other name", "right", "its certificate is for another name"),
        ("expired", "right", "its certificate has expired"),
        ("mutual", "right", "it may demand a certificate of the client"),
        ("mutual", "nothing", "it may expect TLS"),
        ("mutual", "with another's certificate", "or refuse this one"),
        ("one name", "with a key of another", "do not belong together"),
    ],
)
def test_a_handshake_that_fails_is_said_in_words(
    serve: Callable[..., str],
    authority: trustme.CA,
    frontend: str,
    kind: str,
    trusts: str,
    words: str,
) -> None:
    """A typed error soon, that names the address and what to change."""
    pem, other = authority.cert_pem.bytes(), trustme.CA()
    key, cert = issued(other, "client.example")
    tls = {
        "right": timernn.TLS(ca=pem),
        "nothing": False,
        "another": timernn.TLS(ca=other.cert_pem.bytes()),
        "the public ones": True,
        "with another's certificate": timernn.TLS(ca=pem, cert=cert, key=key),
        "with a key of another": timernn.TLS(ca=pem, cert=cert, key=issued(other)[0]),
    }[trusts]
    address = serve(kind)
    with pytest.raises(timernn.TlsFailed) as caught:
        ask(frontend, address, tls=tls, connect_timeout=2.0)
    assert words in caught.value.message
    assert caught.value.message.startswith(f"{address}: ")
    assert isinstance(caught.value.cause, grpc.RpcError)


def test_the_next_address_is_used_where_tls_fails(
    serve: Callable[..., str], authority: trustme.CA
) -> None:
    """One replica with a wrong certificate stops nobody."""
    addresses = [serve("expired"), serve("one name")]
    tls = timernn.TLS(ca=authority.cert_pem.bytes())
    with timernn.connect(addresses, tls=tls) as client:
        assert client.server_info().server_version == "None None"


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_metadata_and_token_go_along(
    serve: Callable[..., str], authority: trustme.CA, frontend: str
) -> None:
    """With every call, beside what the library sends."""
    tls = timernn.TLS(ca=authority.cert_pem.bytes())
    info = ask(frontend, serve("one name"), tls=tls, token=TOKEN, metadata={"x-team": "nlp"})
    assert info.server_version == f"Bearer {TOKEN} nlp"


def test_a_new_certificate_of_the_client_is_shown(
    serve: Callable[..., str], authority: trustme.CA, tmp_path: Path
) -> None:
    """Within seconds and by a new connection; also where files change by a swap of links."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, authority, f"{name}.example")
    mounted = tmp_path / "mounted"
    mounted.symlink_to("one")
    tls = timernn.TLS(mounted / "ca.pem", mounted / "client.crt", mounted / "client.key")
    with timernn.connect(serve("mutual"), tls=tls) as client:
        assert client.server_info().replica_id == "one.example"
        (tmp_path / "new").symlink_to("two")
        (tmp_path / "new").replace(mounted)
        wait_until("two's", lambda: client.server_info().replica_id == "two.example")


async def test_a_new_certificate_of_the_asyncio_client_is_shown(
    serve: Callable[..., str], authority: trustme.CA, tmp_path: Path
) -> None:
    """The same with asyncio."""
    tls = write(tmp_path, authority, "one.example")
    async with timernn.aio.connect(serve("mutual"), tls=tls) as client:
        assert (await client.server_info()).replica_id == "one.example"
        write(tmp_path, authority, "two.example")
        async with asyncio.timeout(30):
            while (await client.server_info()).replica_id != "two.example":  # noqa: ASYNC110  # a call sees it
                await asyncio.sleep(0.05)


def test_files_that_do_not_belong_together_leave_the_last_pair_in_use(
    authority: trustme.CA, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in the middle of a change; it is in the log once, and the right pair counts again."""
    now = 0.0
    certificates = Certificates(write(tmp_path, authority), lambda: now)
    first = certificates.credentials
    (tmp_path / "client.crt").write_bytes(issued(authority, "next.example")[1])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            now += 2.0
            assert not certificates.renew()
    assert certificates.credentials is first
    (record,) = caplog.records
    assert "tls.key: expected the key of " in record.getMessage()
    write(tmp_path, authority)
    now += 2.0
    assert certificates.renew()
    assert certificates.credentials is not first


def test_a_change_of_mode_alone_is_a_change(authority: trustme.CA, tmp_path: Path) -> None:
    """A key that could not be read is read once its mode is put right."""
    now = 0.0
    certificates = Certificates(write(tmp_path, authority), lambda: now)
    (tmp_path / "client.key").chmod(0o400)
    now += 2.0
    assert certificates.renew()


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (
            {"ca": "/nowhere"},
            "tls.ca: expected a file that can be read, got '/nowhere': No such file",
        ),
        ({"ca": b"nonsense"}, "tls.ca: expected a path, or PEM as bytes, got bytes"),
        ({"ca": b"-----BEGIN CERTIFICATE-----\nx"}, "tls.ca: expected certificates in PEM"),
        ({"ca": 7}, "tls.ca: expected a path, or PEM as bytes, got int"),
        ({"ca": __file__}, "tls.ca: expected certificates in PEM"),
        (
            {"ca": os.devnull},
            "tls.ca: expected a file that can be read, got '/dev/null': expected a file, got a",
        ),
        ({"cert": "x"}, "tls.key: expected cert and key together"),
        ({"key": b"-----BEGIN x"}, "tls.cert: expected cert and key together"),
        ({"server_name": "a b"}, "tls.server_name: expected a host's name"),
        ({"server_name": ""}, "tls.server_name: expected a host's name"),
    ],
)
@pytest.mark.parametrize("connect", [timernn.connect, timernn.aio.connect])
def test_what_is_no_certificate_is_refused_by_name(
    connect: Callable[..., Any], parts: dict[str, Any], words: str
) -> None:
    """Before any call, and without showing what it is."""
    with pytest.raises(timernn.BadField) as caught:
        connect("localhost", tls=timernn.TLS(**parts))
    assert caught.value.message.startswith(words)
    assert caught.value.metadata["field"] == words.partition(":")[0]


def test_a_pair_that_cannot_be_used_names_the_part_that_is_wrong(
    authority: trustme.CA, tmp_path: Path
) -> None:
    """Not the key where the certificate is none."""
    tls = write(tmp_path, authority)
    key = (tmp_path / "client.key").read_bytes()
    authority.issue_cert("other.example").private_key_pem.write_to_path(tmp_path / "client.key")
    with pytest.raises(timernn.BadField, match=r"tls.key: expected the key of '.*client.crt', got"):
        timernn.connect("localhost", tls=tls)
    (tmp_path / "client.key").write_bytes(b"-----BEGIN PRIVATE KEY-----\nx\n")
    with pytest.raises(timernn.BadField, match=r"tls.key: expected a private key in PEM, got"):
        timernn.connect("localhost", tls=tls)
    (tmp_path / "client.key").write_bytes(key)
    (tmp_path / "client.crt").write_bytes(b"-----BEGIN CERTIFICATE-----\nx\n")
    with pytest.raises(timernn.BadField, match=r"tls.cert: expected certificates in PEM, got"):
        timernn.connect("localhost", tls=tls)


def test_a_key_with_a_password_is_refused(authority: trustme.CA, tmp_path: Path) -> None:
    """It is not asked for on a terminal."""
    from cryptography.hazmat.primitives import serialization  # here alone

    tls = write(tmp_path, authority)
    file = tmp_path / "client.key"
    key = serialization.load_pem_private_key(file.read_bytes(), None)
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(timernn.BadField, match="without a password"):
        timernn.connect("localhost", tls=tls)


def test_a_tls_shows_paths_and_no_keys() -> None:
    """Its repr may stand in a log."""
    key = b"-----BEGIN PRIVATE KEY-----\nsecret"
    shown = repr(timernn.TLS(ca="/etc/ca.pem", cert=key, key=key, server_name="a"))
    assert shown == "TLS(ca='/etc/ca.pem', cert=<PEM>, key=<PEM>, server_name='a')"
