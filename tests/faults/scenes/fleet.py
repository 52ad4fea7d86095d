"""A store and replicas as real processes, with a fault proxy wherever a test wants one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from instruments.dialects import GrpcDialect, RespDialect
from instruments.processes import ServiceProcess
from instruments.proxy import FaultProxy, Faults
from instruments.redis_servers import RedisServer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Fleet:
    """Replicas of the service on one store.

    Attributes:
        store: The store's own process.
        replicas: The server processes.
        store_proxies: One between each replica and the store, if asked for.
        client_proxies: One between the clients and each replica, if asked for.
    """

    def __init__(
        self,
        count: int = 2,
        *options: str,
        seed: int = 0,
        faulty_store: bool = False,
        faulty_clients: bool = False,
        envs: Sequence[Mapping[str, str]] = (),
    ) -> None:
        """Prepare; the `with` statement starts everything.

        Args:
            count: How many replicas.
            options: Options of `timernn serve` for each.
            seed: Of the proxies.
            faulty_store: Whether a proxy stands before the store, one a replica.
            faulty_clients: Whether a proxy stands before each replica.
            envs: Further variables of the first replicas, one mapping each.
        """
        self._options = options
        self._count, self._seed = count, seed
        self._faulty_store, self._faulty_clients = faulty_store, faulty_clients
        self._envs = [*envs, *({} for _ in range(count - len(envs)))]
        self.store = RedisServer(append_only=False)
        self.replicas: list[ServiceProcess] = []
        self.store_proxies: list[FaultProxy] = []
        self.client_proxies: list[FaultProxy] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Start the store, then the replicas side by side."""
        with ExitStack() as stack:
            stack.enter_context(self.store)
            for number in range(self._count):
                url = self.store.url
                if self._faulty_store:
                    proxy = FaultProxy(
                        self.store.address, dialect=RespDialect, seed=self._seed + number
                    )
                    self.store_proxies.append(stack.enter_context(proxy))
                    url = f"redis://{proxy.address}"
                replica = ServiceProcess(url, *self._options, env=self._envs[number])
                stack.callback(replica.close)
                self.replicas.append(replica)
            start_all(self.replicas)
            if self._faulty_clients:
                self.client_proxies = [
                    stack.enter_context(
                        FaultProxy(each.address, dialect=GrpcDialect, seed=self._seed + 100 + n)
                    )
                    for n, each in enumerate(self.replicas)
                ]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """End all processes and proxies."""
        self._stack.close()

    @property
    def addresses(self) -> list[str]:
        """Where clients connect: the proxies where there are some."""
        return [each.address for each in self.client_proxies or self.replicas]

    def set_faults(self, *, clients: Faults | None = None, store: Faults | None = None) -> None:
        """Let faults hold on every proxy of a side; a side not named stays as it is."""
        for faults, proxies in ((clients, self.client_proxies), (store, self.store_proxies)):
            for proxy in proxies if faults is not None else ():
                proxy.set(faults or Faults())

    def heal(self) -> None:
        """Lift all faults."""
        self.set_faults(clients=Faults(), store=Faults())


def start_all(replicas: Sequence[ServiceProcess]) -> None:
    """Start replicas side by side: most of a start is imports."""
    with ThreadPoolExecutor(len(replicas) or 1) as pool:
        list(pool.map(ServiceProcess.start, replicas))
