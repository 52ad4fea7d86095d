"""An upper bound on the size of an answer, known before it is computed.

A request of a few kilobytes can ask for an answer of a whole message: T is in the request, H is the
model's. Admission therefore counts the bytes that an operation will hold, not only those of its request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.domain.types import SessionKey

if TYPE_CHECKING:
    from service.domain.recurrence import Recurrence
    from service.domain.types import Backward, Forward


class AnswerSizes:
    """Bounds the answers to a tenant's operations."""

    __slots__ = ("_message_bytes", "_recurrence")

    def __init__(self, recurrence: Recurrence, message_bytes: int) -> None:
        self._recurrence = recurrence
        self._message_bytes = message_bytes  # no answer is larger

    def forward(self, tenant: str, op: Forward) -> int:
        """Return the most bytes that the arrays of a Forward's answer can have."""
        n, t, _ = op.xs.shape
        _, h = self._recurrence.sizes(SessionKey(tenant, op.session_id), op.model_id)
        return int(min(n * (t + 1) * h * op.xs.itemsize, self._message_bytes))

    def backward(self, tenant: str, op: Backward) -> int:
        """Return the most bytes that the arrays of a Backward's answer can have."""
        n, t, _ = op.d_outputs.shape
        width = max(self._recurrence.sizes(SessionKey(tenant, op.session_id), ""))
        return int(min(n * (t + 1) * width * op.d_outputs.itemsize, self._message_bytes))
