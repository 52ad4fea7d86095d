"""The messages on their way in: none is read before there is room for the largest that it may be.

gRPC does not say how large a message is before all of it has come. Unread, a call holds no more than the
window that its client may fill unasked; once it is read, everything up to the limit on messages may come.
So each read takes room for the largest, beside what is in work. A small message has come already and
gives its room back at once. Readers wait for each other: tenants in turn, each tenant's calls in the order in
which they came.

Slow senders cannot keep everybody out: they may have three quarters of the places. Whoever is still
sending after a second when that many are taken is refused, and nobody may send for longer than `limit_s`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from service.rpc.errors import overloaded, slow_message

if TYPE_CHECKING:
    from service.domain.errors import DomainError
    from service.rpc.admission import Admission
    from service.rpc.auth import Context


@dataclass(frozen=True, slots=True)
class ArrivalRules:
    """How long messages may take to arrive, in seconds.

    Attributes:
        limit_s: One message; waiting for room to read it may take as long again.
        slow_s: After it a message counts as slow.
    """

    limit_s: float = 30.0
    slow_s: float = 1.0


class Arrivals:
    """Reads messages of calls, so many at once as there is room for.

    Attributes:
        reading: The tasks that read, and since when by the clock of the event loop.
        waiting: Of each tenant the calls that wait for room to read, and since when; whose turn is next
            comes first.
    """

    def __init__(
        self,
        admission: Admission,
        *,
        message_bytes: int,
        room_bytes: int,
        rules: ArrivalRules,
        waiting_limit: int,
    ) -> None:
        """Set the bounds.

        Args:
            admission: What is in work, which takes from the same room.
            message_bytes: The largest message.
            room_bytes: Of the messages that are read at once; at least one is.
            rules: How long they may take.
            waiting_limit: How many calls of a tenant may wait for room; the next one is refused at once.
        """
        self.reading: dict[asyncio.Task[Any], float] = {}
        self.waiting: dict[str, deque[tuple[asyncio.Future[None], float]]] = {}
        self._admission = admission
        self._message_bytes = message_bytes
        self._places = max(1, room_bytes // message_bytes)
        self._taken = 0  # places: of those that read, and of those whose turn has come
        self._waiting_limit = waiting_limit
        self._rules = rules
        self._refused: dict[asyncio.Task[Any], DomainError] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def room_taken_bytes(self) -> int:
        """Return the most bytes that the messages being read can have."""
        return self._taken * self._message_bytes

    def _has_room(self) -> bool:
        """Return whether one more may be read: what is in work cannot keep out the only one."""
        taken = self._taken
        if not taken:
            return True
        size = (taken + 1) * self._message_bytes
        return taken < self._places and self._admission.has_room(size)

    async def read(self, context: Context, tenant: str) -> Any:
        """Return a call's next message as bytes, or grpc.aio.EOF, once there is room for it.

        A task reads one message at a time.

        Raises:
            DeadlineExceeded: SLOW_MESSAGE if the message took too long to come.
            ResourceExhausted: OVERLOADED if no room became free in time, or if it came slowly while others
                needed the room.
        """
        loop = asyncio.get_running_loop()
        if self.waiting or not self._has_room():
            await self._wait_for_turn(loop, tenant)
        else:
            self._taken += 1
        task: Any = asyncio.current_task()
        self.reading[task] = loop.time()
        if self._timer is None:
            self._timer = loop.call_later(self._rules.slow_s, self._check, loop)
        try:
            return await context.read()
        except asyncio.CancelledError as error:
            # Cancelled by the check alone, or by gRPC as well, because the call is over?
            if task in self._refused and task.uncancel() == 0:
                raise self._refused[task] from error
            raise
        finally:
            self._refused.pop(task, None)
            del self.reading[task]
            self._give_back()

    async def _wait_for_turn(self, loop: asyncio.AbstractEventLoop, tenant: str) -> None:
        """Wait until a place has been taken for this call."""
        limit, waiting = self._waiting_limit, self.waiting.get(tenant, ())
        if len(waiting) >= limit:
            raise overloaded("calls that wait to be read", f"are at their limit of {limit}")
        turn: asyncio.Future[None] = loop.create_future()
        self.waiting.setdefault(tenant, deque()).append((turn, loop.time()))
        self._admission.when_released.add(self._let_in)
        try:
            await turn
        except asyncio.CancelledError:
            if (
                turn.done() and not turn.cancelled() and not turn.exception()
            ):  # its turn came as well
                self._give_back()
            raise

    def _give_back(self) -> None:
        self._taken -= 1
        if self.waiting:
            # Not at once: what was read is counted as work first.
            asyncio.get_running_loop().call_soon(self._let_in)

    def _let_in(self) -> None:
        """Let in those that wait, as far as there is room, one of each tenant in turn."""
        waiting = self.waiting
        while waiting and self._has_room():
            tenant = next(iter(waiting))
            calls = waiting.pop(tenant)
            turn, _ = calls.popleft()
            if calls:
                waiting[tenant] = calls  # behind the others
            if not turn.done():
                self._taken += 1
                turn.set_result(None)
        if waiting:
            self._admission.when_released.add(self._let_in)

    def _check(self, loop: asyncio.AbstractEventLoop) -> None:
        """Refuse those that send for too long, and those that wait for room for too long."""
        now, rules = loop.time(), self._rules
        oldest_first = list(self.reading.items())
        for slow, (task, since) in enumerate(oldest_first, start=1):
            if now - since < rules.slow_s:
                break
            if now - since > rules.limit_s:
                self._refuse(task, slow_message(rules.limit_s))
            elif self.waiting and slow > 3 * self._places // 4:
                self._refuse(task, overloaded("messages on their way", "come too slowly"))
        for tenant, calls in list(self.waiting.items()):
            while calls and now - calls[0][1] > rules.limit_s:
                turn, _ = calls.popleft()
                if not turn.done():
                    turn.set_exception(overloaded("messages on their way", "leave no room"))
            if not calls:
                del self.waiting[tenant]
        is_needed = self.reading or self.waiting
        self._timer = loop.call_later(rules.slow_s, self._check, loop) if is_needed else None

    def _refuse(self, task: asyncio.Task[Any], refusal: DomainError) -> None:
        if task not in self._refused:
            self._refused[task] = refusal
            task.cancel()
