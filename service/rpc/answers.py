"""How large an answer may become, told before it is computed.

A request of a few kilobytes can ask for an answer of a whole message: T is in the request, H is the
model's. What is in work is bounded by what it will hold, not by what it was sent in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from timernn.v1.tensor_pb2 import D_TYPE_FLOAT64

if TYPE_CHECKING:
    from service.domain.recurrence import Recurrence


class AnswerSizes:
    """Bounds the answers of one tenant's operations."""

    __slots__ = ("_message_bytes", "_recurrence", "_tenant")

    def __init__(self, tenant: str, recurrence: Recurrence, message_bytes: int) -> None:
        self._tenant = tenant
        self._recurrence = recurrence
        self._message_bytes = message_bytes  # no answer is larger

    def most_bytes(self, kind: str, request: Any) -> int:
        """Return the most bytes that the arrays of an answer can have; the request may be wrong."""
        if kind == "forward":
            tensor, model_id = request.xs, request.model_id
        elif kind == "backward":
            tensor, model_id = request.dhs, ""
        else:
            return 0
        if len(tensor.shape) != 3:
            return 0  # it will be refused
        n, t, _ = tensor.shape
        d, h = self._recurrence.sizes(self._tenant, request.session_id, model_id)
        item_bytes = 8 if tensor.dtype == D_TYPE_FLOAT64 else 4
        size = n * (t + 1) * (h if kind == "forward" else max(d, h)) * item_bytes
        return int(min(max(size, 0), self._message_bytes))
