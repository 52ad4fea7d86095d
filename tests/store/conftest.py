"""A store's two ports over the run's server, and a plain connection beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from instruments.replicas import patient
from service.settings import Limits
from service.store.connect import open_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from service.store.connect import Store


@pytest.fixture
def limits() -> Limits:
    """The limits that the scripts get; a module may have its own."""
    return Limits()


@pytest_asyncio.fixture
async def opened(store_url: str, limits: Limits) -> AsyncIterator[Store]:
    """An open store on the test's server."""
    store = await open_store(store_url, patient(limits))
    yield store
    await store.close()


@pytest_asyncio.fixture
async def raw(store_url: str) -> AsyncIterator[Redis]:
    """A plain connection to the store, to inspect and to break it."""
    async with Redis.from_url(store_url) as client:
        yield client
