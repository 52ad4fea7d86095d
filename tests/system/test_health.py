"""Whether a server is ready, asked by a probe that imports next to nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from instruments.processes import ServiceProcess, free_port, wait_until
from instruments.redis_servers import RedisServer
from service.probe import ProbeError, check, own_address
from timernn.v1.model_service_pb2 import GetServerInfoRequest
from timernn.v1.model_service_pb2_grpc import ModelServiceStub

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def probe(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the probe as a health check does."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TIMERNN_")}
    command = [sys.executable, "-m", "service.probe", *arguments]
    return subprocess.run(
        command, env=kept | variables, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Signs certificates."""
    return trustme.CA()


@pytest.fixture(scope="module")
def tls_options(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options of a server that wants TLS and client certificates."""
    folder = tmp_path_factory.mktemp("tls")
    issued = authority.issue_cert("timernn.example")
    issued.private_key_pem.write_to_path(folder / "key")
    (folder / "key").chmod(0o600)
    issued.cert_chain_pems[0].write_to_path(folder / "cert")
    authority.cert_pem.write_to_path(folder / "ca")
    return ("--tls-cert", str(folder / "cert"), "--tls-key", str(folder / "key"))


@pytest.fixture(scope="module")
def guarded(
    store_url: str, tls_options: tuple[str, ...], authority: trustme.CA
) -> Iterator[tuple[ServiceProcess, str]]:
    """A server that wants client certificates, and its health port."""
    authority_file = tls_options[1].removesuffix("cert") + "ca"
    health = f"127.0.0.1:{free_port()}"
    options = (*tls_options, "--tls-client-ca", authority_file, "--health-listen", health)
    with ServiceProcess(store_url, *options) as server:
        yield server, health


def test_the_probe_imports_neither_grpc_nor_numpy() -> None:
    """What a check every few seconds may cost is the start of Python."""
    code = "import sys, service.probe; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"grpc", "numpy", "typer", "asyncio", "ssl"} & set(done.stdout.split())


@pytest.mark.parametrize("has_variable", [True, False])
def test_a_ready_server_is_0(guarded: tuple[ServiceProcess, str], *, has_variable: bool) -> None:
    """The address comes from the server's own variable, or is named."""
    _, health = guarded
    done = (
        probe(TIMERNN_HEALTH_LISTEN=health, TIMERNN_TLS_CERT="any")
        if has_variable
        else probe(health)
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_probe_speaks_tls(store_url: str, tls_options: tuple[str, ...]) -> None:
    """Without a health port it asks the clients' port, whatever name is in the certificate."""
    with ServiceProcess(store_url, *tls_options) as server:
        variables = {"TIMERNN_LISTEN": server.address, "TIMERNN_TLS_CERT": tls_options[1]}
        assert probe(**variables).returncode == 0
        plain = probe(server.address)
        assert (plain.returncode, plain.stdout) == (1, "")
        assert "wants TLS" in plain.stderr or "reset" in plain.stderr


def test_mtls_keeps_the_probe_out_of_the_clients_port(
    guarded: tuple[ServiceProcess, str],
) -> None:
    """This is what the health port is for."""
    server, _ = guarded
    with pytest.raises((ProbeError, OSError)):
        check(server.address, is_tls=True)


def test_the_health_port_serves_health_alone(guarded: tuple[ServiceProcess, str]) -> None:
    """Nothing else is answered in plaintext."""
    _, health = guarded
    with grpc.insecure_channel(health) as channel, pytest.raises(grpc.RpcError) as caught:
        ModelServiceStub(channel).GetServerInfo(GetServerInfoRequest(), timeout=30)
    refused: Any = caught.value
    assert refused.code() == grpc.StatusCode.UNIMPLEMENTED


def test_ping_asks_the_health_port(guarded: tuple[ServiceProcess, str]) -> None:
    """`timernn ping` with the server's variable needs no certificate."""
    _, health = guarded
    done = subprocess.run(
        [sys.executable, "-m", "service", "ping"],
        env=os.environ | {"TIMERNN_HEALTH_LISTEN": health},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"{health} is ready\n")


def test_a_wildcard_host_is_this_machine(guarded: tuple[ServiceProcess, str]) -> None:
    """The address to listen on is enough to ask."""
    _, health = guarded
    check("0.0.0.0:" + health.rpartition(":")[2])


def test_an_unknown_service_is_1(guarded: tuple[ServiceProcess, str]) -> None:
    """A misspelt name is no health."""
    _, health = guarded
    with pytest.raises(ProbeError, match="no such service"):
        check(health, "livenes")


def test_nobody_there_is_1() -> None:
    """One line says where."""
    address = f"127.0.0.1:{free_port()}"
    done = probe(address)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert address in done.stderr


def test_another_protocol_is_1() -> None:
    """A web server on the port is not taken for ours."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises((ProbeError, ConnectionError)):
            check(f"127.0.0.1:{listening.getsockname()[1]}")
        thread.join()


def test_readiness_follows_the_store_and_liveness_does_not() -> None:
    """Without its store a server is not ready, and alive; Watch says so, and both come back."""
    health = f"127.0.0.1:{free_port()}"
    with (
        RedisServer() as store,
        ServiceProcess(store.url, "--health-listen", health),
        grpc.insecure_channel(health) as channel,
    ):
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        store.kill()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(ProbeError, match="not serving"):
            check(health)
        check(health, "liveness")
        store.start()
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        check(health)


def test_workers_share_the_health_port(store_url: str) -> None:
    """Whichever worker is asked answers."""
    health = f"127.0.0.1:{free_port()}"
    with ServiceProcess(store_url, "--workers", "2", "--health-listen", health):
        for _ in range(10):
            check(health)


def test_a_draining_server_is_alive_and_not_ready(store_url: str) -> None:
    """The health port answers until the end of the drain; a second signal cuts that short, with 1."""
    health = f"127.0.0.1:{free_port()}"
    with ServiceProcess(store_url, "--health-listen", health, "--drain-notice-s", "60") as server:
        server.signal(signal.SIGTERM)
        server.wait_for_line(".*draining")

        def is_not_ready() -> bool:
            try:
                check(health)
            except ProbeError:
                return True
            return False

        wait_until("it is not ready", is_not_ready)
        check(health, "liveness")
        assert server.terminate() == 1


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ("127.0.0.1:50051", False)),
        ({"TIMERNN_LISTEN": "0.0.0.0:7", "TIMERNN_TLS_CERT": "c"}, ("0.0.0.0:7", True)),
        (
            {"TIMERNN_LISTEN": "h:7", "TIMERNN_TLS_CERT": "c", "TIMERNN_HEALTH_LISTEN": "h:8"},
            ("h:8", False),
        ),
    ],
)
def test_the_server_s_variables_say_where(
    variables: dict[str, str], expected: tuple[str, bool]
) -> None:
    """The health port first, then the clients' port."""
    assert own_address(variables) == expected


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, ("h:7", True)), ({"TIMERNN_LISTEN": "h:8"}, ("h:8", True))],
)
def test_the_server_s_file_says_where(
    tmp_path: Path, variables: dict[str, str], expected: tuple[str, bool]
) -> None:
    """What no variable says is read from the file of TIMERNN_CONFIG."""
    file = tmp_path / "timernn.toml"
    file.write_text('listen = "h:7"\ntls-cert = "c"\n')
    assert own_address({"TIMERNN_CONFIG": str(file), **variables}) == expected
