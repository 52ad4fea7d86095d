"""The client's log of answered operations, and what each of them promised."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from state_protocol.messages import (
    Backward,
    BackwardAnswer,
    BeginEpoch,
    EpochAnswer,
    Forward,
    ForwardAnswer,
    Update,
    UpdateAnswer,
)
from state_protocol.values import Refused

if TYPE_CHECKING:
    from state_protocol.messages import Answer, Request
    from state_protocol.values import Name, Version


@dataclass(frozen=True, slots=True)
class Entry:
    """One answered operation, ready to be sent again.

    Attributes:
        request: The same numbers and content; a Forward pins the version that its answer named.
        promised: What the first answer said and a later one must say again.
        sent_at: When it was first sent, on the client's clock.
        head: The newest version that the client knew then.
    """

    request: Request
    promised: object
    sent_at: float
    head: Version

    def confirm(self, answer: Answer) -> None:
        """Compare a later answer with the first one."""
        if promised_by(answer) != self.promised:
            raise Refused("HISTORY_FORKED")


class Log:
    """The answered operations, in the order of their answers.

    Attributes:
        entries: What can be sent again.
        makers: The version whose Update took a contribution, by the contribution's name.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.makers: dict[Name, Version] = {}

    def append(self, entry: Entry, answer: Answer) -> None:
        """Add an answered operation."""
        self.entries.append(entry)
        if isinstance(entry.request, Update):
            assert isinstance(answer, UpdateAnswer)
            self.makers.update(dict.fromkeys(entry.request.names, answer.version))


def promised_by(answer: Answer) -> object:
    """Return what an answer says that must never be said otherwise."""
    if isinstance(answer, ForwardAnswer):
        return (answer.h, answer.token)
    if isinstance(answer, BackwardAnswer):
        return (answer.gradient,)
    if isinstance(answer, UpdateAnswer):
        return (answer.version,)
    assert isinstance(answer, EpochAnswer)
    return (answer.epoch,)


def as_sent_again(request: Request, answer: Answer, *, is_pinned: bool) -> Request:
    """Return an answered request as healing sends it."""
    if isinstance(request, Forward):
        assert isinstance(answer, ForwardAnswer)
        pinned = answer.version if is_pinned else None
        return replace(request, minimum=None, pinned=pinned)
    if isinstance(request, Backward):
        return replace(request, update=None, is_resent=True)
    if isinstance(request, BeginEpoch):
        assert isinstance(answer, EpochAnswer)
        return BeginEpoch("", request.state, restored_epoch=answer.epoch)
    return request
