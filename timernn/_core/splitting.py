"""Cutting a sequence along T, which is exact for a recurrence, to what one message may hold."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from timernn import errors

if TYPE_CHECKING:
    from timernn.v1 import model_service_pb2 as model_pb

# Room for a message's other fields: ids, tokens, names.
_OVERHEAD_BYTES = 8192
# What a server of defaults allows (its `Limits`; a test compares them): for what it gives as 0, which
# means that it does not say.
_DEFAULTS = {
    "message_bytes": 16 << 20,
    "chunk_steps": 4096,
    "replay_window": 4,
    "tapes_per_session": 8,
    "contributions_per_model": 10_000,
    "operations_per_message": 256,
}
_DEFAULT_TAPE_TTL_S = 900.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """The server's limits that the client keeps to.

    Attributes:
        message_bytes: Largest message either way.
        chunk_steps: Largest T of one chunk.
        replay_window: Chunks of one session that may be unanswered.
        tapes_per_session: Training chunks that may wait for their Backward.
        contributions_per_model: Contributions that may wait for an Update.
        operations_per_message: Operations in one message of a stream.
        tape_ttl_s: How long a tape can be used after it was written, in seconds.
    """

    message_bytes: int
    chunk_steps: int
    replay_window: int
    tapes_per_session: int
    contributions_per_model: int
    operations_per_message: int
    tape_ttl_s: float

    @classmethod
    def from_limits(cls, limits: model_pb.Limits, max_message_bytes: int) -> Bounds:
        """Read a server's limits; the client's own message limit counts as well."""
        given = {name: getattr(limits, name) or default for name, default in _DEFAULTS.items()}
        given["message_bytes"] = min(given["message_bytes"], max_message_bytes)
        tape_ttl_s = limits.tape_ttl.ToNanoseconds() / 1e9 or _DEFAULT_TAPE_TTL_S
        return cls(**given, tape_ttl_s=tape_ttl_s)


def split_steps(steps: int, bounds: Bounds, *, step_bytes: int, state_bytes: int) -> list[slice]:
    """Cut T steps into as few chunks of about equal length as the bounds allow.

    Args:
        steps: T.
        bounds: The server's limits.
        step_bytes: Bytes of one step in the larger of the two messages.
        state_bytes: Bytes of one hidden state; a message carries up to two.

    Raises:
        MessageTooLarge: If not even one step fits.
    """
    room = bounds.message_bytes - 2 * state_bytes - _OVERHEAD_BYTES
    longest = min(bounds.chunk_steps, room // step_bytes)
    if longest < 1:
        raise errors.MessageTooLarge(
            f"one time step takes {step_bytes} bytes beside {2 * state_bytes} for states; a "
            f"message may hold {bounds.message_bytes}: use fewer batch rows"
        )
    if steps <= longest:
        return [slice(0, steps)]
    pieces = -(-steps // longest)
    cuts = [steps * i // pieces for i in range(pieces + 1)]
    return [slice(a, b) for a, b in pairwise(cuts)]
