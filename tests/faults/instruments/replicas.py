"""Replicas of the domain over a real store, a client that numbers its chunks, a store that loses writes.

A replica here is what one server process has, wired as the service does it, without the transport.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from rnn_engine import Params, TimeRNN
from service.compute.scheduler import Scheduler
from service.domain.errors import DomainError
from service.domain.limits_policy import SameLimits
from service.domain.model_cache import ModelCache
from service.domain.session_cache import SessionCache
from service.domain.tapes import TapeCache
from service.domain.types import (
    Backward,
    Forward,
    ModelKey,
    OnExists,
    OpenSession,
    Reduction,
    Selector,
    SessionKey,
    Update,
)
from service.domain.use_cases import Caches, build_use_cases
from service.domain.weights import weights_from_bytes
from service.settings import MIB, Settings
from service.store import keys
from service.store.connect import open_store
from service.telemetry import NULL_OBSERVER

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    import numpy as np
    from redis.asyncio import Redis

    from rnn_engine import Array
    from service.domain.backward import Backpropagation
    from service.domain.limits_policy import LimitsPolicy
    from service.domain.models import Models
    from service.domain.recurrence import Recurrence
    from service.domain.sessions import Sessions
    from service.domain.types import (
        BackwardResult,
        ForwardResult,
        ModelSpec,
        OpenedSession,
        UpdateResult,
        Version,
    )
    from service.domain.updates import Updates
    from service.domain.waiting import WaitingWork
    from service.settings import Limits
    from service.store.connect import Store
    from service.telemetry import Observer

T = TypeVar("T")
INPUTS, HIDDEN, ROWS = 3, 4, 2


@dataclass
class Replica:
    """One server process, as far as the domain is concerned."""

    store: Store
    caches: Caches
    scheduler: Scheduler
    limits: Limits
    models: Models
    sessions: Sessions
    recurrence: Recurrence
    backpropagation: Backpropagation
    updates: Updates
    waiting: WaitingWork
    drain: Callable[[], Awaitable[None]]

    async def close(self) -> None:
        """Let what was begun end, then the threads and the connections."""
        await self.drain()
        self.scheduler.close()
        await self.store.close()


def patient(limits: Limits) -> Settings:
    """Return settings for a busy machine, where a slow store is no sign of anything."""
    return Settings(limits=limits, store_timeout_ms=20_000)


async def start_replica(
    url: str,
    limits: Limits,
    *,
    head_max_age_ms: int = 0,
    clock: Callable[[], float] = time.monotonic,
    disturb: Callable[[Any], object] = lambda client: client,
    observer: Observer = NULL_OBSERVER,
    policy: LimitsPolicy | None = None,
) -> Replica:
    """Wire a replica as the service does; by default it asks for the head each time."""
    policy = policy or SameLimits(limits)
    store = await open_store(url, patient(limits), observer, policy=policy)
    disturb(store._client)
    caches = Caches(
        ModelCache(store.models, head_max_age_ms, 64 * MIB, clock=clock, observer=observer),
        SessionCache(16 * MIB),
        TapeCache(16 * MIB),
    )
    observer.cache_added("sessions", caches.sessions.counts)
    observer.cache_added("tapes", caches.tapes.counts)
    scheduler = Scheduler(1024, observer=observer)
    use_cases = build_use_cases(
        store.sessions,
        store.models,
        caches,
        scheduler=scheduler,
        limits=limits,
        policy=policy,
        observer=observer,
    )
    return Replica(
        store,
        caches,
        scheduler,
        limits,
        models=use_cases.models,
        sessions=use_cases.sessions,
        recurrence=use_cases.recurrence,
        backpropagation=use_cases.backpropagation,
        updates=use_cases.updates,
        waiting=use_cases.waiting,
        drain=use_cases.drain,
    )


@dataclass
class Client:
    """A client of one session: it numbers chunks, keeps the token, and changes replica at each call."""

    replicas: Sequence[Replica]
    tenant: str
    session_id: str
    epoch: int
    chunk_seq: int = 0
    token: bytes = b""
    calls: int = 0
    tokens: dict[int, bytes] = field(default_factory=dict)

    @property
    def next_replica(self) -> Replica:
        """The replica whose turn it is."""
        self.calls += 1
        return self.replicas[self.calls % len(self.replicas)]

    def chunk(self, xs: Array, chunk_seq: int = 0, **options: Any) -> Forward:
        """Lay out the next chunk, or the one numbered."""
        return Forward(
            self.session_id,
            options.pop("epoch", self.epoch),
            chunk_seq or self.chunk_seq + 1,
            options.pop("previous_token", self.token),
            xs,
            **options,
        )

    async def forward(self, xs: Array, **options: Any) -> ForwardResult:
        """Apply the next chunk and go on from its answer."""
        done = await self.next_replica.recurrence.forward(self.tenant, self.chunk(xs, **options))
        self.chunk_seq, self.token = done.chunk_seq, done.token
        self.tokens[done.chunk_seq] = done.token
        return done

    def gradient(self, dhs: Array, chunk_seq: int = 0, **options: Any) -> Backward:
        """Lay out the Backward of the last chunk, or of the one numbered."""
        chunk_seq = chunk_seq or self.chunk_seq
        token = options.pop("token", None) or self.tokens[chunk_seq]
        epoch = options.pop("epoch", self.epoch)
        return Backward(self.session_id, epoch, chunk_seq, token, dhs, **options)

    async def backward(self, dhs: Array, chunk_seq: int = 0, **options: Any) -> BackwardResult:
        """Leave the contribution of a chunk."""
        op = self.gradient(dhs, chunk_seq, **options)
        return await self.next_replica.backpropagation.backward(self.tenant, op)

    async def update(
        self,
        model_id: str,
        request_id: str,
        *chunk_seqs: int,
        expected: Version | None = None,
        clip_norm: float = 0.0,
    ) -> UpdateResult:
        """Make a step from chunks of this session."""
        named = Selector(self.session_id, self.epoch, chunk_seqs or (self.chunk_seq,))
        op = step(model_id, request_id, named, expected=expected, clip_norm=clip_norm)
        return await self.next_replica.updates.update(self.tenant, op)


def step(
    model_id: str,
    request_id: str,
    *selectors: Selector,
    expected: Version | None = None,
    clip_norm: float = 0.0,
    learning_rate: float | None = None,
    reduction: Reduction = Reduction.SUM,
) -> Update:
    """Lay out an Update; without selectors it takes all that waits."""
    return Update(
        model_id, tuple(selectors), reduction, learning_rate, clip_norm, expected, request_id
    )


async def open_on(
    replica: Replica, tenant: str, session_id: str = "s", model_id: str = "m", **options: Any
) -> OpenedSession:
    """Open a session on one replica."""
    return await replica.sessions.open(
        tenant,
        OpenSession(
            model_id,
            session_id,
            options.pop("batch_size", ROWS),
            options.pop("initial_state", None),
            options.pop("ttl_ms", None),
            options.pop("on_exists", OnExists.FAIL),
            options.pop("request_id", ""),
            options.pop("restored_epoch", 0),
        ),
    )


async def local_rnn(replica: Replica, tenant: str, spec: ModelSpec) -> TimeRNN:
    """Return the classic layer with a copy of the model's head."""
    params = await head_params(replica, tenant, spec)
    return TimeRNN(params.Wx.copy(), params.Wh.copy(), params.b.copy(), stateful=True)


async def head_params(replica: Replica, tenant: str, spec: ModelSpec) -> Params:
    """Read the head's weights from the store, past every cache."""
    record = await replica.store.models.read_model(ModelKey(tenant, spec.model_id))
    assert record is not None
    data = await replica.store.models.read_weights(
        ModelKey(tenant, spec.model_id), record.incarnation, record.head
    )
    assert data is not None
    return Params(*weights_from_bytes(spec, data))


async def head_of(replica: Replica, tenant: str, model_id: str = "m") -> Version:
    """Read the head's name from the store."""
    return (await replica.models.get(ModelKey(tenant, model_id))).head


def draw(rng: np.random.Generator, steps: int = 3, **options: Any) -> Array:
    """Draw a chunk of inputs, or with `size=HIDDEN` of gradients."""
    shape = (options.get("rows", ROWS), steps, options.get("size", INPUTS))
    drawn: Array = rng.standard_normal(shape).astype(options.get("dtype", "float32"))
    return drawn


def present(value: T | None) -> T:
    """Return what an answer was asked to carry."""
    assert value is not None
    return value


async def refusal(call: Awaitable[object]) -> DomainError:
    """Return the refusal that a call ends in."""
    with pytest.raises(DomainError) as caught:
        await call
    return caught.value


async def keys_of(raw: Redis, tag: bytes) -> list[bytes]:
    """Return every key of a slot, sorted."""
    return sorted([key async for key in raw.scan_iter(match=tag + b"*", count=1000)])


async def session_keys(raw: Redis, tenant: str, session_id: str = "s") -> list[bytes]:
    """Return what a session's keys have after its tag: nothing for the record, e, t, t + name."""
    tag = keys.session_tag(SessionKey(tenant, session_id))
    return [key.removeprefix(tag) for key in await keys_of(raw, tag)]


@dataclass(frozen=True)
class Backup:
    """A slot as it was: what a failover goes back to that lost the writes since."""

    tag: bytes
    entries: dict[bytes, tuple[bytes, int]]

    @classmethod
    async def take(cls, raw: Redis, tag: bytes) -> Backup:
        """Remember every key of a slot with its time to live."""
        found = await keys_of(raw, tag)
        async with raw.pipeline() as pipeline:
            for key in found:
                pipeline.dump(key)
                pipeline.pttl(key)
            answers = await pipeline.execute()
        values = zip(found, answers[::2], answers[1::2], strict=True)
        return cls(tag, {key: (data, max(0, ttl)) for key, data, ttl in values if data is not None})

    async def restore(self, raw: Redis) -> None:
        """Put the slot back, at one stroke."""
        found = await keys_of(raw, self.tag)
        async with raw.pipeline() as pipeline:
            for key in found:
                pipeline.delete(key)
            for key, (data, ttl_ms) in self.entries.items():
                pipeline.restore(key, ttl_ms, data)
            await pipeline.execute()
