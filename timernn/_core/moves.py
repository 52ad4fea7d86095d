"""What an answer changes of a session."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from timernn._core.intents import Taped
    from timernn.types import Array, Gradients, UpdateResult, Version
    from timernn.v1.tensor_pb2 import Tensor


class Move(TypedDict, total=False):
    """New values of a session's attributes of these names."""

    epoch: int
    chunk_seq: int
    state_token: bytes
    _h: Tensor | None
    version: Version | None
    tapes: list[Taped]
    dh: Array | None
    gradients: Gradients | None
    gradient_norm: float | None
    last_update: UpdateResult | None
