"""Erases everything that a tenant has in the store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from service.domain.types import ModelKey

if TYPE_CHECKING:
    from service.store.connect import Store

PAGE: Final = 100  # model names that are read at once


@dataclass(frozen=True, slots=True)
class Purged:
    """How much there was.

    Attributes:
        models: Models.
        sessions: Live sessions.
    """

    models: int
    sessions: int


async def purge_tenant(store: Store, tenant: str) -> Purged:
    """Erase the models of a tenant with all that belongs to them, then its sessions with their tapes.

    The models go first: without them no session can be opened. What was staged and never used, and the weights of a
    creation that did not end, expire by themselves.

    Raises:
        UnsupportedLayout: If another release laid out something, which only that release can erase whole.
        Unavailable: If the store fails; the same call goes on where this one ended.
    """
    models, after = 0, ""
    while names := await store.models.list_models(tenant, after, PAGE):
        after = names[-1]
        for name in names:
            key = ModelKey(tenant, name)
            record = await store.models.read_model(key)
            # A name without a model was left by a creation that did not end; deleting takes it off the list.
            incarnation = record.incarnation if record else b""
            models += await store.models.delete_model(key, incarnation)
    sessions = await store.sessions.erase_sessions(tenant)
    await store.models.forget_sizes(tenant)
    return Purged(models, sessions)
