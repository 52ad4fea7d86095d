"""Two server processes on one store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest

from instruments.processes import ServiceProcess
from replicas import TwoReplicas

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def replicas(store_url: str) -> Iterator[TwoReplicas]:
    """Two server processes that share nothing but the store."""
    with ServiceProcess(store_url) as one, ServiceProcess(store_url) as other:
        channels = [grpc.insecure_channel(each.address) for each in (one, other)]
        yield TwoReplicas(*channels)
        for channel in channels:
            channel.close()
