"""What a client has learned of models: their sizes, and the highest version that it has seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from timernn.types import ModelInfo, Version


class KnownModels:
    """Models by name, and of each the version that no later answer may be older than."""

    def __init__(self) -> None:
        self._models: dict[str, ModelInfo] = {}
        self._versions: dict[str, Version] = {}

    def model(self, model_id: str) -> ModelInfo | None:
        """Return a model as it was read last."""
        return self._models.get(model_id)

    def note_model(self, model: ModelInfo) -> None:
        """Note a model as it was just read; one that was made anew begins with no known version."""
        before = self._models.get(model.model_id)
        if before is not None and before.incarnation != model.incarnation:
            self.forget(model.model_id)
        self._models[model.model_id] = model
        self.note_version(model.model_id, model.head)

    def forget(self, model_id: str) -> None:
        """Forget a model whose name may stand for another one now."""
        self._models.pop(model_id, None)
        self._versions.pop(model_id, None)

    def version(self, model_id: str) -> Version | None:
        """Return the highest version of a model that this client has seen."""
        return self._versions.get(model_id)

    def note_version(self, model_id: str, version: Version) -> None:
        """Note a version that an answer named."""
        known = self._versions.get(model_id)
        if known is None or version.number > known.number:
            self._versions[model_id] = version

    def set_version(self, model_id: str, version: Version) -> None:
        """Note a version that is certainly the head: this client has just made it, or its user names it."""
        self._versions[model_id] = version

    def forget_version(self, model_id: str) -> None:
        """Forget which version was seen: nobody can bring it back."""
        self._versions.pop(model_id, None)
