"""Who calls, by a bearer token or by a client certificate that a token's entry names."""

from __future__ import annotations

import time
from collections import OrderedDict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from service.domain.errors import bad_field, quoted
from service.rpc import audit
from service.rpc.auth import Principal, host_of
from service.rpc.errors import PermissionDenied, Unauthenticated
from service.rpc.holding import Holding
from service.rpc.permissions import ROLES, kind_of
from service.security.roles import GRANTED, TENANT_KEY, Role
from service.security.tokens import check_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.rpc.auth import Caller
    from service.security.tokens import Token, TokenSet

ALTERNATIVE_NAMES: Final = "x509_subject_alternative_name"
"""What gRPC calls the names in a certificate that the connection verified."""

_AUTHORIZATION: Final = "authorization"
_SCHEME: Final = "bearer"
# One text for unknown, wrong, expired and revoked: nobody learns which tokens there are.
_BAD: Final = "the credential is not valid, or not valid any more"


class TokenLogin:
    """Knows callers by the tokens of a file, which may change at any time."""

    def __init__(
        self, tokens: Callable[[], TokenSet], on_login: Callable[[str], None] = lambda _: None
    ) -> None:
        """Keep where the tokens are.

        Args:
            tokens: Returns those that are valid now.
            on_login: Called with how a login ended: accepted, missing, expired or refused.
        """
        self._tokens = tokens
        self._on_login = on_login

    def authenticate(self, caller: Caller) -> Principal:
        """Return who calls.

        Raises:
            Unauthenticated: NO_CREDENTIALS, BAD_CREDENTIALS.
            PermissionDenied: ROLE: it names another tenant than its own, and is no operator.
        """
        metadata = dict(caller.invocation_metadata() or ())
        presented = _bearer(metadata.get(_AUTHORIZATION, ""))
        if presented is None:
            entry = self._of_certificate(caller)
        else:
            entry = self._tokens().find(presented)
        if entry is None:
            raise self._refused(caller, "missing" if presented is None else "refused", "")
        if entry.has_expired(datetime.now(UTC)):
            raise self._refused(caller, "expired", entry.name)
        principal = self._principal(entry, caller)
        self._on_login("accepted")
        return principal

    def resume(self, credential_id: str, caller: Caller) -> Principal:
        """Return who calls, by the id of a token that logged in before.

        Raises:
            Unauthenticated: BAD_CREDENTIALS: the token has expired or was revoked since.
            PermissionDenied: ROLE: as of `authenticate`.
        """
        entry = self._tokens().get(credential_id)
        if entry is None or _has_ended(entry):
            raise Unauthenticated("BAD_CREDENTIALS", _BAD)
        return self._principal(entry, caller)

    def authorise(self, principal: Principal, method: str) -> None:
        """Return if the principal may call a method now.

        Raises:
            Unauthenticated: BAD_CREDENTIALS: its token has expired or was revoked since it logged in.
            PermissionDenied: ROLE.
        """
        entry = self._tokens().get(principal.credential_id)
        # What the entry says now counts: it may have been changed since the caller logged in.
        is_known = entry is not None and _may_act_for(entry, principal.tenant)
        if entry is None or not is_known or _has_ended(entry):
            self._on_login("expired" if is_known else "refused")
            audit.refused_operation(principal, kind_of(method), reason="BAD_CREDENTIALS")
            raise Unauthenticated("BAD_CREDENTIALS", _BAD)
        if not ROLES.get(method, frozenset()) & GRANTED[entry.role]:
            held, name = entry.role.value, method.rpartition("/")[2]
            audit.refused_operation(principal, kind_of(method), reason="ROLE")
            raise PermissionDenied("ROLE", f"role {held!r} may not call {name}", role=held)

    def _principal(self, entry: Token, caller: Caller) -> Principal:
        """Return the bearer of a token, and for which tenant: its own, or which an operator names."""
        tenant = dict(caller.invocation_metadata() or ()).get(TENANT_KEY, entry.tenant)
        if tenant != entry.tenant:
            if entry.role is not Role.OPERATOR:
                # Not ignored: the answer of its own tenant would pass for the other one's.
                self._on_login("refused")
                audit.refused_login("refused", peer=caller.peer(), name=entry.name)
                held = entry.role.value
                raise PermissionDenied("ROLE", f"role {held!r} may not choose a tenant", role=held)
            try:
                check_name(TENANT_KEY, tenant)
            except ValueError:
                expected = f"expected a tenant's name, got {quoted(tenant)}"
                raise bad_field(TENANT_KEY, expected) from None
        return Principal(
            tenant=tenant,
            roles=GRANTED[entry.role],
            name=entry.name,
            credential_id=entry.id,
            expire_time_s=entry.expires.timestamp() if entry.expires else None,
        )

    def _of_certificate(self, caller: Caller) -> Token | None:
        """Return the entry that names the caller's certificate, which the connection verified."""
        proved: Any = caller.auth_context() or {}
        names = {name.decode(errors="replace") for name in proved.get(ALTERNATIVE_NAMES, ())}
        return self._tokens().of_certificate(names) if names else None

    def _refused(self, caller: Caller, how: str, name: str) -> Unauthenticated:
        self._on_login(how)
        audit.refused_login(how, peer=caller.peer(), name=name)
        if how == "missing":
            text = "a token is needed: metadata 'authorization' with 'Bearer TOKEN'"
            return Unauthenticated("NO_CREDENTIALS", text)
        return Unauthenticated("BAD_CREDENTIALS", _BAD)


class LoginThrottle:
    """Makes the caller wait whose logins fail again and again; others from its address do not.

    Only the refusal itself is held back, so a caller with a right token never waits.
    """

    _FREE: Final = 5
    _FIRST_S: Final = 0.1
    _LONGEST_S: Final = 2.0
    _FORGET_S: Final = 60.0
    _HOSTS: Final = 10_000

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start without failures."""
        self._clock = clock
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._held = Holding()

    async def hold(self, peer: str) -> None:
        """Wait as long as a failure from this peer has to; not at all when too many wait already."""
        await self._held.hold(self.note(peer))

    def note(self, peer: str) -> float:
        """Count a failure and return for how long it has to wait, in seconds."""
        host, now = host_of(peer), self._clock()
        count, last = self._failures.pop(host, (0, now))
        count = 1 if now - last > self._FORGET_S else count + 1
        self._failures[host] = count, now
        while len(self._failures) > self._HOSTS:
            self._failures.popitem(last=False)
        over = count - self._FREE
        if over <= 0:
            return 0.0
        return min(self._FIRST_S * 2.0 ** min(over - 1, 10), self._LONGEST_S)


def _bearer(header: str | bytes) -> str | None:
    if isinstance(header, bytes):
        return None
    scheme, _, token = header.partition(" ")
    return token.strip() if scheme.lower() == _SCHEME and token.strip() else None


def _may_act_for(entry: Token, tenant: str) -> bool:
    """Return whether an entry may act for the tenant that its bearer logged in for."""
    return entry.role is Role.OPERATOR or entry.tenant == tenant


def _has_ended(entry: Token) -> bool:
    return entry.expires is not None and entry.has_expired(datetime.now(UTC))
