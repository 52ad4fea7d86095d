"""A primary, a standby that may fall behind, and one address for both: a failover that loses."""

from __future__ import annotations

import contextlib
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from instruments.processes import ServiceProcess
from instruments.proxy import FaultProxy, Faults, Link
from instruments.redis_servers import RedisServer, wait_until
from scenes.fleet import start_all

if TYPE_CHECKING:
    from collections.abc import Iterator

READY_S = 60.0
_SILENCE = Faults(up=Link(blackhole=True), down=Link(blackhole=True))


class StorePair:
    """Two stores behind one address; the standby follows over a link that can go silent.

    Attributes:
        primary: Takes the writes.
        standby: Follows it.
        front: The proxy before whichever is primary.
        lost_bytes: Of the primary's writes that the standby never got, in all failovers.
    """

    def __init__(self) -> None:
        """Prepare; the `with` statement starts both and the proxies."""
        self.primary, self.standby = RedisServer(name="one"), RedisServer(name="two")
        self.lost_bytes = 0
        self._stack = ExitStack()
        self._link = FaultProxy(self.primary.address)
        self.front = FaultProxy(self.primary.address)

    def __enter__(self) -> Self:
        """Start."""
        with ExitStack() as stack:
            for server in (self.primary, self.standby):
                stack.callback(server.close)
                server.start()
            stack.enter_context(self._link)
            stack.enter_context(self.front)
            self._follow()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self._stack.close()

    @property
    def url(self) -> str:
        """The address that names whichever is primary."""
        return f"redis://{self.front.address}"

    def catch_up(self) -> None:
        """Wait until the standby has all that the primary has."""
        # What was written last may still lie in the primary's output buffer.
        wait_until("the standby to catch up", self._is_level, READY_S)

    def partition(self) -> None:
        """Let the standby hear nothing more: what is acknowledged from now on will be lost."""
        self._link.set(_SILENCE)

    def fail_over(self) -> None:
        """Kill the primary and let the standby take over with what it has."""
        self.lost_bytes += self._lag_bytes()
        self.primary.kill()
        self.standby.promote()
        self.primary, self.standby = self.standby, self.primary
        self.front.upstream = self.primary.address
        self.front.reset_all()

    def restore(self) -> None:
        """Start the killed store again as the standby, with the link whole."""
        self._link.upstream = self.primary.address
        self.standby.start()
        self.reconnect()

    def reconnect(self) -> None:
        """Let the standby hear again, and wait until it has caught up."""
        self._link.set(Faults())
        self._link.reset_all()
        self._follow()

    def _follow(self) -> None:
        self.standby.follow("127.0.0.1", self._link.port, wait=False)
        wait_until("the standby to sync", self.standby._is_linked, READY_S)

    def _lag_bytes(self) -> int:
        ahead = int(self.primary.info("replication")["master_repl_offset"])
        return ahead - int(self.standby.info("replication")["slave_repl_offset"])

    def _is_level(self) -> bool:
        return not self._lag_bytes()


@contextlib.contextmanager
def replicas_on(url: str, count: int = 2, *options: str) -> Iterator[list[ServiceProcess]]:
    """Run replicas of the service on a store, started side by side."""
    with ExitStack() as stack:
        replicas = [ServiceProcess(url, *options) for _ in range(count)]
        for replica in replicas:
            stack.callback(replica.close)
        start_all(replicas)
        yield replicas


def addresses_of(replicas: list[ServiceProcess]) -> list[str]:
    """Return where the replicas listen."""
    return [replica.address for replica in replicas]
