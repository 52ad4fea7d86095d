"""The audit log: who did what to which model or session, and who was not let in.

A line of logger `service.audit` for each operation that changes something or hands out weights, except the
chunks of a sequence, which are too many and which metrics count. It names the token, never its secret, and
no tensor. What succeeds has a line each; refusals that are like one another share some, so that nobody fills a
disk by being refused.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from service.logs import FIELDS, REPEATED
from service.rpc.auth import address_of, host_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.message import Message

    from service.rpc.auth import Principal

UNAUDITED: Final = frozenset(
    {
        "backward", "check", "find_versions", "forward", "get_model", "get_server_info", "get_session",
        "get_state", "list_checkpoints", "list_models", "list_sessions", "list_waiting",
        "server_reflection_info", "stream", "watch",
    }
)  # fmt: skip
"""Operations without a line: they change nothing, or they are chunks. A new method has one until it is here."""

# Not let in: these have a line of their own, which `refused_login` or `refused_role` writes.
_NOT_LET_IN: Final = frozenset({"NO_CREDENTIALS", "BAD_CREDENTIALS", "ROLE"})
_WITH_NAMES: Final = ("header", "model", "spec", "session")
_TARGETS: Final = ("model_id", "session_id", "new_session_id", "checkpoint_id", "request_id")

_LOGGER: Final = logging.getLogger("service.audit")


def operation_ended(
    kind: str,
    *,
    principal: Principal,
    peer: str,
    outcome: str,
    request: Message | None,
    answer: Message | None = None,
) -> None:
    """Record that an operation ended.

    Args:
        kind: The method in snake case.
        principal: Who called.
        peer: From which address.
        outcome: "OK", or the reason of the refusal or failure.
        request: Its message; of an upload the first one. None if none came.
        answer: What it was answered with; None for a refusal or a download.
    """
    if outcome in _NOT_LET_IN:
        return
    level = logging.INFO if outcome == "OK" else logging.WARNING
    if _LOGGER.isEnabledFor(level):
        named = {"operation": kind, "outcome": outcome, **_caller(principal, peer)}
        like = None if outcome == "OK" else _like("operation", named, peer)
        _write(level, "operation", named | _targets(request, answer), like)


def refused_login(how: str, *, peer: str, name: str = "") -> None:
    """Record that a caller was not let in.

    Args:
        how: What was wrong with the credential: "missing", "refused" or "expired".
        peer: From which address it was presented.
        name: The name of the token, where it is known.
    """
    named = {"outcome": how, "token": name, "peer": address_of(peer)}
    given = {key: value for key, value in named.items() if value}
    _write(logging.WARNING, "login", given, ("login", how, name, host_of(peer)))


def refused_operation(principal: Principal, kind: str, *, reason: str) -> None:
    """Record that a caller who was let in may not, or no longer, do a thing.

    Args:
        principal: Who called.
        kind: The method in snake case.
        reason: "ROLE", or "BAD_CREDENTIALS" for a token that has expired or was revoked meanwhile.
    """
    named = {"operation": kind, "outcome": reason, **_caller(principal, "")}
    _write(logging.WARNING, "refused", named, _like("refused", named))


def _like(message: str, named: dict[str, str], peer: str = "") -> tuple[str, ...]:
    """Return what makes a refusal like others: what, and whose token, or without tokens which host."""
    caller = named.get("token_id") or host_of(peer)
    return message, named["operation"], named["outcome"], caller


def _caller(principal: Principal, peer: str) -> dict[str, str]:
    named = {
        "token": principal.name,
        "token_id": principal.credential_id,
        "tenant": principal.tenant,
        "peer": address_of(peer),
    }
    return {key: value for key, value in named.items() if value}


def _targets(request: Any, answer: Any) -> dict[str, Any]:
    """Return the names in a request; one that the server made is in the answer."""
    found: dict[str, Any] = {}
    for place in (*_parts(request), *_parts(answer)):
        for name in _TARGETS:
            if name not in found and (value := getattr(place, name, "")):
                found[name] = value
    if version := getattr(getattr(answer, "version", None), "number", 0):
        found["version"] = version
    return found


def _parts(message: Any) -> Iterator[Any]:
    """Yield a message and those in it that have names: a header, a model, a spec, a session."""
    if message is None:
        return
    yield message
    for part in _WITH_NAMES:
        inner = getattr(message, part, None)
        if inner is not None:
            yield from _parts(inner)


def _write(
    level: int, message: str, fields: dict[str, Any], like: tuple[str, ...] | None = None
) -> None:
    _LOGGER.log(level, message, extra={FIELDS: fields, REPEATED: like})
