"""How much work one replica takes at once: operations and bytes, refused at once beyond."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from service.rpc.errors import overloaded

if TYPE_CHECKING:
    from types import TracebackType

    from service.rpc.auth import Principal


class Admission:
    """Counts what this process has in work or waiting; a `Share` takes from it and gives back.

    Attributes:
        operations: Operations in work.
        request_bytes: Bytes of requests and of the answers to come, and of uploads and downloads
            under way.
        max_operations: The bound of the first.
        max_bytes: The bound of the second. Something larger is let in while nobody else holds any
            bytes, so that no size within the limits is refused for ever.
    """

    __slots__ = ("max_bytes", "max_operations", "operations", "request_bytes")

    def __init__(self, max_operations: int, max_bytes: int) -> None:
        self.max_operations = max_operations
        self.max_bytes = max_bytes
        self.operations = 0
        self.request_bytes = 0


class Share:
    """What one call, or one stream, holds of the replica; given back when its `with` block ends.

    Attributes:
        principal: For whom.
        operations: Operations held.
        held_bytes: Bytes held.
    """

    __slots__ = ("_admission", "held_bytes", "operations", "principal")

    def __init__(self, admission: Admission, principal: Principal) -> None:
        self._admission = admission
        self.principal = principal
        self.operations = 0
        self.held_bytes = 0

    def take(self, size_bytes: int, operations: int = 0) -> None:
        """Hold more, or raise OVERLOADED and hold what was held before."""
        admission = self._admission
        if operations and admission.operations >= admission.max_operations:
            limit = admission.max_operations
            raise overloaded("operations_in_flight", f"is at its limit of {limit}")
        total_bytes = admission.request_bytes
        if total_bytes > self.held_bytes and total_bytes + size_bytes > admission.max_bytes:
            limit = admission.max_bytes
            raise overloaded("request_bytes_in_flight", f"is at its limit of {limit}")
        admission.request_bytes = total_bytes + size_bytes
        admission.operations += operations
        self.held_bytes += size_bytes
        self.operations += operations

    def give_back(self, size_bytes: int, operations: int = 0) -> None:
        """Release some of the held bytes and operations."""
        admission = self._admission
        admission.request_bytes -= size_bytes
        admission.operations -= operations
        self.held_bytes -= size_bytes
        self.operations -= operations

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.give_back(self.held_bytes, self.operations)
