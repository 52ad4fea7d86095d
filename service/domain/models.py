"""Creates and deletes models, moves weights in and out, keeps checkpoints."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy as np

from rnn_engine import init_moments
from service.domain import pages, weights
from service.domain.digests import request_digest
from service.domain.errors import (
    AlreadyExists,
    NotFound,
    ResourceExhausted,
    bad_field,
    bad_tensor,
    quoted,
)
from service.domain.ports import (
    CheckpointOutcome,
    CreateOutcome,
    NewModel,
    NewVersion,
)
from service.domain.publisher import CandidateVersion, StepRequest
from service.domain.refusals import (
    after_decision,
    checkpoint_not_found,
    contended,
    model_not_found,
    request_id_reused,
    version_gone,
    weights_forked,
)
from service.domain.replacements import RestoreStep, UploadStep
from service.domain.retries import READ_TRIES
from service.domain.rules import (
    check_id,
    check_request_id,
    check_version,
    check_version_numbers,
    checked_page_size,
)
from service.domain.types import (
    DIGEST_BYTES,
    InitialWeights,
    ModelKey,
    ModelView,
    Version,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rnn_engine import Weights
    from service.compute.scheduler import Scheduler
    from service.domain.carrying import Carrier
    from service.domain.limits_policy import LimitsPolicy
    from service.domain.model_cache import KnownModel, ModelCache
    from service.domain.ports import ModelStore
    from service.domain.publisher import VersionPublisher
    from service.domain.rules import InputRules
    from service.domain.types import (
        Checkpoint,
        ModelSpec,
    )

MESSAGE_OVERHEAD_BYTES = 1024  # of a message beside its tensors, at most


class Models:
    """The model operations."""

    def __init__(
        self,
        store: ModelStore,
        model_cache: ModelCache,
        publisher: VersionPublisher,
        *,
        carrier: Carrier,
        scheduler: Scheduler,
        rules: InputRules,
        policy: LimitsPolicy,
    ) -> None:
        """Keep the parts that the operations use."""
        self._store = store
        self._model_cache = model_cache
        self._publisher = publisher
        self._scheduler = scheduler
        self._rules = rules
        self._policy = policy
        self._carrier = carrier
        self._turns: WeakValueDictionary[ModelKey, asyncio.Lock] = WeakValueDictionary()

    async def create(
        self, tenant: str, spec: ModelSpec, first: InitialWeights, *, request_id: str
    ) -> tuple[ModelView, bool]:
        """Create a model; return whether an earlier try of this request had created it."""
        self._rules.check_spec(spec)
        self._rules.check_initial_weights(first)
        check_request_id("request_id", request_id)
        self._check_size(tenant, spec)
        return await self._carrier.carry(
            self._create_in_turn(tenant, spec, first, request_id=request_id)
        )

    async def import_model(
        self, tenant: str, spec: ModelSpec, data: bytes, *, request_id: str
    ) -> tuple[ModelView, bool]:
        """Create a model from a safetensors file, as `create` does."""
        self.import_limit(tenant, spec, request_id)
        given, moments = await self._scheduler.run(len(data), weights.from_safetensors, spec, data)
        first = InitialWeights(given=given, moments=moments)
        return await self.create(tenant, spec, first, request_id=request_id)

    def import_limit(self, tenant: str, spec: ModelSpec, request_id: str) -> int:
        """Return the most bytes that the file of an import can need; refuse what no file could save."""
        self._rules.check_spec(spec)
        check_request_id("request_id", request_id, required=True)
        self._check_size(tenant, spec)
        return weights.file_bytes_limit(spec)

    def _check_size(self, tenant: str, spec: ModelSpec) -> None:
        """Refuse a model whose own step could not fit."""
        for name, least, limit in self._least_sizes(tenant, spec):
            if least > limit:
                text = f"{name} would need {least} bytes, over the limit of {limit}"
                raise bad_field("spec.hidden_size", text)

    async def _create_in_turn(
        self, tenant: str, spec: ModelSpec, first: InitialWeights, *, request_id: str
    ) -> tuple[ModelView, bool]:
        # A retry of a large creation that is still under way waits for it, and finds the model there.
        turn = self._turns.setdefault(ModelKey(tenant, spec.model_id), asyncio.Lock())
        async with turn:
            return await self._create(tenant, spec, first, request_id=request_id)

    async def _create(
        self, tenant: str, spec: ModelSpec, first: InitialWeights, *, request_id: str
    ) -> tuple[ModelView, bool]:
        key = ModelKey(tenant, spec.model_id)
        work = weights.spec_bytes(spec)  # bytes drawn or checked stand for the work
        drawn = await self._scheduler.run(work, _first_weights, spec, first)
        data = weights.weights_to_blob(drawn)
        moments = weights.moments_to_blob(first.moments or init_moments(spec.optimizer, drawn))
        version = Version(1, weights.version_digest(data, moments))
        incarnation = secrets.token_bytes(DIGEST_BYTES)
        stored_spec = weights.spec_to_bytes(spec)
        outcome = await self._store.create_model(
            key,
            NewModel(
                incarnation,
                stored_spec,
                NewVersion(version, data, moments),
                request_digest(request_id, stored_spec, version.digest),
            ),
        )
        if outcome is CreateOutcome.EXISTS:
            raise await self._exists(key, spec)
        if outcome is CreateOutcome.REUSED:  # unless the model there is not supported
            with suppress(NotFound):
                await self._model_cache.get(key, fresh=True)
        self._refuse_creation(tenant, outcome)
        with after_decision():
            model = await self._model_cache.get(key, fresh=True)
        return _view(model), outcome is CreateOutcome.REPLAYED

    async def get(self, key: ModelKey) -> ModelView:
        """Return one model."""
        check_id("model_id", key.model_id)
        return _view(await self._model_cache.get(key, fresh=True))

    async def list_page(
        self, tenant: str, page_size: int, page_token: str
    ) -> tuple[list[ModelView], str]:
        """Return a page of models, sorted by name, and the token of the next page."""
        page_size = checked_page_size(page_size, page_token)
        after, _ = pages.position_from_token(page_token) or ("", "")
        names = await self._store.list_models(tenant, after, page_size)
        views = []
        for name in names:
            try:
                views.append(await self.get(ModelKey(tenant, name)))
            except NotFound:  # deleted meanwhile, or its creation was never finished
                continue
        return views, pages.token_from_position((names[-1], "")) if len(names) == page_size else ""

    async def delete(self, key: ModelKey, *, allow_missing: bool) -> bool:
        """Delete a model; return whether this call did."""
        check_id("model_id", key.model_id)
        try:
            model = await self._model_cache.get(key, fresh=True)
        except NotFound:
            # Clears what a creation or deletion that did not finish has left.
            await self._store.delete_model(key, b"")
            if allow_missing:
                return False
            raise
        self._model_cache.forget(key)
        return await self._store.delete_model(key, model.incarnation)

    async def find_versions(
        self, key: ModelKey, numbers: Sequence[int]
    ) -> tuple[Version, list[Version]]:
        """Return a model's head, and those of the versions of these numbers that are kept."""
        check_id("model_id", key.model_id)
        check_version_numbers(numbers)
        # The head first: a version above it was not made yet when it was read.
        model = await self._model_cache.get(key, fresh=True)
        wanted = sorted(set(numbers))
        return model.head, await self._store.find_versions(key, wanted)

    async def read_weights(
        self, key: ModelKey, version: Version | None, *, include_moments: bool
    ) -> tuple[Version, bytes]:
        """Return a version as a safetensors file."""
        check_id("model_id", key.model_id)
        check_version("version", version)
        for _ in range(READ_TRIES):
            model = await self._model_cache.get(key, fresh=True)
            try:
                found, loaded = await self._model_cache.weights(model, version or model.head)
            except NotFound:
                if version is not None:
                    raise
                continue  # the head was superseded meanwhile
            moments = None
            if include_moments:
                moments = await self._model_cache.kept_moments(model, found, loaded.weights)
                if moments is None and version is None:
                    continue  # the head was superseded meanwhile, and its moments dropped
            return found, weights.to_safetensors(loaded.weights, moments)
        raise contended()

    async def upload_limit(self, key: ModelKey, expected: Version | None, request_id: str) -> int:
        """Return the most bytes that an upload can need; refuse what no upload could save."""
        _check_next_version(key, expected, request_id)
        model = await self._model_cache.get(key)
        return weights.file_bytes_limit(model.spec)

    async def put_weights(
        self, key: ModelKey, data: bytes, *, expected: Version | None, request_id: str
    ) -> tuple[Version, bool]:
        """Make a safetensors file the model's next version."""
        _check_next_version(key, expected, request_id)
        model = await self._model_cache.get(key, fresh=True)
        given, moments = await self._scheduler.run(
            len(data), weights.from_safetensors, model.spec, data
        )
        digest = request_digest(request_id, b"put", data, _expected_bytes(expected))
        request = StepRequest(key, digest, expected)
        uploaded = CandidateVersion(given, moments)
        answer = await self._publisher.publish(
            UploadStep(request, self._store, model.incarnation, uploaded)
        )
        return answer.version, answer.replayed

    async def create_checkpoint(
        self, key: ModelKey, checkpoint_id: str, version: Version | None
    ) -> Checkpoint:
        """Keep a version under a name."""
        check_id("model_id", key.model_id)
        check_id("checkpoint_id", checkpoint_id)
        check_version("version", version)
        model = await self._model_cache.get(key, fresh=True)
        if version is not None and not version.digest:
            found = await self._store.find_version(key, version.number)
            if found is None:
                raise version_gone(version, model.head)
            version = found
        outcome, kept = await self._store.create_checkpoint(
            key, model.incarnation, checkpoint_id, version=version
        )
        if kept is not None:
            return kept
        raise self._checkpoint_refusal(
            outcome, model, checkpoint_id=checkpoint_id, version=version or model.head
        )

    async def list_checkpoints(self, key: ModelKey) -> list[Checkpoint]:
        """Return a model's checkpoints, sorted by name."""
        check_id("model_id", key.model_id)
        await self._model_cache.get(key, fresh=True)
        return await self._store.list_checkpoints(key)

    async def restore_checkpoint(
        self,
        key: ModelKey,
        checkpoint_id: str,
        *,
        expected: Version | None,
        request_id: str,
    ) -> tuple[Version, bool]:
        """Make a checkpoint's weights and moments the model's next version."""
        _check_next_version(key, expected, request_id)
        check_id("checkpoint_id", checkpoint_id)
        content = (b"restore", checkpoint_id.encode(), _expected_bytes(expected))
        request = StepRequest(key, request_digest(request_id, *content), expected)
        answer = await self._publisher.publish(
            RestoreStep(request, self._store, self._model_cache, checkpoint_id)
        )
        return answer.version, answer.replayed

    async def delete_checkpoint(
        self, key: ModelKey, checkpoint_id: str, *, allow_missing: bool
    ) -> bool:
        """Take a checkpoint's name away; return whether this call did."""
        check_id("model_id", key.model_id)
        check_id("checkpoint_id", checkpoint_id)
        model = await self._model_cache.get(key, fresh=True)
        deleted = await self._store.delete_checkpoint(key, model.incarnation, checkpoint_id)
        if not deleted and not allow_missing:
            raise checkpoint_not_found(checkpoint_id)
        return deleted

    def _least_sizes(self, tenant: str, spec: ModelSpec) -> list[tuple[str, int, int]]:
        """Return what a model of this size needs at the least, and the limit that it has to keep to."""
        limits, size = self._rules.limits, weights.spec_bytes(spec)
        file = weights.file_bytes_limit(spec)
        network = spec.network
        widest = max(network.input.size, network.output_size, network.state_spec.size)
        step = 2 * widest * np.dtype(spec.dtype).itemsize + MESSAGE_OVERHEAD_BYTES
        return [
            ("the weights", size, limits.weights_bytes),
            (
                "the gradient of one chunk (contribution_bytes_per_model)",
                size,
                self._policy.of(tenant).contribution_bytes_per_model,
            ),
            (
                "an upload of weights and moments (request_bytes_in_flight)",
                file,
                limits.request_bytes_in_flight,
            ),
            ("a message with one step of one row (message_bytes)", step, limits.message_bytes),
        ]

    async def _exists(self, key: ModelKey, asked: ModelSpec) -> Exception:
        """Make the refusal of a name that is taken; it says how the existing model differs."""
        try:
            there = (await self._model_cache.get(key, fresh=True)).spec
        except NotFound:
            return contended()
        had, wanted = weights.spec_facts(there), weights.spec_facts(asked)
        named = [name for name in wanted if had.get(name) != wanted[name]]
        text = f"model {quoted(asked.model_id)} exists" + "".join(
            f"; {name}: it has {had.get(name)}, asked for {wanted[name]}" for name in named
        )
        return AlreadyExists(
            "MODEL_EXISTS", text, model_id=asked.model_id, difference=",".join(named)
        )

    def _refuse_creation(self, tenant: str, outcome: CreateOutcome) -> None:
        if outcome is CreateOutcome.REUSED:
            raise request_id_reused("model")
        if outcome is CreateOutcome.QUOTA:
            limit = self._policy.of(tenant).models_per_tenant
            text = f"the models have reached their limit of {limit}; delete some"
            raise ResourceExhausted("MAX_MODELS", text, quota="models_per_tenant", limit=limit)
        if outcome is CreateOutcome.STALE:
            raise contended()

    def _checkpoint_refusal(
        self, outcome: CheckpointOutcome, model: KnownModel, *, checkpoint_id: str, version: Version
    ) -> Exception:
        if outcome is CheckpointOutcome.EXISTS:
            text = f"checkpoint {quoted(checkpoint_id)} keeps another version"
            return AlreadyExists("CHECKPOINT_EXISTS", text, checkpoint_id=checkpoint_id)
        if outcome is CheckpointOutcome.VERSION_GONE:
            return version_gone(version, model.head)
        if outcome is CheckpointOutcome.FORKED:
            return weights_forked(version, model.head)
        if outcome is CheckpointOutcome.QUOTA:
            limit = self._policy.of(model.key.tenant).checkpoints_per_model
            text = f"the checkpoints of this model have reached their limit of {limit}; delete some"
            quota = "checkpoints_per_model"
            return ResourceExhausted("MAX_CHECKPOINTS", text, quota=quota, limit=limit)
        return model_not_found(model.key.model_id)


def _check_next_version(key: ModelKey, expected: Version | None, request_id: str) -> None:
    check_id("model_id", key.model_id)
    check_version("expected_version", expected)
    check_request_id("request_id", request_id, required=True)


def _first_weights(spec: ModelSpec, first: InitialWeights) -> Weights:
    if first.given is None:
        return weights.draw_weights(spec, first.seed)
    given = first.given
    for (name, shape), array in zip(spec.network.weight_spec.arrays, given, strict=True):
        if array.dtype != spec.dtype or array.shape != shape:
            text = f"expected {spec.dtype} {shape}, got {array.dtype} {array.shape}"
            raise bad_tensor(f"given.{name.lower()}", text)
    return given


def _view(model: KnownModel) -> ModelView:
    record = model.record
    return ModelView(
        spec=model.spec,
        head=model.head,
        incarnation=model.incarnation.hex(),
        create_time_ms=record.create_time_ms,
        waiting_count=record.waiting_count,
        waiting_bytes=record.waiting_bytes,
    )


def _expected_bytes(expected: Version | None) -> bytes:
    return b"" if expected is None else expected.number.to_bytes(8, "big") + expected.digest
