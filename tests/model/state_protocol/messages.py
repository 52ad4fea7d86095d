"""What the client asks and what a replica answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from state_protocol.values import Name, Refused, Version


@dataclass(slots=True)
class Forward:
    """Apply a chunk.

    Attributes:
        epoch: The session's.
        seq: The chunk's number.
        previous_token: Of the answer before it; None: unchecked.
        payload: The inputs.
        pinned: The version to use, and no other.
        minimum: The oldest head that may be used.
    """

    epoch: int
    seq: int
    previous_token: int | None
    payload: str
    pinned: Version | None = None
    minimum: Version | None = None


@dataclass(slots=True)
class Update:
    """Make a step.

    Attributes:
        request_id: Names the request.
        expected: The head that must be there; None: any.
        names: The contributions to take; empty: all that wait.
    """

    request_id: str
    expected: Version | None
    names: tuple[Name, ...]


@dataclass(slots=True)
class Backward:
    """Count a chunk's gradient.

    Attributes:
        name: The contribution's: whose it is, epoch and chunk.
        token: Of its Forward's answer.
        dhs: The gradient of the outputs.
        update: A step to make right after.
        is_resent: By healing: the chunk's epoch may have ended since.
    """

    name: Name
    token: int
    dhs: str
    update: Update | None = None
    is_resent: bool = False


@dataclass(slots=True)
class BeginEpoch:
    """Begin an epoch: SetState, ResetState, or an Open that restores one.

    Attributes:
        request_id: Names the request; empty for an Open that restores.
        state: The new state.
        expected_epoch: The epoch that it ends; 0: any.
        expected_seq: The last chunk of that; -1: any.
        restored_epoch: The number that the epoch had before it was lost; 0: a new one.
    """

    request_id: str
    state: str
    expected_epoch: int = 0
    expected_seq: int = -1
    restored_epoch: int = 0


@dataclass(slots=True)
class ReadModel:
    """Read the head, and which versions are kept."""


Request: TypeAlias = Forward | Backward | Update | BeginEpoch | ReadModel


@dataclass(frozen=True, slots=True)
class ForwardAnswer:
    """A chunk was applied: its last state, the version it used, and its token."""

    h: object
    version: Version
    token: int
    is_replayed: bool = False


@dataclass(frozen=True, slots=True)
class UpdateAnswer:
    """A step was made."""

    version: Version
    is_replayed: bool = False


@dataclass(frozen=True, slots=True)
class BackwardAnswer:
    """A contribution was recorded.

    Attributes:
        gradient: The gradient of the weights.
        step: What came of the step that was asked for; None where none was.
        is_replayed: Whether it had been recorded before.
    """

    gradient: int
    step: UpdateAnswer | Refused | None = None
    is_replayed: bool = False


@dataclass(frozen=True, slots=True)
class EpochAnswer:
    """An epoch has begun."""

    epoch: int
    token: int
    is_replayed: bool = False


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """The head, and the digest of each version that is kept, by number."""

    head: Version
    kept: dict[int, int]
    is_replayed: bool = True


Answer: TypeAlias = ForwardAnswer | BackwardAnswer | UpdateAnswer | EpochAnswer | ModelAnswer
