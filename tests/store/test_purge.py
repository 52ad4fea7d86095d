"""Erasing a tenant: all its keys go, and nobody else's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from instruments.replicas import HIDDEN, INPUTS, Client, draw, open_on, start_replica
from rnn_engine import SGD, TanhNetwork
from service.domain.limits_policy import TenantLimits
from service.domain.types import InitialWeights, ModelKey, ModelSpec
from service.settings import Limits
from service.store.embedded import EmbeddedStore
from service.store.purge import Purged, purge_tenant

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

from redis.asyncio import Redis


class Bounded:
    """Counts the bytes of everybody."""

    def of(self, tenant: str) -> TenantLimits:  # noqa: ARG002 - the same for everyone
        """Return the quotas."""
        return replace(
            TenantLimits.from_limits(Limits()),
            tape_bytes_per_tenant=1 << 30,
            contribution_bytes_per_tenant=1 << 30,
        )


async def test_a_tenant_is_erased_and_another_is_not(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Of what the one had no key is left, markers of closed sessions included; the other keeps all."""
    with EmbeddedStore(tmp_path) as own:
        replica = await start_replica(own.url, Limits(), policy=Bounded())
        raw = Redis.from_url(own.url)

        async def furnish(tenant: str, count: int) -> None:
            spec = ModelSpec("m", TanhNetwork(INPUTS, HIDDEN), "float32", SGD())
            await replica.models.create(tenant, spec, InitialWeights(), request_id="")
            await replica.models.create_checkpoint(ModelKey(tenant, "m"), "c", None)
            for number in range(count):
                opened = await open_on(replica, tenant, f"s{number}")
                client = Client([replica], tenant, f"s{number}", opened.session.epoch)
                await client.forward(draw(rng), train=True)
                await client.backward(draw(rng, size=HIDDEN))
                await client.forward(draw(rng), train=True)

        await furnish("other", 2)
        await replica.recurrence.drain()
        before = {key async for key in raw.scan_iter(count=1000)}
        await furnish("gone", 5)
        await replica.recurrence.drain()
        assert {key async for key in raw.scan_iter(count=1000)} > before

        assert await purge_tenant(replica.store, "gone") == Purged(models=1, sessions=5)
        assert {key async for key in raw.scan_iter(count=1000)} == before
        assert await purge_tenant(replica.store, "gone") == Purged(models=0, sessions=0)
        await raw.aclose()
        await replica.close()
