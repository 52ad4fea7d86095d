"""What is counted of a tenant's bytes: never more than it may keep, and exactly what is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import pytest_asyncio

from service.store import keys
from service.store.tenant_bytes import Counted, TenantBytes, Value

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from service.store.connect import Store

LONG_MS = 600_000


def name_of(number: int) -> bytes:
    """Return one of many names."""
    return number.to_bytes(32, "big")


class Scene:
    """A counter with a bound of 100 bytes a tenant."""

    def __init__(self, store: Store, raw: Redis, tenant: str) -> None:
        self.most: int | None = 100
        self.raw, self.tenant = raw, tenant
        self.sizes, self.ends = keys.tape_sizes_keys(tenant)
        runner = store.sessions._runner
        self.counter = TenantBytes(runner, keys.tape_sizes_keys, lambda _: self.most)

    async def reserve(self, *values: tuple[int, int], lasts_ms: int = LONG_MS) -> list[object]:
        """Count values: number and bytes."""
        return list(
            await self.counter.reserve(
                [Value(self.tenant, name_of(number), size, lasts_ms) for number, size in values]
            )
        )

    async def release(self, *numbers: int) -> None:
        """Count values no longer."""
        await self.counter.release(self.tenant, b"".join(map(name_of, numbers)))

    async def total(self) -> int:
        """Return the sum that is kept, once it is known to be that of the values."""
        sizes = {name: int(size) for name, size in (await self.raw.hgetall(self.sizes)).items()}
        total = sizes.pop(b"", 0)
        assert total == sum(sizes.values())
        assert set(sizes) == set(await self.raw.zrange(self.ends, 0, -1))
        return total


@pytest_asyncio.fixture
async def scene(opened: Store, raw: Redis, tenant: str) -> Scene:
    """A counter of the test's tenant."""
    return Scene(opened, raw, tenant)


@pytest.mark.parametrize(
    ("size", "last"), [(39, Counted.NEW), (40, Counted.NEW), (41, Counted.FULL)]
)
async def test_a_tenant_keeps_what_it_may_and_not_a_byte_more(
    scene: Scene, size: int, last: Counted
) -> None:
    """Up to the bound itself there is room; what does not fit is not counted."""
    assert await scene.reserve((1, 60), (2, size)) == [Counted.NEW, last]
    assert await scene.total() == (60 if last is Counted.FULL else 60 + size)


async def test_a_value_is_counted_once(scene: Scene) -> None:
    """Who comes again with the same value finds it counted, at the bound as well."""
    assert await scene.reserve((1, 100)) == [Counted.NEW]
    assert await scene.reserve((1, 100), (2, 1)) == [Counted.KNOWN, Counted.FULL]
    assert await scene.total() == 100


async def test_what_was_dropped_makes_room(scene: Scene) -> None:
    """It is counted no longer, however often that is said, and a name that nobody counted changes nothing."""
    await scene.reserve((1, 60), (2, 40))
    await scene.release(1, 3)
    await scene.release(1)
    assert await scene.total() == 40
    assert await scene.reserve((4, 60)) == [Counted.NEW]


async def test_what_is_gone_by_itself_makes_room(scene: Scene) -> None:
    """More lapses at once than one run drops; the next values find room all the same."""
    await scene.reserve((0, 1))
    assert set(await scene.reserve(*((n, 1) for n in range(1, 100)), lasts_ms=1)) == {Counted.NEW}
    end = float((await scene.raw.zrange(scene.ends, -2, -2, withscores=True))[0][1])

    async def is_over() -> bool:
        seconds, micros = await scene.raw.time()
        return 1000 * int(seconds) + int(micros) // 1000 >= end

    while not await is_over():
        pass
    assert await scene.reserve((100, 99)) == [Counted.NEW]
    assert await scene.total() == 100


async def test_the_keys_end_with_the_last_value(scene: Scene) -> None:
    """A tenant that has gone leaves nothing behind; a shorter value does not bring the end forward."""
    await scene.reserve((1, 1), lasts_ms=LONG_MS)
    await scene.reserve((2, 1), lasts_ms=1000)
    for key in (scene.sizes, scene.ends):
        assert LONG_MS - 60_000 < await scene.raw.pttl(key) <= LONG_MS


async def test_a_tenant_without_a_bound_is_not_counted(scene: Scene) -> None:
    """It costs the store nothing; a bound that comes later counts from then on."""
    scene.most = None
    assert await scene.reserve((1, 1000)) == [Counted.UNBOUNDED]
    await scene.release(1)
    assert not await scene.raw.exists(scene.sizes, scene.ends)
    scene.most = 10
    assert await scene.reserve((1, 10), (2, 1)) == [Counted.NEW, Counted.FULL]


async def test_the_sum_is_that_of_the_values_whatever_comes(scene: Scene) -> None:
    """Values that come, come again, lapse and are dropped in a random order leave the right sum."""
    rng = np.random.default_rng(13)
    for _ in range(100):
        number, size = int(rng.integers(20)), int(rng.integers(1, 40))
        if rng.random() < 0.3:
            await scene.release(number)
        else:
            await scene.reserve((number, size), lasts_ms=int(rng.choice([1, LONG_MS])))
        assert await scene.total() <= 100
