"""Two replicas over one store, and what makes models and sessions on them."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from instruments.replicas import HIDDEN, INPUTS, Client, open_on, start_replica
from rnn_engine import SGD, TanhNetwork
from service.domain.types import InitialWeights, ModelSpec
from service.settings import Limits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from instruments.replicas import Replica
    from rnn_engine.optimizers import Optimizer

ModelMaker: TypeAlias = "Callable[..., Awaitable[ModelSpec]]"
ReplicaMaker: TypeAlias = "Callable[..., Awaitable[Replica]]"
ClientMaker: TypeAlias = "Callable[..., Awaitable[Client]]"


@pytest_asyncio.fixture
async def make_replica(store_url: str) -> AsyncIterator[ReplicaMaker]:
    """Start replicas that end with the test."""
    async with AsyncExitStack() as stack:

        async def make(limits: Limits | None = None, **options: Any) -> Replica:
            replica = await start_replica(
                options.pop("url", store_url), limits or Limits(), **options
            )
            stack.push_async_callback(replica.close)
            return replica

        yield make


@pytest_asyncio.fixture
async def replicas(make_replica: ReplicaMaker) -> tuple[Replica, Replica]:
    """Two replicas over one store."""
    return await make_replica(), await make_replica()


@pytest_asyncio.fixture
async def raw(store_url: str) -> AsyncIterator[Redis]:
    """A plain connection to the store, to inspect and to break it."""
    async with Redis.from_url(store_url) as client:
        yield client


@pytest.fixture
def make_model(replicas: tuple[Replica, Replica], tenant: str) -> ModelMaker:
    """Create models under the test's tenant."""

    async def make(
        model_id: str = "m",
        *,
        optimizer: Optimizer | None = None,
        dtype: str = "float32",
        sizes: tuple[int, int] = (INPUTS, HIDDEN),
        seed: int = 1,
    ) -> ModelSpec:
        spec = ModelSpec(model_id, TanhNetwork(*sizes), dtype, optimizer or SGD(lr=0.1))
        await replicas[0].models.create(tenant, spec, InitialWeights(seed=seed), request_id="")
        return spec

    return make


@pytest.fixture
def open_session(replicas: tuple[Replica, Replica], tenant: str) -> ClientMaker:
    """Open sessions under the test's tenant, each with a client."""

    async def make(session_id: str = "s", model_id: str = "m", **options: Any) -> Client:
        opened = await open_on(replicas[0], tenant, session_id, model_id, **options)
        return Client(replicas, tenant, session_id, opened.session.epoch)

    return make
