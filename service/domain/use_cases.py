"""Everything that a transport may ask of the domain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.domain.backward import Backpropagation
    from service.domain.models import Models
    from service.domain.recurrence import Recurrence
    from service.domain.sessions import Sessions
    from service.domain.updates import Updates
    from service.domain.waiting import WaitingWork


@dataclass(frozen=True, slots=True)
class UseCases:
    """The operations, by the class that carries them out.

    Attributes:
        models: CreateModel, DeleteModel, uploads and downloads, checkpoints and their kin.
        sessions: OpenSession, ResetSession, ForkSession, CloseSession and their kin.
        recurrence: Forward.
        backpropagation: Backward.
        updates: Update.
        waiting: DiscardGradients and ListWaiting.
    """

    models: Models
    sessions: Sessions
    recurrence: Recurrence
    backpropagation: Backpropagation
    updates: Updates
    waiting: WaitingWork
