"""What one tenant may leave in the store: the quotas that may differ from tenant to tenant.

Everything that enforces or names such a quota asks a `LimitsPolicy`, once for each session that is opened, chunk
that keeps a tape, contribution, version and checkpoint; never for a chunk in INFER mode. What bounds one request or
this process is the same for everyone, and stands in `service.settings.Limits` alone.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Final, Protocol, Self

if TYPE_CHECKING:
    from service.settings import Limits


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """The quotas of one tenant; each has the name that it has in `Limits`, where its default stands.

    The last two have none: a tenant may keep as much as its sessions and models may, unless somebody says otherwise.

    Attributes:
        sessions_per_tenant: Sessions that live at once.
        models_per_tenant: Models.
        tapes_per_session: Tapes that wait for their Backward.
        counted_tapes_per_session: Consumed tapes that are kept for retries.
        counted_tape_bytes_per_session: Bytes of these.
        contributions_per_model: Contributions that wait for an Update.
        contribution_bytes_per_model: Bytes of their gradients.
        superseded_bytes_per_model: Bytes of the weights of versions before the head.
        checkpoints_per_model: Checkpoints.
        tape_bytes_per_tenant: Bytes of all tapes that wait for their Backward; None: no bound.
        contribution_bytes_per_tenant: Bytes of all gradients that wait for an Update; None: no bound.
    """

    sessions_per_tenant: int
    models_per_tenant: int
    tapes_per_session: int
    counted_tapes_per_session: int
    counted_tape_bytes_per_session: int
    contributions_per_model: int
    contribution_bytes_per_model: int
    superseded_bytes_per_model: int
    checkpoints_per_model: int
    tape_bytes_per_tenant: int | None = None
    contribution_bytes_per_tenant: int | None = None

    def of_limits(self) -> dict[str, int]:
        """Return those that `Limits` has as well, by name."""
        return {name: getattr(self, name) for name in _NAMES}

    @classmethod
    def from_limits(cls, limits: Limits) -> Self:
        """Return the quotas that hold for a tenant of whom nothing else is said."""
        return cls(**{name: getattr(limits, name) for name in _NAMES})


_NAMES: Final = tuple(field.name for field in fields(TenantLimits) if field.default is MISSING)


class LimitsPolicy(Protocol):
    """Says what each tenant may have."""

    def of(self, tenant: str) -> TenantLimits:
        """Return a tenant's quotas as they are now; cheap, and never waits."""
        ...


class SameLimits:
    """The same quotas for every tenant."""

    def __init__(self, limits: Limits) -> None:
        self._limits = TenantLimits.from_limits(limits)

    def of(self, tenant: str) -> TenantLimits:  # noqa: ARG002 - the same for everyone
        """Return the quotas."""
        return self._limits
