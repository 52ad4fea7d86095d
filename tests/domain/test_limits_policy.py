"""Quotas that differ from tenant to tenant: each is met by the tenant that it holds for alone."""

from __future__ import annotations

import asyncio
from dataclasses import MISSING, fields, replace
from typing import TYPE_CHECKING, NamedTuple

import pytest_asyncio

from instruments.replicas import HIDDEN, INPUTS, Client, draw, open_on, refusal
from rnn_engine import SGD, TanhNetwork
from service.domain.limits_policy import SameLimits, TenantLimits
from service.domain.types import InitialWeights, ModelKey, ModelSpec
from service.settings import Limits

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import numpy as np

    from instruments.replicas import Replica
    from service.domain.errors import DomainError
    from tests.domain.conftest import ReplicaMaker

USUAL = TenantLimits.from_limits(Limits())
TIGHT = TenantLimits(
    sessions_per_tenant=1,
    models_per_tenant=1,
    tapes_per_session=1,
    counted_tapes_per_session=1,
    counted_tape_bytes_per_session=1,
    contributions_per_model=1,
    contribution_bytes_per_model=1 << 20,
    superseded_bytes_per_model=1,
    checkpoints_per_model=1,
)


class OneIsTight:
    """A policy under which one tenant has less than the others."""

    def __init__(self, tight: str) -> None:
        self._tight = tight

    def of(self, tenant: str) -> TenantLimits:
        """Return the quotas of a tenant."""
        return TIGHT if tenant == self._tight else USUAL


class Scene(NamedTuple):
    """A replica with two tenants, each with a model `m` and a session `s` on it."""

    replica: Replica
    tight: Client
    usual: Client

    async def both(self, call: Callable[[Client], Awaitable[object]]) -> tuple[DomainError, object]:
        """Make a call for each: return the refusal of the tight one, and the other's answer."""
        return await refusal(call(self.tight)), await call(self.usual)


async def create(replica: Replica, tenant: str, model_id: str) -> None:
    """Create a model."""
    spec = ModelSpec(model_id, TanhNetwork(INPUTS, HIDDEN), "float32", SGD())
    await replica.models.create(tenant, spec, InitialWeights(), request_id="")


@pytest_asyncio.fixture
async def scene(make_replica: ReplicaMaker, tenant: str) -> Scene:
    """A replica whose policy knows two tenants."""
    tight, usual = f"{tenant}-tight", f"{tenant}-usual"
    replica = await make_replica(policy=OneIsTight(tight))
    clients = []
    for name in (tight, usual):
        await create(replica, name, "m")
        opened = await open_on(replica, name)
        clients.append(Client([replica], name, "s", opened.session.epoch))
    return Scene(replica, *clients)


async def test_sessions_are_counted_by_the_quota_of_their_tenant(scene: Scene) -> None:
    """The second session of the one is MAX_SESSIONS with its quota, and of the other a session."""
    refused, _ = await scene.both(lambda client: open_on(scene.replica, client.tenant, "other"))
    assert (refused.reason, refused.metadata["limit"]) == ("MAX_SESSIONS", "1")


async def test_models_are_counted_by_the_quota_of_their_tenant(scene: Scene) -> None:
    """The second model of the one is MAX_MODELS with its quota, and of the other a model."""
    refused, _ = await scene.both(lambda client: create(scene.replica, client.tenant, "other"))
    assert (refused.reason, refused.metadata["limit"]) == ("MAX_MODELS", "1")


async def test_waiting_tapes_are_counted_by_the_quota_of_their_tenant(
    scene: Scene, rng: np.random.Generator
) -> None:
    """Of two chunks committed together the one is TAPE_QUOTA with its quota, the other applied."""
    xs = draw(rng)
    for client in (scene.tight, scene.usual):
        await client.forward(xs, train=True)
    refused, _ = await asyncio.gather(
        refusal(scene.tight.forward(xs, train=True)), scene.usual.forward(xs, train=True)
    )
    assert (refused.reason, refused.metadata["limit"]) == ("TAPE_QUOTA", "1")


async def test_consumed_tapes_are_kept_by_the_quota_of_their_tenant(
    scene: Scene, rng: np.random.Generator
) -> None:
    """A Backward is answered again from a consumed tape, unless its tenant may keep none that long."""
    xs, dhs = draw(rng), draw(rng, size=HIDDEN)
    for client in (scene.tight, scene.usual):
        await client.forward(xs, train=True)
        await client.backward(dhs)
        await client.forward(xs, train=True)
    refused, _ = await scene.both(lambda client: client.backward(dhs, 1))
    assert refused.reason == "TAPE_MISSING"


async def test_contributions_are_counted_by_the_quota_of_their_tenant(
    scene: Scene, rng: np.random.Generator
) -> None:
    """The second contribution of the one is TAPE_QUOTA with its quota, of the other recorded."""
    dhs = draw(rng, size=HIDDEN)
    for client in (scene.tight, scene.usual):
        await client.forward(draw(rng), train=True)
        await client.backward(dhs)
        await client.forward(draw(rng), train=True)
    refused, _ = await scene.both(lambda client: client.backward(dhs))
    assert refused.reason == "TAPE_QUOTA"
    assert "have reached 1 or" in refused.message


async def test_checkpoints_are_counted_by_the_quota_of_their_tenant(scene: Scene) -> None:
    """The second checkpoint of the one is MAX_CHECKPOINTS with its quota, of the other kept."""
    models = scene.replica.models
    for client in (scene.tight, scene.usual):
        await models.create_checkpoint(ModelKey(client.tenant, "m"), "c", None)
    refused, _ = await scene.both(
        lambda client: models.create_checkpoint(ModelKey(client.tenant, "m"), "d", None)
    )
    assert (refused.reason, refused.metadata["limit"]) == ("MAX_CHECKPOINTS", "1")


def test_without_a_policy_everyone_has_the_quotas_of_the_limits() -> None:
    """Each quota has a default under its own name in the limits."""
    names = [f.name for f in fields(TenantLimits) if f.default is MISSING]
    limits = replace(Limits(), **{name: 7 + i for i, name in enumerate(names)})
    quotas = SameLimits(limits).of("anyone")
    assert [getattr(quotas, name) for name in names] == [7 + i for i in range(9)]
