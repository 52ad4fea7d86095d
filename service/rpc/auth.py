"""Who calls, asked once a call, and whether they may do a thing, asked for every operation.

The two are apart because a Stream outlives the moment in which it was opened: it carries operations that
need different roles, and its credential may expire or be revoked while it is open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias
from urllib.parse import unquote

from service.security.roles import Role

if TYPE_CHECKING:
    import grpc.aio

    Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

DEFAULT_TENANT = "default"
_OF_IP: Final = ("ipv4", "ipv6")


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls, as the credential says; nothing in a request can change it.

    Attributes:
        tenant: Whose data the call sees.
        roles: What the credential is good for.
        name: The credential's own name, for logs; empty where there is none.
        credential_id: What the credential is known by, so that it can be found again; empty where there is none.
        expire_time_s: When the credential ends, in seconds since 1970; None for never.
    """

    tenant: str
    roles: frozenset[Role] = frozenset(Role)
    name: str = ""
    credential_id: str = ""
    expire_time_s: float | None = None


ANONYMOUS: Final = Principal("", roles=frozenset())
"""Who calls what needs no credential."""


class Caller(Protocol):
    """Where a transport keeps the credentials of a call; gRPC's own context is one."""

    def invocation_metadata(self) -> Any:
        """Return the pairs of key and value that came with the call, or None."""

    def peer(self) -> str:
        """Return the address at the other end."""

    def auth_context(self) -> Any:
        """Return what the connection proved: property names of a TLS certificate to lists of bytes."""


def host_of(peer: str) -> str:
    """Return the host of a peer's address, without the port that differs for each connection."""
    return peer.rpartition(":")[0]


def address_of(peer: str) -> str:
    """Return a peer as people write it: HOST:PORT, or [HOST]:PORT of IPv6; of what is neither, as it is.

    gRPC puts a scheme before it and percent signs into it, as in "ipv6:%5B::1%5D:4711".
    """
    scheme, _, address = peer.partition(":")
    return unquote(address) if scheme in _OF_IP else peer


class Authenticator(Protocol):
    """Decides who calls and what they may do."""

    def authenticate(self, caller: Caller) -> Principal:
        """Return who calls, or raise Unauthenticated; called once for each RPC.

        A caller without any credential may be a principal as well: a method that is open to everybody,
        such as health, is left to `authorise`.
        """

    def authorise(self, principal: Principal, method: str) -> None:
        """Return if the principal may do this now; else raise Unauthenticated or PermissionDenied.

        Called for each RPC and again for each operation on a stream, so it must not wait.

        Args:
            principal: What `authenticate` returned, perhaps minutes ago.
            method: The RPC that the operation is, or that a stream's operation stands for, such as
                "/timernn.v1.TimeRnnService/Forward".
        """


class AllowAll:
    """Lets everybody do everything, as the one tenant there is."""

    _principal = Principal(DEFAULT_TENANT)

    def authenticate(self, caller: Caller) -> Principal:  # noqa: ARG002 - the protocol's
        """Return the default tenant with every role."""
        return self._principal

    def authorise(self, principal: Principal, method: str) -> None:
        """Allow every method: the principal has every role."""
