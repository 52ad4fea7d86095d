"""TLS to a store: the URL's certificates and checks hold for one server, Sentinel and Cluster alike."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from tls_front import Certificates, TlsFront

from instruments.redis_servers import Cluster, RedisServer, Sentinel, wait_until
from service.domain.errors import Unavailable
from service.domain.types import SessionKey
from service.settings import Settings
from service.store.connect import open_store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from instruments.redis_servers import ClusterNode


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """The authority that the stores' certificates are of."""
    return Certificates.issue(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """An authority that nobody here trusts."""
    return Certificates.issue(tmp_path_factory.mktemp("strangers"))


@dataclass
class Scene:
    """A store behind TLS."""

    certificates: Certificates
    stack: contextlib.ExitStack
    url: str = ""
    fronts: list[TlsFront] = field(default_factory=list)

    def put_behind_tls(self, port: int) -> int:
        """Return the port of a front for a server."""
        front = self.stack.enter_context(TlsFront(self.certificates, port))
        self.fronts.append(front)
        return front.port


def run_one_server(scene: Scene) -> None:
    """Run one server."""
    server = scene.stack.enter_context(RedisServer(append_only=False))
    scene.url = f"rediss://127.0.0.1:{scene.put_behind_tls(server.port)}/0"


def run_sentinel(scene: Scene) -> None:
    """Run a master and a sentinel that names it by its TLS port."""
    server = scene.stack.enter_context(RedisServer(append_only=False))
    watching = Sentinel("mymaster", scene.put_behind_tls(server.port), 1000, 1)
    scene.stack.enter_context(watching)
    wait_until("the sentinel to see its master", lambda: _is_up(watching))
    scene.url = f"rediss+sentinel://127.0.0.1:{scene.put_behind_tls(watching.port)}/mymaster"


def run_cluster(scene: Scene) -> None:
    """Run masters that send their clients to TLS ports."""
    cluster = scene.stack.enter_context(Cluster(with_replicas=False))
    for node in cluster.nodes:
        node.ask("CONFIG", "SET", "cluster-announce-port", scene.put_behind_tls(node.port))
    ports = {front.port for front in scene.fronts}
    wait_until("all to be announced", lambda: all(_ports(n) == ports for n in cluster.nodes))
    scene.url = f"rediss+cluster://127.0.0.1:{scene.fronts[0].port}"


@pytest.fixture(scope="module", params=[run_one_server, run_sentinel, run_cluster])
def scene(request: pytest.FixtureRequest, certificates: Certificates) -> Iterator[Scene]:
    """A store of each kind."""
    with contextlib.ExitStack() as stack:
        made = Scene(certificates, stack)
        request.param(made)
        yield made


async def test_certificates_of_the_url_are_used_for_every_connection(scene: Scene) -> None:
    """The store's certificate is checked by the authority named, and the client shows its own."""
    await use(scene.url, **given(scene.certificates))


async def test_a_store_that_a_stranger_signed_for_is_not_used(
    scene: Scene, strangers: Certificates
) -> None:
    """Its certificate is of another authority than the one named."""
    options = given(scene.certificates) | {"ssl_ca_certs": str(strangers.ca_certs)}
    with pytest.raises(Unavailable):
        await use(scene.url, **options)
    await use(scene.url, **options, ssl_cert_reqs="none")


async def test_a_store_that_asks_for_a_certificate_is_not_used_without(scene: Scene) -> None:
    """The client's own certificate goes with each connection, or none is made."""
    with pytest.raises(Unavailable):
        await use(scene.url, ssl_ca_certs=str(scene.certificates.ca_certs))


async def test_the_host_s_name_is_checked_unless_the_url_says_otherwise(scene: Scene) -> None:
    """A certificate for another host is refused; ssl_check_hostname=false lets it pass."""
    for front in scene.fronts:
        front.show_name("other.test")
    try:
        with pytest.raises(Unavailable):
            await use(scene.url, **given(scene.certificates))
        await use(scene.url, **given(scene.certificates), ssl_check_hostname="false")
    finally:
        for front in scene.fronts:
            front.show_name("127.0.0.1")


def given(certificates: Certificates) -> dict[str, str]:
    """Return a client's options."""
    return {
        "ssl_ca_certs": str(certificates.ca_certs),
        "ssl_certfile": str(certificates.certfile),
        "ssl_keyfile": str(certificates.keyfile),
    }


async def use(url: str, **options: str) -> None:
    """Check a store and read sessions of several slots."""
    query = "&".join(f"{name}={value}" for name, value in options.items())
    opened = await open_store(f"{url}?{query}", Settings(store_timeout_ms=10_000))
    try:
        await opened.check()
        for number in range(9):
            await opened.sessions.read_session(SessionKey("t", f"s{number}"))
    finally:
        await opened.close()


def _is_up(watching: Sentinel) -> bool:
    reply = watching.ask("MASTER", "mymaster")
    return bool(dict(zip(reply[::2], reply[1::2], strict=True))[b"flags"] == b"master")


def _ports(node: ClusterNode) -> set[int]:
    return {int(master[1]) for _, _, master, *_ in node.ask("CLUSTER", "SLOTS")}
