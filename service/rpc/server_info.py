"""What GetServerInfo answers, and the limits as a message."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from service.rpc.session_messages import duration_to_proto
from timernn.v1 import model_service_pb2 as pb

if TYPE_CHECKING:
    from service.domain.limits_policy import LimitsPolicy
    from service.settings import Limits


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What GetServerInfo answers.

    Attributes:
        server_version: The build.
        replica_id: Names this process.
        start_time_ms: When it began to serve, ms since 1970.
        limits: The limits in force.
        policy: The quotas of each tenant, which stand in the place of those limits.
        durability: How answers are made durable.
    """

    server_version: str
    replica_id: str
    start_time_ms: int
    limits: Limits
    policy: LimitsPolicy
    durability: str

    def limits_of(self, tenant: str) -> Limits:
        """Return the limits as one tenant meets them."""
        return replace(self.limits, **self.policy.of(tenant).of_limits())


def limits_to_proto(limits: Limits) -> pb.Limits:
    """Return the limits as a message: the same names, spans in ms as durations without `_ms`."""
    values: dict[str, Any] = {}
    for field in fields(limits):
        value = getattr(limits, field.name)
        if field.name.endswith("_ms"):
            values[field.name.removesuffix("_ms")] = duration_to_proto(value)
        else:
            values[field.name] = value
    return pb.Limits(**values)
