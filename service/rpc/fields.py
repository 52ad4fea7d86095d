"""Fields that several messages have, as the domain's values; the domain checks them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.domain.types import Selector, Version

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf.duration_pb2 import Duration

    from service.domain.rules import InputRules
    from timernn.v1 import time_rnn_service_pb2 as rnn_pb
    from timernn.v1.tensor_pb2 import WeightsVersion


def ttl_from_proto(name: str, ttl: Duration, rules: InputRules) -> int:
    """Return a time to live in ms, or refuse what is no valid duration."""
    if abs(ttl.nanos) >= 10**9:
        raise rules.bad_ttl(name, f"{ttl.seconds} s {ttl.nanos} ns")
    return ttl.seconds * 1000 + ttl.nanos // 1_000_000


def version_from_proto(version: WeightsVersion) -> Version:
    """Return the name of a weights version."""
    return Version(version.number, version.digest)


def selectors_from_proto(
    selectors: Sequence[rnn_pb.ContributionSelector], rules: InputRules
) -> tuple[Selector, ...]:
    """Return the contributions that a request names, or refuse too many before they take memory."""
    rules.check_contribution_count([len(selector.chunk_seqs) for selector in selectors])
    return tuple(
        Selector(selector.session_id, selector.epoch, tuple(selector.chunk_seqs))
        for selector in selectors
    )
