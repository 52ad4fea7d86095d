"""How much work one replica takes at once: operations and bytes, refused at once beyond."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from service.rpc.errors import overloaded

if TYPE_CHECKING:
    from types import TracebackType


class Admission:
    """Counts what is in work or waiting in this process.

    Something larger than the whole budget of bytes is let in while nothing else is in work, so that
    no size within the limits is refused for ever.

    Attributes:
        operations: Operations in work or waiting.
        request_bytes: Bytes of their requests and of the answers to come, and of uploads and downloads
            under way.
    """

    __slots__ = ("_max_bytes", "_max_operations", "operations", "request_bytes")

    def __init__(self, max_operations: int, max_bytes: int) -> None:
        self._max_operations = max_operations
        self._max_bytes = max_bytes
        self.operations = 0
        self.request_bytes = 0

    def enter(self, size_bytes: int, held_bytes: int = 0) -> None:
        """Count one operation in, for one who holds some bytes already, or raise OVERLOADED."""
        if self.operations >= self._max_operations:
            raise overloaded("operations_in_flight", f"is at its limit of {self._max_operations}")
        self.add_bytes(size_bytes, held_bytes)
        self.operations += 1

    def add_bytes(self, size_bytes: int, held_bytes: int = 0) -> None:
        """Count more bytes for one who holds some already, or raise OVERLOADED."""
        others_bytes = self.request_bytes - held_bytes
        if others_bytes and self.request_bytes + size_bytes > self._max_bytes:
            raise overloaded("request_bytes_in_flight", f"is at its limit of {self._max_bytes}")
        self.request_bytes += size_bytes

    def leave(self, size_bytes: int, operations: int = 1) -> None:
        """Count operations out with all their bytes."""
        self.operations -= operations
        self.request_bytes -= size_bytes


class Ticket:
    """One call's share, given back when its `with` block ends.

    Without an admission it counts nowhere: health is never refused, and a stream counts each of its
    operations.
    """

    __slots__ = ("_admission", "_size_bytes")

    def __init__(self, admission: Admission | None, size_bytes: int) -> None:
        self._admission = admission
        self._size_bytes = size_bytes

    def __enter__(self) -> Self:
        if self._admission:
            self._admission.enter(self._size_bytes)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._admission:
            self._admission.leave(self._size_bytes)

    def reserve(self, size_bytes: int) -> None:
        """Count more bytes that this call is about to hold, or raise OVERLOADED."""
        if self._admission:
            self._admission.add_bytes(size_bytes, self._size_bytes)
            self._size_bytes += size_bytes
