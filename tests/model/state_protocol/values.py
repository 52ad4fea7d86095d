"""What the model computes with: symbolic values, versions, refusals, and what must never happen."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

Name = tuple[str, int, int]
"""A contribution's name: whose it is, epoch and chunk."""


class Version(NamedTuple):
    """A weights version: its number and the digest of its content."""

    number: int
    digest: int


def mix(*parts: object) -> int:
    """Return a value that only the same parts give: in place of every computation and hash."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


class Refused(Exception):
    """A typed answer that says no.

    Attributes:
        reason: As in the table of errors.
        head: The head that a VERSION_CONFLICT names.
        epoch: The epoch that an EPOCH_FENCED names.
        is_recorded: Whether a TAPE_MISSING says that the contribution was recorded.
    """

    def __init__(
        self,
        reason: str,
        *,
        head: Version | None = None,
        epoch: int = 0,
        is_recorded: bool = False,
    ) -> None:
        super().__init__(reason)
        self.reason, self.head, self.epoch, self.is_recorded = reason, head, epoch, is_recorded


class CommandRefused(Exception):
    """The store refused a command before it ran: OOM, MISCONF, READONLY, NOREPLICAS."""


class ScriptRaised(Exception):
    """An error inside a script: it may or may not have done its work."""


class Violation(AssertionError):
    """The protocol has broken a promise."""


def require(truth: bool, text: str) -> None:  # noqa: FBT001 - reads as assert does
    """Raise a violation unless something holds."""
    if not truth:
        raise Violation(text)
