"""The models that this replica has seen: their heads for a moment, their weights while they are used.

A head is served for at most `head_max_age_ms`; weights are immutable, so they are kept by name.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rnn_engine import init_moments
from service.domain.lru import LruCache
from service.domain.refusals import model_not_found, version_gone, weights_forked
from service.domain.weights import (
    moments_from_bytes,
    spec_from_bytes,
    weights_from_bytes,
)
from service.telemetry import NULL_OBSERVER, CacheCounts

if TYPE_CHECKING:
    from collections.abc import Callable

    from rnn_engine import Moments, Network, Prepared, Weights
    from service.domain.ports import ModelRecord, ModelStore
    from service.domain.types import ModelKey, ModelSpec, Version
    from service.telemetry import Observer

    WeightsName = tuple[bytes, Version]


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model as this replica last read it."""

    key: ModelKey
    spec: ModelSpec
    incarnation: bytes
    head: Version
    record: ModelRecord
    read_at: float  # by the model_cache's clock, taken before the read


@dataclass(frozen=True, slots=True, eq=False)
class LoadedWeights:
    """A version's weights in memory.

    Attributes:
        network: What they are the weights of.
        weights: As an optimizer takes them.
        prepared: As the network's passes take them; derived once, never stored.
    """

    network: Network
    weights: Weights
    prepared: Prepared


class ModelCache:
    """Gives heads, weights and moments, mostly without a read of the store."""

    def __init__(
        self,
        store: ModelStore,
        head_max_age_ms: int,
        weights_limit_bytes: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        observer: Observer = NULL_OBSERVER,
    ) -> None:
        """Keep weights up to the limit and heads up to their age."""
        self._store = store
        self._max_age_s = head_max_age_ms / 1000
        self._clock = clock
        self._models: OrderedDict[ModelKey, KnownModel] = OrderedDict()
        self._reading: dict[ModelKey, asyncio.Task[KnownModel]] = {}
        self._weights: LruCache[WeightsName, LoadedWeights] = LruCache(
            weights_limit_bytes, _weights_bytes
        )
        # Of each model's head.
        self._moments: LruCache[ModelKey, tuple[Version, Moments]] = LruCache(
            weights_limit_bytes, _moments_bytes
        )
        self._head_counts = CacheCounts()
        observer.cache_added("heads", self._head_counts)
        observer.cache_added("weights", self._weights.counts)
        observer.cache_added("moments", self._moments.counts)

    def now(self) -> float:
        """Return the time by which a head's age is measured."""
        return self._clock()

    def get_cached(self, key: ModelKey) -> KnownModel | None:
        """Return a model whose head is fresh enough; past half of its age, start to read it again."""
        model = self._models.get(key)
        if model is None:
            self._head_counts.misses += 1
            return None
        age_s = self._clock() - model.read_at
        if age_s > self._max_age_s:
            self._head_counts.misses += 1
            return None
        self._head_counts.hits += 1
        if age_s > self._max_age_s / 2:
            self.start_reading(key)
        return model

    def spec(self, key: ModelKey) -> ModelSpec | None:
        """Return a model's specification if this process has seen it, however old its head."""
        model = self._models.get(key)
        return None if model is None else model.spec

    async def get(self, key: ModelKey, *, fresh: bool = False) -> KnownModel:
        """Return a model; `fresh` means read after this call began.

        Raises:
            NotFound: MODEL_NOT_FOUND.
            UnsupportedLayout: If its specification has a layout of another release.
        """
        if not fresh:
            model = self.get_cached(key)
            if model is not None:
                return model
            return await asyncio.shield(self.start_reading(key))
        return await self._read(key)

    async def get_incarnation(self, key: ModelKey, incarnation: bytes) -> KnownModel:
        """Return the model in the incarnation that a session was opened with.

        Raises:
            NotFound: MODEL_NOT_FOUND, also when the name belongs to a new incarnation.
        """
        model = await self.get(key)
        if model.incarnation != incarnation:
            model = await self.get(key, fresh=True)
        return _same_incarnation(model, incarnation)

    async def renew(self, model: KnownModel) -> KnownModel:
        """Read a model again.

        Raises:
            NotFound: MODEL_NOT_FOUND, also when the name belongs to a new incarnation.
        """
        renewed = await self.get(model.key, fresh=True)
        return _same_incarnation(renewed, model.incarnation)

    async def head_at_least(self, model: KnownModel, minimum: Version) -> KnownModel:
        """Return the model with a head that is the minimum or later, read again if need be.

        Raises:
            NotFound: VERSION_GONE if the true head is older; MODEL_NOT_FOUND.
            FailedPrecondition: WEIGHTS_FORKED if the head has that number and other content.
        """
        if not is_at_least(model.head, minimum):
            model = await self.renew(model)
        if model.head.number < minimum.number:
            raise version_gone(minimum, model.head)
        if not is_at_least(model.head, minimum):
            raise weights_forked(minimum, model.head)
        return model

    def cached_weights(self, incarnation: bytes, version: Version) -> LoadedWeights | None:
        """Return weights that this process holds."""
        return self._weights.get((incarnation, version))

    async def weights(self, model: KnownModel, version: Version) -> tuple[Version, LoadedWeights]:
        """Return a version's full name and weights; its digest may be left empty.

        Raises:
            NotFound: VERSION_GONE.
            FailedPrecondition: WEIGHTS_FORKED if the number has other content.
        """
        cached = self._weights.get((model.incarnation, version))
        if cached is not None:
            return version, cached
        found = await self._store.find_version(model.key, version.number)
        if found is None:
            raise version_gone(version, model.head)
        if not version.names(found):
            raise weights_forked(version, found)
        data = await self._store.read_weights(model.key, model.incarnation, found)
        if data is None:
            raise version_gone(version, model.head)
        return found, self._load(model, found, weights_from_bytes(model.spec, data))

    def cached_moments(self, model: KnownModel) -> Moments | None:
        """Return the moments of a model's head if this process holds them."""
        known = self._moments.get(model.key)
        return known[1] if known is not None and known[0] == model.head else None

    async def moments(self, model: KnownModel, version: Version, weights: Weights) -> Moments:
        """Return a version's moments; zero where they were not kept."""
        kept = await self.kept_moments(model, version, weights)
        return init_moments(model.spec.optimizer, weights) if kept is None else kept

    async def kept_moments(
        self, model: KnownModel, version: Version, weights: Weights
    ) -> Moments | None:
        """Return a version's moments; None where they were not kept."""
        known = self._moments.get(model.key)
        if known is not None and known[0] == version:
            return known[1]
        data = await self._store.read_moments(model.key, model.incarnation, version)
        return moments_from_bytes(model.spec, weights, data) if data else None

    def note_head(
        self,
        model: KnownModel,
        version: Version,
        *,
        weights: Weights,
        moments: Moments,
        asked_at: float,
    ) -> None:
        """Cache a version that this process published.

        Another version may have become the head since, so the age of this one counts from `asked_at`,
        when its publication was sent to the store (seconds, by `now()`).
        """
        self._load(model, version, weights)
        self._moments.put(model.key, (version, moments))
        self._learn(replace(model, head=version, read_at=asked_at))

    def forget(self, key: ModelKey) -> None:
        """Forget a model that was deleted."""
        self._models.pop(key, None)
        self._moments.drop(key)

    def start_reading(self, key: ModelKey) -> asyncio.Task[KnownModel]:
        """Read a model once for all who wait for it, or join the read under way."""
        reading = self._reading.get(key)
        if reading is None:
            reading = asyncio.create_task(self._read(key))
            self._reading[key] = reading
            reading.add_done_callback(lambda done: self._stop_reading(key, done))
        return reading

    async def drain(self) -> None:
        """Wait until no read is under way; nobody awaits a read ahead."""
        while self._reading:
            await asyncio.wait(self._reading.values())

    def _load(self, model: KnownModel, version: Version, weights: Weights) -> LoadedWeights:
        network = model.spec.network
        loaded = LoadedWeights(network, weights, network.prepare(weights))
        self._weights.put((model.incarnation, version), loaded)
        return loaded

    def _stop_reading(self, key: ModelKey, done: asyncio.Task[KnownModel]) -> None:
        del self._reading[key]
        if not done.cancelled():
            # Those who wait get the exception. Nothing waits for a read ahead: without this, asyncio
            # would log that its exception was never retrieved.
            done.exception()

    async def _read(self, key: ModelKey) -> KnownModel:
        read_at = self._clock()
        record = await self._store.read_model(key)
        if record is None:
            self.forget(key)
            raise model_not_found(key.model_id)
        spec = spec_from_bytes(record.spec)
        model = KnownModel(key, spec, record.incarnation, record.head, record, read_at)
        self._learn(model)
        return model

    def _learn(self, model: KnownModel) -> None:
        known = self._models.get(model.key)
        if known is not None and known.read_at > model.read_at:
            return
        self._models[model.key] = model
        self._models.move_to_end(model.key)
        while len(self._models) > 4096:
            self._models.popitem(last=False)


def _weights_bytes(loaded: LoadedWeights) -> int:
    return loaded.weights.nbytes


def _moments_bytes(known: tuple[Version, Moments]) -> int:
    return 1024 + known[1].nbytes


def _same_incarnation(model: KnownModel, incarnation: bytes) -> KnownModel:
    if model.incarnation != incarnation:
        why = "it was deleted and created again meanwhile"
        raise model_not_found(model.spec.model_id, why)
    return model


def is_at_least(head: Version, minimum: Version) -> bool:
    """Return whether a head is the minimum itself or has a higher number."""
    return head.number > minimum.number or minimum.names(head)
