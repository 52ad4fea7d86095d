"""Versions that replace a model's weights without an optimizer step: an upload, a restored checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.domain.publisher import CandidateVersion
from service.domain.refusals import checkpoint_not_found, model_not_found

if TYPE_CHECKING:
    from service.domain.model_cache import KnownModel, ModelCache
    from service.domain.ports import ModelStore, UpdateInputs
    from service.domain.publisher import StepRequest


@dataclass(frozen=True, slots=True)
class UploadStep:
    """Makes uploaded weights the next version; a `VersionStep`.

    Attributes:
        request: What was asked for.
        store: Where the model is.
        incarnation: The incarnation of the model that the upload was checked against.
        candidate: The uploaded weights.
    """

    request: StepRequest
    store: ModelStore
    incarnation: bytes
    candidate: CandidateVersion

    async def read_inputs(self) -> UpdateInputs | None:
        """Read the head and the remembered request."""
        return await self.store.read_update_inputs(
            self.request.model_key, self.request.digest, None
        )

    async def make_step(self, model: KnownModel, _inputs: UpdateInputs) -> CandidateVersion:
        """Return the upload, unless the model was created anew, perhaps with another specification."""
        if model.incarnation != self.incarnation:
            raise model_not_found(model.key.model_id)
        return self.candidate


@dataclass(frozen=True, slots=True)
class RestoreStep:
    """Makes a checkpoint's weights and moments the next version; a `VersionStep`."""

    request: StepRequest
    store: ModelStore
    model_cache: ModelCache
    checkpoint_id: str

    async def read_inputs(self) -> UpdateInputs | None:
        """Read the head and the remembered request."""
        return await self.store.read_update_inputs(
            self.request.model_key, self.request.digest, None
        )

    async def make_step(self, model: KnownModel, _inputs: UpdateInputs) -> CandidateVersion:
        """Read what the checkpoint keeps.

        This is done only when the step is still to be made: a retry may come after the checkpoint was
        deleted.
        """
        kept = await self.store.list_checkpoints(model.key)
        named = [one.version for one in kept if one.checkpoint_id == self.checkpoint_id]
        if not named:
            raise checkpoint_not_found(self.checkpoint_id)
        version, loaded = await self.model_cache.weights(model, named[0])
        moments = await self.model_cache.moments(model, version, loaded.weights)
        return CandidateVersion(loaded.weights, moments)
