"""What one stream may hold, counted in one place.

A stream is bounded three ways: operations whose answers were not written yet, bytes of their requests, and
bytes of answers, both those that the client has not taken yet and those to come. At a bound nothing more
is read; at the last one nothing more is started. Besides, what its operations hold counts in the
stream's share of the replica.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.domain.errors import ResourceExhausted
from service.rpc.admission import LONGEST_HOLD_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.rpc.admission import Share
    from service.rpc.operation_order import StreamOperation
    from service.settings import Limits


class StreamBudget:
    """Counts a stream's operations and their bytes as they are read, started, answered and written.

    Each operation passes the four methods in this order. The `with` block of the share gives back what is
    held when the stream ends before that.

    Attributes:
        operations: Read, and their answers not written yet.
        request_bytes: Of the requests of those that are not answered yet.
        expected_bytes: The most that the answers of those that were started can have.
        answer_bytes: Of the answers that are not written yet.
    """

    __slots__ = (
        "_message_bytes",
        "_operations_limit",
        "_pause_s",
        "_share",
        "answer_bytes",
        "expected_bytes",
        "operations",
        "request_bytes",
    )

    def __init__(self, share: Share, limits: Limits) -> None:
        self._share = share
        self._operations_limit = limits.stream_operations_in_flight
        self._message_bytes = limits.message_bytes
        self.operations = 0
        self.request_bytes = 0
        self.expected_bytes = 0
        self.answer_bytes = 0
        self._pause_s = 0.0

    def take_pause_s(self) -> float:
        """Return for how long nothing may be read because the tenant was beyond its bounds, once; else 0.

        So a tenant that does not wait when it is refused is slowed by its own connection: refusing each of its
        operations at once would cost the others more than doing them.
        """
        pause_s, self._pause_s = self._pause_s, 0.0
        return pause_s

    def is_full(self, when_released: Callable[[], None]) -> bool:
        """Return whether nothing more may be read.

        Args:
            when_released: Called when there may be room again on the replica, if that is what is missing.
        """
        message_bytes = self._message_bytes
        if not self._share.has_room(message_bytes):
            self._share.call_when_released(when_released)
            return True
        return (
            self.operations >= self._operations_limit
            or self.request_bytes >= message_bytes
            or self.answer_bytes >= message_bytes
        )

    def has_room(self) -> bool:
        """Return whether the answers, those to come included, leave room for another operation."""
        return self.answer_bytes + self.expected_bytes < self._message_bytes

    def read(self, operation: StreamOperation, request_bytes: int) -> None:
        """Count an operation in, or raise OVERLOADED and count it without its bytes."""
        self.operations += 1
        self._check_tenant(request_bytes)
        self._share.take(request_bytes)
        operation.request_bytes = request_bytes
        self.request_bytes += request_bytes

    def start(self, operation: StreamOperation, answer_bytes: int) -> None:
        """Count an operation as in work, with the most that its answer can have, or raise OVERLOADED.

        Only now: what waits for its session, or for a client that does not read, takes nobody
        else's room.
        """
        self._check_tenant(answer_bytes, operations=1)
        self._share.take(answer_bytes, operations=1, request_bytes=operation.request_bytes)
        operation.is_admitted = True
        operation.expected_bytes = answer_bytes
        self.expected_bytes += answer_bytes

    def _check_tenant(self, size_bytes: int, operations: int = 0) -> None:
        """Have the stream pause if a bound of its own tenant keeps an operation out, and raise OVERLOADED."""
        share = self._share
        if share.tenant is None:
            return
        try:
            share.tenant.check(size_bytes, operations, share.held_bytes)
        except ResourceExhausted as refusal:
            wait_s = max(refusal.retry_after_s or 0.0, share.tenant.refusal_delay_s())
            self._pause_s = min(wait_s, LONGEST_HOLD_S)
            raise

    def answered(self, operation: StreamOperation, answer_bytes: int) -> None:
        """Count what an operation held out, and the bytes of its answer in."""
        request_bytes, expected_bytes = operation.request_bytes, operation.expected_bytes
        self._share.give_back(request_bytes + expected_bytes, int(operation.is_admitted))
        self.request_bytes -= request_bytes
        self.expected_bytes -= expected_bytes
        self.answer_bytes += answer_bytes

    def written(self, operations: int, answer_bytes: int) -> None:
        """Count operations out whose answers the client has taken."""
        self.operations -= operations
        self.answer_bytes -= answer_bytes
