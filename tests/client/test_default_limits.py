"""The limits that the client assumes where a server does not say."""

from __future__ import annotations

from service.rpc.server_info import limits_to_proto
from service.settings import Limits
from timernn._core.splitting import Bounds
from timernn.v1 import model_service_pb2 as model_pb


def test_the_client_assumes_the_limits_of_a_server_of_defaults() -> None:
    """A limit that a server leaves at 0 counts as what a server of defaults allows."""
    unsaid, said = model_pb.Limits(), limits_to_proto(Limits())
    assert Bounds.from_limits(unsaid, 1 << 40) == Bounds.from_limits(said, 1 << 40)
