"""Everything that a transport may ask of the domain, and how its parts are put together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from service.domain.backward import Backpropagation
from service.domain.carrying import Carrier
from service.domain.contributions import Contributions
from service.domain.models import Models
from service.domain.publisher import VersionPublisher
from service.domain.recent_steps import RecentSteps
from service.domain.recurrence import Recurrence
from service.domain.rules import InputRules
from service.domain.session_tapes import SessionTapes
from service.domain.sessions import Sessions
from service.domain.updates import Updates
from service.domain.waiting import WaitingWork
from service.telemetry import NULL_OBSERVER

if TYPE_CHECKING:
    from service.compute.scheduler import Scheduler
    from service.domain.limits_policy import LimitsPolicy
    from service.domain.model_cache import ModelCache
    from service.domain.ports import ModelStore, SessionStore
    from service.domain.session_cache import SessionCache
    from service.domain.tapes import TapeCache
    from service.settings import Limits
    from service.telemetry import Observer


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
        recent_steps: What an Update or a Backward with one has made of each model lately.
        carrier: What they have begun and goes on although its caller is gone.
    """

    models: Models
    sessions: Sessions
    recurrence: Recurrence
    backpropagation: Backpropagation
    updates: Updates
    waiting: WaitingWork
    recent_steps: RecentSteps = field(default_factory=RecentSteps)
    carrier: Carrier = field(default_factory=Carrier)

    async def drain(self) -> None:
        """Wait until all that was begun has ended, whether or not somebody waits for it."""
        await self.recurrence.drain()
        await self.carrier.drain()


@dataclass(frozen=True, slots=True)
class Caches:
    """What a process remembers of the store, so that a warm chunk reads nothing."""

    models: ModelCache
    sessions: SessionCache
    tapes: TapeCache


def build_use_cases(
    sessions: SessionStore,
    models: ModelStore,
    caches: Caches,
    *,
    scheduler: Scheduler,
    limits: Limits,
    policy: LimitsPolicy,
    observer: Observer = NULL_OBSERVER,
) -> UseCases:
    """Put the domain together over a store, caches and a scheduler."""
    rules, recent_steps, carrier = InputRules(limits), RecentSteps(), Carrier()
    publisher = VersionPublisher(
        models,
        caches.models,
        scheduler,
        carrier=carrier,
        observer=observer,
        steps=recent_steps,
    )
    contributions = Contributions(
        models,
        policy,
        cache_bytes=limits.contribution_bytes_per_model // 4,
        observer=observer,
    )
    session_tapes = SessionTapes(
        sessions,
        caches.tapes,
        model_cache=caches.models,
        contributions=contributions,
        carrier=carrier,
    )
    updates = Updates(
        contributions, publisher, model_cache=caches.models, scheduler=scheduler, rules=rules
    )
    return UseCases(
        models=Models(
            models,
            caches.models,
            publisher,
            carrier=carrier,
            scheduler=scheduler,
            rules=rules,
            policy=policy,
        ),
        sessions=Sessions(
            sessions,
            caches.models,
            caches.sessions,
            carrier=carrier,
            rules=rules,
            policy=policy,
        ),
        recurrence=Recurrence(
            sessions,
            model_cache=caches.models,
            session_cache=caches.sessions,
            tapes=caches.tapes,
            scheduler=scheduler,
            rules=rules,
            policy=policy,
            observer=observer,
        ),
        backpropagation=Backpropagation(
            session_tapes,
            contributions,
            updates,
            model_cache=caches.models,
            scheduler=scheduler,
            rules=rules,
        ),
        updates=updates,
        waiting=WaitingWork(sessions, caches.models, contributions, rules=rules),
        recent_steps=recent_steps,
        carrier=carrier,
    )
