"""A server with TLS, tokens and metrics, as a process: what it shows, whom it lets in, what it counts."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import urllib.request
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import trustme
from cryptography import x509

import timernn
from instruments.processes import ServiceProcess, wait_until
from service.security.roles import Role
from service.security.tokens import create_token, revoke_tokens
from timernn.v1.model_service_pb2 import GetServerInfoRequest
from timernn.v1.model_service_pb2_grpc import ModelServiceStub

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class Secured:
    """A server with a certificate and tokens.

    Attributes:
        process: The server.
        folder: Holds its files.
        authority: Signs its certificates.
        token: One of role ADMIN.
    """

    process: ServiceProcess
    folder: Path
    authority: trustme.CA
    token: str

    def issue(self) -> int:
        """Write a new certificate into the server's files; return its serial number."""
        return issue(self.folder, self.authority)

    def channel(self) -> grpc.Channel:
        """Return a new channel that trusts the authority."""
        credentials = grpc.ssl_channel_credentials(self.authority.cert_pem.bytes())
        options = (("grpc.use_local_subchannel_pool", 1),)
        return grpc.secure_channel(self.process.address, credentials, options)

    def call(self, channel: grpc.Channel, token: str | None = None) -> str:
        """Ask for the server's version; return that or the status."""
        metadata = [("authorization", f"Bearer {token or self.token}")]
        stub: Any = ModelServiceStub(channel)
        try:
            answer = stub.GetServerInfo(GetServerInfoRequest(), metadata=metadata, timeout=30)
        except grpc.RpcError as error:
            failed: Any = error
            return str(failed.code().name)
        return str(answer.server_version)

    def served_serial(self) -> int:
        """Return the serial number of the certificate that a new connection is shown."""
        host, port = "127.0.0.1", self.process.port
        pem = ssl.get_server_certificate((host, port), timeout=30)
        return x509.load_pem_x509_certificate(pem.encode()).serial_number


def issue(folder: Path, authority: trustme.CA) -> int:
    """Write a certificate and its key; return its serial number."""
    issued = authority.issue_cert("127.0.0.1")
    chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
    for name, data in (("tls.key", issued.private_key_pem.bytes()), ("tls.crt", chain)):
        new = folder / f"{name}.new"
        new.write_bytes(data)
        new.chmod(0o600)
        new.replace(folder / name)
    return x509.load_pem_x509_certificate(chain).serial_number


@pytest.fixture(scope="module")
def secured(store_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """Run a server with TLS, tokens and metrics."""
    folder = tmp_path_factory.mktemp("secured")
    authority = trustme.CA()
    issue(folder, authority)
    tokens = folder / "tokens.toml"
    token, _ = create_token(tokens, Role.ADMIN, "acme", name="admin", expires=None)
    options = [
        *("--tls-cert", str(folder / "tls.crt"), "--tls-key", str(folder / "tls.key")),
        *("--tokens", str(tokens), "--metrics-listen", "127.0.0.1:0"),
    ]
    with ServiceProcess(store_url, *options) as process:
        yield Secured(process, folder, authority, token)


def metrics_of(process: ServiceProcess) -> str:
    """Return what the metrics port shows."""
    url = process.wait_for_line(r".*metrics on (http://\S+)")[1]
    with urllib.request.urlopen(url, timeout=30) as response:  # noqa: S310 - of our own server
        return str(response.read().decode())


def test_a_token_opens_the_server_over_tls(secured: Secured) -> None:
    """With it there is an answer, without it none."""
    with secured.channel() as channel:
        assert secured.call(channel)[:2] == "0."
        assert secured.call(channel, "timernn_0123456789ab_" + "x" * 43) == "UNAUTHENTICATED"


def test_a_new_certificate_is_shown_to_new_connections(secured: Secured) -> None:
    """What counts is the certificate that is served; an open connection goes on."""
    with secured.channel() as channel:
        secured.call(channel)
        before, after = secured.served_serial(), secured.issue()
        assert before != after
        wait_until("the new certificate", lambda: secured.served_serial() == after)
        assert secured.call(channel)[:2] == "0."


def test_a_broken_certificate_leaves_the_last_one_in_use(secured: Secured) -> None:
    """It is in the log once and in the metrics until it is mended."""
    serial = secured.issue()
    wait_until("the certificate", lambda: secured.served_serial() == serial)
    (secured.folder / "tls.crt").write_text("nonsense")
    secured.process.wait_for_line(r".*certificate: what was read before stays in use: .*")
    assert secured.served_serial() == serial
    failed = 'timernn_file_errors{file="certificate"} 1.0'
    wait_until("the metric", lambda: failed in metrics_of(secured.process))
    serial = secured.issue()
    wait_until("the mended certificate", lambda: secured.served_serial() == serial)
    mended = 'timernn_file_errors{file="certificate"} 0.0'
    wait_until("the metric", lambda: mended in metrics_of(secured.process))


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("version", ["TLSv1_1", "TLSv1_2", "TLSv1_3"])
def test_tls_before_1_2_is_not_spoken(secured: Secured, version: str) -> None:
    """A client that offers 1.1 alone gets no session, one that offers 1.2 or 1.3 does."""
    context = ssl.create_default_context(cadata=secured.authority.cert_pem.bytes().decode())
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # else this side would not offer 1.1
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    context.set_alpn_protocols(["h2"])
    with socket.create_connection(("127.0.0.1", secured.process.port), timeout=30) as connection:
        if version == "TLSv1_1":
            with pytest.raises(ssl.SSLError):
                context.wrap_socket(connection, server_hostname="127.0.0.1")
            return
        with context.wrap_socket(connection, server_hostname="127.0.0.1") as secret:
            assert secret.version() == version.replace("_", ".")


def test_a_revoked_token_is_refused_within_seconds(secured: Secured) -> None:
    """Without a restart, on a connection that stays open; one that was just made is accepted."""
    tokens = secured.folder / "tokens.toml"
    token, _ = create_token(tokens, Role.INFER, "acme", name="short", expires=None)
    with secured.channel() as channel:
        took_s = wait_until("the token", lambda: secured.call(channel, token)[:2] == "0.")
        assert took_s < 30
        revoke_tokens(tokens, name="short")
        wait_until("its end", lambda: secured.call(channel, token) == "UNAUTHENTICATED")


def test_a_wrong_roll_out_of_tokens_is_taken_back_with_the_file(secured: Secured) -> None:
    """Tokens of somebody else lock everybody out; with the file of before all are in again, on the same connection."""
    tokens = secured.folder / "tokens.toml"
    right = tokens.read_bytes()
    other = secured.folder / "other.toml"
    create_token(other, Role.ADMIN, "acme", name="other", expires=None)
    with secured.channel() as channel:
        assert secured.call(channel)[:2] == "0."
        other.replace(tokens)
        wait_until("the lock-out", lambda: secured.call(channel) == "UNAUTHENTICATED")
        back = secured.folder / "back.toml"
        back.touch(mode=0o600)
        back.write_bytes(right)
        back.replace(tokens)
        wait_until("the way back", lambda: secured.call(channel)[:2] == "0.")


def test_no_secret_stands_in_the_log_or_the_metrics(secured: Secured) -> None:
    """Neither a token that is right nor one that is not; nor on the command line."""
    wrong = "timernn_0123456789ab_" + "wrong" * 9
    with secured.channel() as channel:
        secured.call(channel)
        secured.call(channel, wrong)
    shown = secured.process.log + metrics_of(secured.process)
    shown += " ".join(secured.process.command)
    assert secured.token[20:] not in shown
    assert wrong[20:] not in shown
    assert "login outcome=refused peer=" in shown


def test_logins_and_certificate_days_are_counted(secured: Secured) -> None:
    """By how they ended."""
    with secured.channel() as channel:
        secured.call(channel)
    text = metrics_of(secured.process)
    assert 'timernn_logins_total{result="accepted"}' in text
    assert "timernn_certificate_days " in text
    assert 'grpc_method="GetServerInfo"' in text


@pytest.mark.parametrize("is_right", [True, False])
def test_a_client_certificate_is_demanded(
    store_url: str, tmp_path: Path, *, is_right: bool
) -> None:
    """With --tls-client-ca, who has none of that authority cannot connect."""
    authority, clients = trustme.CA(), trustme.CA()
    issue(tmp_path, authority)
    clients.cert_pem.write_to_path(tmp_path / "clients.pem")
    options = [
        *("--tls-cert", str(tmp_path / "tls.crt"), "--tls-key", str(tmp_path / "tls.key")),
        *("--tls-client-ca", str(tmp_path / "clients.pem")),
    ]
    own = (clients if is_right else trustme.CA()).issue_cert("client.example")
    credentials = grpc.ssl_channel_credentials(
        authority.cert_pem.bytes(),
        own.private_key_pem.bytes(),
        b"".join(blob.bytes() for blob in own.cert_chain_pems),
    )
    with ExitStack() as stack:
        process = stack.enter_context(ServiceProcess(store_url, *options))
        channel = stack.enter_context(grpc.secure_channel(process.address, credentials))
        stub: Any = ModelServiceStub(channel)
        try:
            stub.GetServerInfo(GetServerInfoRequest(), timeout=30)
            code = "OK"
        except grpc.RpcError as error:
            failed: Any = error
            code = failed.code().name
    assert code == ("OK" if is_right else "UNAVAILABLE")


@dataclass
class Mutual:
    """A server that demands certificates and knows tokens.

    Attributes:
        address: Where it serves.
        server: Signed its certificate.
        clients: Signs those of its clients.
        tokens: Its file of tokens.
        token: One of role ADMIN, whose entry names no certificate.
    """

    address: str
    server: trustme.CA
    clients: trustme.CA
    tokens: Path
    token: str

    def connect(self, name: str, token: str | None = None) -> timernn.Client:
        """Connect with a certificate of a name."""
        own = self.clients.issue_cert(name)
        tls = timernn.TLS(
            ca=self.server.cert_pem.bytes(),
            cert=b"".join(blob.bytes() for blob in own.cert_chain_pems),
            key=own.private_key_pem.bytes(),
        )
        return timernn.connect(self.address, tls=tls, token=token)


@pytest.fixture(scope="module")
def mutual(store_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mutual]:
    """Run a server with client certificates and tokens."""
    folder = tmp_path_factory.mktemp("mutual")
    server, clients = trustme.CA(), trustme.CA()
    issue(folder, server)
    clients.cert_pem.write_to_path(folder / "clients.pem")
    tokens = folder / "tokens.toml"
    token, _ = create_token(tokens, Role.ADMIN, "acme", name="admin", expires=None)
    create_token(tokens, Role.INFER, "acme", name="viewer", expires=None)
    with tokens.open("a") as file:  # to the last entry
        file.write('certificate = "viewer.example"\n')
    options = [
        *("--tls-cert", str(folder / "tls.crt"), "--tls-key", str(folder / "tls.key")),
        *("--tls-client-ca", str(folder / "clients.pem"), "--tokens", str(tokens)),
    ]
    with ServiceProcess(store_url, *options) as process:
        yield Mutual(process.address, server, clients, tokens, token)


def test_a_certificate_stands_for_a_token_only_where_an_entry_says_so(mutual: Mutual) -> None:
    """Signed by the right authority alone, it opens the connection and nothing else."""
    with mutual.connect("stranger.example") as client:
        with pytest.raises(timernn.errors.NoCredentials):
            client.server_info()
        assert client.ping().serving


def test_a_certificate_has_the_rights_of_its_entry(mutual: Mutual) -> None:
    """The entry's role is what it may do."""
    with mutual.connect("viewer.example") as client:
        client.server_info()
        with pytest.raises(timernn.errors.Role):
            client.create_model("m", input_size=2, hidden_size=3)


def test_a_token_counts_before_the_certificate(mutual: Mutual) -> None:
    """Who presents both acts as the token; a wrong one is refused whatever the certificate."""
    with mutual.connect("viewer.example", mutual.token) as client:
        client.delete_model("none", missing_ok=True)
    wrong = mutual.connect("viewer.example", "timernn_0123456789ab_wrong")
    with wrong as client, pytest.raises(timernn.errors.BadCredentials):
        client.server_info()


def test_a_certificate_ends_with_its_entry(mutual: Mutual) -> None:
    """Revoked by the entry's name, as a token is."""
    create_token(mutual.tokens, Role.INFER, "acme", name="guest", expires=None)
    with mutual.tokens.open("a") as file:
        file.write('certificate = "guest.example"\n')
    with mutual.connect("guest.example") as client:
        wait_until("it is let in", lambda: is_let_in(client))
        revoke_tokens(mutual.tokens, name="guest")
        wait_until("it is refused", lambda: not is_let_in(client))


def is_let_in(client: timernn.Client) -> bool:
    """Return whether the server knows the caller."""
    try:
        client.server_info()
    except timernn.errors.Unauthenticated:
        return False
    return True


def test_the_workers_of_a_server_have_one_metrics_port(store_url: str) -> None:
    """Each call is counted once, whichever of them took it."""
    options = ["--workers", "2", "--metrics-listen", "127.0.0.1:0"]
    with ServiceProcess(store_url, *options) as process:
        for _ in range(8):
            with grpc.insecure_channel(process.address) as channel:
                stub: Any = ModelServiceStub(channel)
                stub.GetServerInfo(GetServerInfoRequest(), timeout=30)
        text = metrics_of(process)
    assert 'timernn_operations_total{operation="get_server_info",outcome="OK"} 8.0' in text
    assert "timernn_workers 2.0" in text


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        (("--listen", "0.0.0.0:0"), "--tls-cert and --tls-key and --tokens or --tls-client-ca"),
        (("--listen", "[::]:0"), "--tls-cert and --tls-key and --tokens or --tls-client-ca"),
        (
            ("--listen", "127.0.0.1:0", "--metrics-listen", "0.0.0.0:0"),
            "--tls-cert and --tls-key and --tokens",
        ),
        (("--listen", "127.0.0.1:0", "--tls-cert", "x"), "--tls-key is missing"),
        (("--listen", "127.0.0.1:0", "--tls-client-ca", "x"), "needs --tls-cert and --tls-key"),
        (("--listen", "127.0.0.1:0", "--tokens", "/nowhere"), "/nowhere: No such file"),
    ],
)
def test_a_server_that_strangers_could_use_does_not_start(
    tmp_path: Path, options: tuple[str, ...], missing: str
) -> None:
    """One line says what is missing; so it is with files that cannot be read."""
    program = Path(sys.executable).with_name("timernn")
    done = subprocess.run(
        [program, "serve", "--data-dir", str(tmp_path / "data"), *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert missing in done.stderr
    assert done.stderr.count("\n") == 1
