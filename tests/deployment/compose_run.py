"""`make compose-test`: the compose files on a real engine, driven from outside, kills included.

COMPOSE names the command, `docker compose` by default. Each test says what an operator relies on; they
run in the order in which they stand here.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

import timernn
from instruments.processes import wait_until
from timernn.v1.model_service_pb2 import GetServerInfoRequest
from timernn.v1.model_service_pb2_grpc import ModelServiceStub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.timeout(1800)

ROOT = Path(__file__).resolve().parents[2]
COMMAND = shlex.split(os.environ.get("COMPOSE", "docker compose"))
ENGINE = shlex.split(os.environ.get("ENGINE", "docker"))
PROJECT = "timernn-test"
PLAIN = ("docker/compose.yaml",)
TLS = (*PLAIN, "docker/compose.tls.yaml")
MUTUAL = (*TLS, "docker/compose.mtls.yaml")
ADDRESS = "127.0.0.1:50051"
STEPS = 300
ALL_GONE = "kill -9 -1"  # every process of the container but its init, which ends then


class Project:
    """A deployment by compose files."""

    def __init__(self, *files: str) -> None:
        words = [word for file in files for word in ("-f", file)]
        self._command = [*COMMAND, *words, "-p", PROJECT, "--profile", "monitoring"]

    def run(self, *words: str, check: bool = True) -> str:
        """Run a command of compose; return what it prints."""
        return run(*self._command, *words, check=check)

    def up(self) -> None:
        """Start everything and wait until it is healthy."""
        self.run("up", "--build", "--detach", "--wait")

    def down(self) -> None:
        """End everything and forget its data."""
        self.run("down", "--volumes", "--timeout", "40")

    def containers(self, service: str) -> list[str]:
        """Return the ids of a service's containers."""
        return self.run("ps", "--all", "--quiet", service).split()

    def state(self, container: str) -> dict[str, Any]:
        """Return what the engine knows of a container."""
        (found,) = json.loads(run(*ENGINE, "inspect", container))
        return dict(found)

    def inside(self, container: str, *words: str, check: bool = True) -> str:
        """Run a command in a container."""
        return run(*ENGINE, "exec", container, *words, check=check)

    def crash(self, container: str) -> None:
        """Kill all of a container's processes; the engine starts it again."""
        before = self.state(container)["RestartCount"]
        self.inside(container, "sh", "-c", ALL_GONE, check=False)
        wait_until("it restarts", lambda: self.state(container)["RestartCount"] > before)


def run(*words: str, check: bool = True) -> str:
    """Run a command in the repository's root; return what it prints."""
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if check and done.returncode:
        pytest.fail(f"{shlex.join(words)}: {done.stderr[-2000:]}")
    return done.stdout


@pytest.fixture(scope="module")
def plain() -> Iterator[Project]:
    """The deployment of compose.yaml, with Prometheus."""
    project = Project(*PLAIN)
    try:
        project.up()
        yield project
    finally:
        project.down()


def chunks() -> list[Any]:
    """Return the inputs that every training run gets."""
    rng = np.random.default_rng(3)
    return [rng.normal(size=(2, 8, 4)) for _ in range(40)]


def train(name: str, *, during: Callable[[], object] | None = None) -> Any:
    """Train a model through the balancer, with something happening meanwhile; return its weights."""
    inputs, failures = chunks(), []

    def disturb() -> None:
        try:
            assert during is not None
            during()
        except BaseException as error:  # noqa: BLE001 - shown by the test
            failures.append(error)

    thread = threading.Thread(target=disturb) if during else None
    with timernn.connect(ADDRESS, timeout=120) as client:
        client.create_model(name, input_size=4, hidden_size=32, seed=7)
        with client.session(name, batch_size=2, train=True) as session:
            for number in range(STEPS):
                if thread is not None and number == 20:
                    thread.start()
                session.backward(session.forward(inputs[number % 40]) - 0.5)
                session.update()
        if thread is not None:
            thread.join()
        assert not failures
        return client.get_weights(name)


def same(one: Any, other: Any) -> bool:
    """Return whether two models have the same bits."""
    return all(np.array_equal(getattr(one, k), getattr(other, k)) for k in ("Wx", "Wh", "b"))


@pytest.fixture(scope="module")
def quiet(plain: Project) -> Any:
    """The weights of a training run that nothing disturbed."""
    return train("quiet")


def test_calls_are_spread_over_the_replicas(plain: Project) -> None:
    """One connection to the balancer reaches both."""
    assert len(plain.containers("timernn")) == 2
    with grpc.insecure_channel(ADDRESS) as channel:
        stub: Any = ModelServiceStub(channel)
        found = {
            stub.GetServerInfo(GetServerInfoRequest(), timeout=30).replica_id for _ in range(40)
        }
    assert len(found) == 2


def test_a_killed_replica_costs_nothing(plain: Project, quiet: Any) -> None:
    """No error reaches the program, and each step was made exactly once."""
    trained = train("killed-replica", during=lambda: plain.crash(plain.containers("timernn")[0]))
    assert same(trained, quiet)


def test_a_killed_store_costs_nothing(plain: Project, quiet: Any) -> None:
    """What was acknowledged is in its file; what was not is sent again."""
    trained = train("killed-store", during=lambda: plain.crash(plain.containers("store")[0]))
    assert same(trained, quiet)


def test_a_restarted_replica_costs_nothing(plain: Project, quiet: Any) -> None:
    """It drains, with exit code 0, while the other goes on."""
    replica = plain.containers("timernn")[1]
    trained = train("restarted", during=lambda: run(*ENGINE, "restart", "--time", "40", replica))
    assert same(trained, quiet)


def test_the_store_wants_a_password(plain: Project) -> None:
    """Also of who reaches its address, as this machine does."""
    networks = plain.state(plain.containers("store")[0])["NetworkSettings"]["Networks"]
    (network,) = networks.values()
    with socket.create_connection((network["IPAddress"], 6379), 10) as connection:
        connection.sendall(b"PING\r\n")
        assert connection.recv(100).startswith(b"-NOAUTH")


def test_the_password_is_in_no_argument_and_no_variable(plain: Project) -> None:
    """It is in a file of the volume, and a digest is what the store gets."""
    store, replica = plain.containers("store")[0], plain.containers("timernn")[0]
    password = plain.inside(replica, "cat", "/run/timernn/store-password").strip()
    assert len(password) == 64
    for container in (store, replica):
        seen = plain.inside(container, "sh", "-c", "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ")
        assert password not in seen + json.dumps(plain.state(container))
    assert password not in plain.run("logs")


def test_a_replica_has_no_route_out(plain: Project) -> None:
    """It reaches no address beyond its own two networks; this machine reaches the same one."""
    networks = plain.state(plain.containers("balancer")[0])["NetworkSettings"]["Networks"]
    beyond = networks[f"{PROJECT}_front"]["IPAddress"]
    socket.create_connection((beyond, 50051), 10).close()
    code = f"import socket; socket.create_connection(('{beyond}', 50051), 5)"
    (replica, *_) = plain.containers("timernn")
    said = plain.inside(replica, "sh", "-c", f'python -c "{code}" 2>&1', check=False)
    assert "timed out" in said or "unreachable" in said


def test_a_replica_knows_of_both(plain: Project) -> None:
    """They say through the store that they run, for which its user has the right."""
    (replica, *_) = plain.containers("timernn")
    shown = json.loads(plain.inside(replica, "timernn", "top", "--once", "--json"))
    hosts = {each["host"] for each in shown["now"]["replicas"]}
    assert hosts == {each[:12] for each in plain.containers("timernn")}


def test_the_doctor_finds_nothing_to_change(plain: Project) -> None:
    """Beside a replica: the store's rights, policy and file, and the memory of the container."""
    (replica, *_) = plain.containers("timernn")
    found = json.loads(plain.inside(replica, "timernn", "doctor", "--json"))["findings"]
    assert {each["check"]: each["text"] for each in found if each["status"] != "ok"} == {}


def test_prometheus_sees_each_replica(plain: Project) -> None:
    """By the name that they share."""
    wait_until("both are read", lambda: len(query('up{job="timernn"} == 1')) == 2)
    wait_until("it counts", lambda: query("sum(timernn_chunks_applied_total) > 0"))


def query(expression: str) -> list[Any]:
    """Return what Prometheus finds."""
    url = "http://127.0.0.1:9090/api/v1/query?" + urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(url, timeout=30) as response:
        return list(json.load(response)["data"]["result"])


def test_every_service_ends_with_0(plain: Project) -> None:
    """After `stop`; and the port is the same after the next start."""
    plain.run("stop")
    codes = {
        name: [plain.state(each)["State"]["ExitCode"] for each in plain.containers(name)]
        for name in ("timernn", "store", "balancer", "prometheus")
    }
    assert codes == {"timernn": [0, 0], "store": [0], "balancer": [0], "prometheus": [0]}
    plain.up()
    with timernn.connect(ADDRESS) as client:
        assert client.ping().serving


def test_a_replica_that_has_just_started_stops_at_once(plain: Project) -> None:
    """SIGTERM in its first moments is not lost."""
    (replica, *_) = plain.containers("timernn")
    for pause_s in (0.0, 0.2, 0.5):
        run(*ENGINE, "stop", "--time", "40", replica)
        run(*ENGINE, "start", replica)
        time.sleep(pause_s)
        began = time.monotonic()
        run(*ENGINE, "stop", "--time", "40", replica)
        assert time.monotonic() - began < 30
        assert plain.state(replica)["State"]["ExitCode"] == 0


@pytest.fixture(scope="module")
def secured(plain: Project) -> Iterator[Project]:
    """The same with TLS and tokens."""
    plain.down()
    project = Project(*TLS)
    try:
        project.up()
        yield project
    finally:
        project.down()


def test_with_tls_a_token_opens_the_service(secured: Project) -> None:
    """The generated authority signed for the balancer; without a token there is no answer."""
    (replica, *_) = secured.containers("timernn")
    authority = secured.inside(replica, "cat", "/run/timernn/ca.crt").encode()
    token = secured.inside(replica, "cat", "/run/timernn/admin-token").strip()
    with grpc.secure_channel(ADDRESS, grpc.ssl_channel_credentials(authority)) as channel:
        stub: Any = ModelServiceStub(channel)
        found = {
            stub.GetServerInfo(
                GetServerInfoRequest(), metadata=[("authorization", f"Bearer {token}")], timeout=30
            ).replica_id
            for _ in range(40)
        }
        assert len(found) == 2
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetServerInfo(GetServerInfoRequest(), timeout=30)
        refused: Any = caught.value
        assert refused.code() == grpc.StatusCode.UNAUTHENTICATED


def test_with_tls_prometheus_has_a_token_of_its_own(secured: Project) -> None:
    """It reads the replicas by TLS, as operator."""
    assert secured.containers("prometheus")
    wait_until("both are read", lambda: len(query('up{job="timernn"} == 1')) == 2)


@pytest.fixture(scope="module")
def mutual(secured: Project) -> Iterator[Project]:
    """The same with certificates of clients."""
    secured.down()
    project = Project(*MUTUAL)
    try:
        project.up()
        yield project
    finally:
        project.down()


def test_with_mtls_a_client_has_to_show_a_certificate(mutual: Project) -> None:
    """The one that was made for it opens the connection; the token says who calls."""
    (replica, *_) = mutual.containers("timernn")
    files = {
        name: mutual.inside(replica, "cat", f"/run/timernn/{name}").encode()
        for name in ("ca.crt", "client.crt", "client.key", "admin-token")
    }
    token = files["admin-token"].decode().strip()
    own = timernn.TLS(ca=files["ca.crt"], cert=files["client.crt"], key=files["client.key"])
    with timernn.connect(ADDRESS, tls=own, token=token) as client:
        client.create_model("m", input_size=2, hidden_size=3)
    without = timernn.connect(ADDRESS, tls=timernn.TLS(ca=files["ca.crt"]), token=token, timeout=10)
    with without as client, pytest.raises(timernn.TlsFailed):
        client.server_info()
    with timernn.connect(ADDRESS, tls=own) as client, pytest.raises(timernn.NoCredentials):
        client.server_info()
