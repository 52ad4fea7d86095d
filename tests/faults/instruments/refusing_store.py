"""Make a real store refuse one command of a replica, or all from one on, by the store's own means.

The commands that turn the refusing on and off go on the replica's own link, right around the command that
is to be refused: also one in the middle of a pipeline meets a store that is full while its neighbours do
not, and each refusal is worded by the server.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.store.links import Command


@dataclass(frozen=True, slots=True)
class Refusal:
    """A way in which a store refuses, with the commands that begin and end it."""

    name: str
    begin: Command
    end: Command


REFUSALS = (
    Refusal("OOM", ("CONFIG", "SET", "maxmemory", 1), ("CONFIG", "SET", "maxmemory", 0)),
    Refusal(
        "NOREPLICAS",
        ("CONFIG", "SET", "min-replicas-to-write", 1),
        ("CONFIG", "SET", "min-replicas-to-write", 0),
    ),
    Refusal(
        "MISCONF",  # of a store whose last snapshot failed
        ("CONFIG", "SET", "stop-writes-on-bgsave-error", "yes"),
        ("CONFIG", "SET", "stop-writes-on-bgsave-error", "no"),
    ),
    Refusal("READONLY", ("REPLICAOF", "127.0.0.1", 1), ("REPLICAOF", "NO", "ONE")),
    Refusal(
        "NOPERM",
        ("ACL", "SETUSER", "default", "-evalsha", "-eval", "-set", "-get", "-zrem", "-hmget"),
        ("ACL", "SETUSER", "default", "+@all"),
    ),
)


class RefusingLink:
    """Stands before a client's round trips and has the store refuse, counted from here.

    Args:
        client: Of one server; its `round_trip` is replaced until `remove`.
        refusal: How the store refuses.
        at: Which command is the first that is refused, counted from 1.
        is_lasting: Refuse all commands from there on, until `remove`.
    """

    def __init__(self, client: Any, refusal: Refusal, at: int, *, is_lasting: bool) -> None:
        self._client, self._refusal = client, refusal
        self._at, self._is_lasting = at, is_lasting
        self._round_trip = client.round_trip
        self._seen = 0
        client.round_trip = self

    @property
    def has_refused(self) -> bool:
        """Whether the command that was to be refused was sent."""
        return self._seen >= self._at

    async def __call__(self, commands: Sequence[Command], *options: Any) -> list[Any]:
        """Make a round trip; the answers to what was put in are left out."""
        wire: list[Command] = []
        places = []
        for command in commands:
            self._seen += 1
            if self._seen == self._at:
                wire.append(self._refusal.begin)
            places.append(len(wire))
            wire.append(command)
            if self._seen == self._at and not self._is_lasting:
                wire.append(self._refusal.end)
        answers = await self._round_trip(wire, *options)
        return [answers[place] for place in places]

    async def remove(self) -> None:
        """Let the store, and the client, be as they were."""
        del self._client.round_trip
        if self.has_refused:
            await self._client.round_trip([self._refusal.end])
