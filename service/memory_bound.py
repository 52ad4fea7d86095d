"""The most memory that one server process takes: docs/operations.md, "Limits", as a sum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from service.settings import MIB

if TYPE_CHECKING:
    from collections.abc import Mapping

_PROCESS_BYTES: Final = 100 * MIB
_WINDOW_BYTES: Final = MIB // 2  # what the client of a call that waits may send unasked
_COPIES: Final = 8  # messages that are parsed, computed and encoded at the moment
_STEP: Final = 10  # times the weights of the model whose step is made


def memory_bound_bytes(cache_bytes: int, limits: Mapping[str, int]) -> int:
    """Return the bytes of full caches, a flood of requests from slow senders and a step of the largest model, at once.

    Args:
        cache_bytes: Of all caches.
        limits: The server's, by name.
    """
    requests = limits["request_bytes_in_flight"] * 3 // 2  # answers may grow while messages come
    requests += limits["operations_in_flight"] * _WINDOW_BYTES + _COPIES * limits["message_bytes"]
    return _PROCESS_BYTES + cache_bytes + requests + _STEP * limits["weights_bytes"]
