"""Who is calling: the one question that every call answers before anything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    import grpc.aio

    Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

DEFAULT_TENANT = "default"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls, as its credential says; nothing in a request can change it."""

    tenant: str


class Authenticator(Protocol):
    """Turns a call's credential into a principal."""

    def authenticate(self, method: str, context: Context) -> Principal:
        """Return who calls `method`, as "/package.Service/Method", or raise a DomainError."""


class AllowAll:
    """Lets everybody in as the one tenant there is."""

    _principal = Principal(DEFAULT_TENANT)

    def authenticate(self, method: str, context: Context) -> Principal:  # noqa: ARG002 - the port's
        """Return the default tenant."""
        return self._principal
