"""Sends commands to the nodes of a Redis Cluster that serve their slots.

redis-py's own cluster client has three faults: it sends ASKING and the command that it is for over
two connections of its pool, so that keys of a slot in a move cannot be reached; it closes every
connection after a few moved slots; and it does not look up the new master when a pipeline fails.
Here every round trip is one send to one node, and ASKING goes right before its command.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from redis import exceptions as redis_errors
from redis.crc import key_slot

from service.store.failures import is_lost_connection

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from service.store.links import Command, StoreClient

    Node = tuple[str, int]

# The most redirections that are followed for one command.
REDIRECTS = 8
# Wait before a command is sent again whose keys are being moved.
PAUSE_S = 0.03
# The slot map is fetched at most once in this time.
REFRESH_S = 0.1
_SCRIPTS = frozenset({"EVAL", "EVALSHA"})
_NO_NODE = redis_errors.ClusterDownError("no node serves the slot")


class ClusterRouter:
    """Routes commands to the nodes of a cluster: holds the slot map and a client for each node."""

    def __init__(
        self, seeds: Iterable[Node], make_client: Callable[[str, int], StoreClient]
    ) -> None:
        """Remember where to fetch the slot map first; nothing is sent yet.

        Args:
            seeds: Nodes from which the slot map can be fetched; one that answers is enough.
            make_client: Makes the client of a node, whose own retries are off.
        """
        self._seeds = list(seeds)
        self._make_client = make_client
        self._clients: dict[Node, StoreClient] = {}
        self._slots: dict[int, Node] = {}
        self._refreshed_at = float("-inf")
        self._is_stale = True
        self._suspects: set[Node] = set()  # nodes that failed since the slot map was fetched
        self._refreshing = asyncio.Lock()
        self._renewing: asyncio.Task[None] | None = None

    def node_of(self, key: bytes) -> Node | None:
        """Return the node that serves a key by the current slot map; None if the map has none."""
        return self._slots.get(key_slot(key))

    async def send(
        self, commands: Sequence[Command], answer_bytes: int = 0, name: str = ""
    ) -> list[Any]:
        """Send commands, each to the node of its key; a failure is returned as its command's answer.

        Args:
            commands: What to send.
            answer_bytes: How many bytes the answers may have.
            name: What the observer of the nodes' clients is to call the round trips.
        """
        answers: list[Any] = [_NO_NODE] * len(commands)
        slots = [_slot_of(command) for command in commands]
        if self._is_stale:
            # Commands whose nodes are known and have not failed do not wait for the new slot map.
            nodes = [self._slots.get(slot) for slot in slots]
            if any(node is None or node in self._suspects for node in nodes):
                try:
                    await self.refresh()
                except Exception as error:  # noqa: BLE001 - it becomes the answer of each command
                    return [error] * len(commands)
            else:
                self._renew()
        asking: dict[int, Node] = {}
        pending = list(range(len(commands)))
        for _ in range(REDIRECTS):
            trip = partial(self._trip, answer_bytes=answer_bytes, name=name)
            await self._send_some(commands, slots, pending, asking, answers, trip)
            asking = {i: answers[i].node_addr for i in pending if _is_ask(answers[i])}
            pending = [i for i in pending if self._is_redirected(answers[i])]
            if not pending:
                break
            if any(isinstance(answers[i], redis_errors.TryAgainError) for i in pending):
                await asyncio.sleep(PAUSE_S)
        return answers

    async def refresh(self, *, is_forced: bool = False) -> None:
        """Fetch the slot map, unless it is fresh or was fetched a moment ago.

        Raises:
            RedisError, OSError: If no node answers.
        """
        if not (self._is_stale or is_forced):
            return
        async with self._refreshing:
            if time.monotonic() - self._refreshed_at < REFRESH_S and self._slots:
                return
            self._slots = await self._ask_any()
            self._refreshed_at, self._is_stale = time.monotonic(), False
            self._suspects.clear()

    def _renew(self) -> None:
        """Fetch the slot map in the background."""
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self.refresh())
            self._renewing.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def primaries(self, key: Callable[[int], bytes]) -> list[tuple[StoreClient, bytes]]:
        """Fetch the slot map and return, for each node that serves slots, a client and a key of its.

        Args:
            key: Makes a key from a number; numbers are tried until each node has a key.
        """
        await self.refresh(is_forced=True)
        wanted = set(self._slots.values())
        found: dict[Node, bytes] = {}
        for name in map(key, itertools.count()):
            node = self._slots.get(key_slot(name))
            if node:
                found.setdefault(node, name)
            if len(found) == len(wanted):
                return [(self._client(node), found[node]) for node in sorted(found)]
        raise AssertionError("numbers do not end")

    async def aclose(self) -> None:
        """Close all connections."""
        if self._renewing is not None:
            self._renewing.cancel()
        for client in self._clients.values():
            await client.aclose()

    async def _send_some(
        self,
        commands: Sequence[Command],
        slots: Sequence[int],
        pending: Sequence[int],
        asking: dict[int, Node],
        answers: list[Any],
        send: Callable[[Node, list[tuple[Command, bool]]], Awaitable[list[Any]]],
    ) -> None:
        """Send the pending commands, one round trip per node, to all nodes at once."""
        by_node: dict[Node, list[int]] = {}
        for i in pending:
            node = asking.get(i) or self._slots.get(slots[i])
            if node is None:
                answers[i], self._is_stale = _NO_NODE, True
            else:
                by_node.setdefault(node, []).append(i)

        async def trip(node: Node, some: list[int]) -> None:
            sent = [(commands[i], i in asking) for i in some]
            for i, answer in zip(some, await send(node, sent), strict=True):
                answers[i] = answer

        await asyncio.gather(*(trip(node, some) for node, some in by_node.items()))

    async def _trip(
        self, node: Node, sent: list[tuple[Command, bool]], *, answer_bytes: int, name: str
    ) -> list[Any]:
        on_wire: list[Command] = []
        for command, is_asking in sent:
            on_wire += (("ASKING",), command) if is_asking else (command,)
        try:
            answers_of_node = iter(await self._client(node).round_trip(on_wire, answer_bytes, name))
        except Exception as error:  # noqa: BLE001 - it becomes the answer of each command
            self._is_stale = True  # the node may not serve these slots any more
            self._suspects.add(node)
            return [error] * len(sent)
        answers = []
        for _, is_asking in sent:
            if is_asking:
                next(answers_of_node)
            answers.append(next(answers_of_node))
        return answers

    def _is_redirected(self, answer: object) -> bool:
        """Update the slot map from an answer; return whether its command has to be sent again."""
        if isinstance(answer, redis_errors.MovedError):
            self._slots[answer.slot_id] = answer.node_addr
            self._is_stale = True
            return True
        if isinstance(answer, redis_errors.ClusterDownError) or is_lost_connection(answer):
            self._is_stale = True
        return isinstance(answer, (redis_errors.AskError, redis_errors.TryAgainError))

    async def _ask_any(self) -> dict[int, Node]:
        """Fetch the slot map from one node after another until one answers, serving nodes first."""
        known = sorted(set(self._slots.values()))
        random.shuffle(known)
        known.sort(key=lambda node: node in self._suspects)
        error: Exception = _NO_NODE
        for node in dict.fromkeys([*known, *self._seeds]):
            try:
                (answer,) = await self._client(node).round_trip([("CLUSTER", "SLOTS")])
            except (redis_errors.RedisError, OSError) as failure:
                error = failure
            else:
                if not isinstance(answer, Exception):
                    return _served(answer, node[0])
                error = answer
        raise error

    def _client(self, node: Node) -> StoreClient:
        if node not in self._clients:
            self._clients[node] = self._make_client(*node)
        return self._clients[node]


def _served(ranges: list[Any], asked_host: str) -> dict[int, Node]:
    """Parse CLUSTER SLOTS; a node that does not know its own host gets the host that was asked."""
    served: dict[int, Node] = {}
    for first, last, (host, port, *_), *_replicas in ranges:
        node = ((host or b"").decode() or asked_host, int(port))
        served.update(dict.fromkeys(range(first, last + 1), node))
    return served


def _slot_of(command: Command) -> int:
    key = command[3 if command[0] in _SCRIPTS else 1]
    return int(key_slot(key.encode() if isinstance(key, str) else key))


def _is_ask(answer: object) -> bool:
    # In redis-py MovedError is a subclass of AskError.
    is_moved = isinstance(answer, redis_errors.MovedError)
    return isinstance(answer, redis_errors.AskError) and not is_moved
