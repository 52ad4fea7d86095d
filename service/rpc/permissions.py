"""Which roles may call which method. What is not in the table is refused, and a server does not start with it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from service.security.roles import Role

if TYPE_CHECKING:
    from collections.abc import Iterable

_WORD_START: Final = re.compile(r"(?<!^)(?=[A-Z])")

_ANYBODY: Final = frozenset(Role)
_INFER: Final = frozenset({Role.INFER})
_TRAIN: Final = frozenset({Role.TRAIN})
_ADMIN: Final = frozenset({Role.ADMIN})
# Lists that say nothing of a state, and change nothing, not even a time to live.
_SEES: Final = frozenset({Role.OPERATOR})

_MODEL: Final = "/timernn.v1.ModelService/"
_SESSION: Final = "/timernn.v1.SessionService/"
_TIME_RNN: Final = "/timernn.v1.TimeRnnService/"

FIGURES_ROLES: Final = _ADMIN | _SEES
"""Who sees what is no RPC: the figures of all tenants together, on the page of the metrics port."""

PUBLIC: Final = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})
"""What needs no credential: probes and load balancers have none."""

ROLES: Final[dict[str, frozenset[Role]]] = {
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _ANYBODY,
    _MODEL + "GetServerInfo": _ANYBODY,
    _MODEL + "GetModel": _INFER | _SEES,
    _MODEL + "ListModels": _INFER | _SEES,
    _MODEL + "FindVersions": _INFER | _SEES,
    _MODEL + "ListCheckpoints": _TRAIN | _SEES,
    _MODEL + "GetWeights": _TRAIN,
    _MODEL + "PutWeights": _TRAIN,
    _MODEL + "CreateCheckpoint": _TRAIN,
    _MODEL + "RestoreCheckpoint": _TRAIN,
    _MODEL + "DeleteCheckpoint": _ADMIN,
    _MODEL + "CreateModel": _ADMIN,
    _MODEL + "ImportModel": _ADMIN,
    _MODEL + "DeleteModel": _ADMIN,
    _SESSION + "ListSessions": _INFER | _SEES,
    _SESSION + "OpenSession": _INFER,
    _SESSION + "GetSession": _INFER,
    _SESSION + "GetState": _INFER,
    _SESSION + "SetState": _INFER,
    _SESSION + "ResetState": _INFER,
    _SESSION + "ForkSession": _INFER,
    _SESSION + "CloseSession": _INFER,
    _TIME_RNN + "Forward": _INFER,
    _TIME_RNN + "Stream": _INFER,
    _TIME_RNN + "Backward": _TRAIN,
    _TIME_RNN + "Update": _TRAIN,
    _TIME_RNN + "DiscardGradients": _TRAIN,
    _TIME_RNN + "ListWaiting": _TRAIN | _SEES,
}
"""By method the roles of which one is needed."""


def kind_of(method: str) -> str:
    """Return a method's name in snake case, as an operation is called: "forward" of "/…/Forward"."""
    return _WORD_START.sub("_", method.rpartition("/")[2]).lower()


def check_complete(methods: Iterable[str]) -> None:
    """Check that each method that is served has an entry.

    Raises:
        RuntimeError: If one has none: it could not be called, and whoever added it should say by whom.
    """
    missing = sorted(set(methods) - set(ROLES) - PUBLIC)
    if missing:
        raise RuntimeError(f"service/rpc/permissions.py says nothing of {', '.join(missing)}")
