"""What a server that was asked to end does before it ends."""

from __future__ import annotations

from typing import Any

import grpc

import timernn
from instruments.processes import ServiceProcess
from timernn.v1.model_service_pb2 import RestoreCheckpointRequest
from timernn.v1.model_service_pb2_grpc import ModelServiceStub


def test_a_step_whose_caller_gave_up_is_finished(store_url: str) -> None:
    """It goes on without its caller, so there is no call whose end the server could wait for."""
    options = ["--failpoints", "before_update=sleep(1)", "--testing"]
    with ServiceProcess(store_url, *options) as process:
        with timernn.connect(process.address) as client:
            client.create_model("finishing", input_size=2, hidden_size=3)
            client.create_checkpoint("finishing", "k")
        with grpc.insecure_channel(process.address) as channel:
            stub: Any = ModelServiceStub(channel)
            request = RestoreCheckpointRequest(
                model_id="finishing", checkpoint_id="k", request_id="r"
            )
            step = stub.RestoreCheckpoint.future(request, timeout=30)
            process.wait_for_line(r".*failpoint before_update: sleep")
            step.cancel()
        assert process.terminate() == 0
    with ServiceProcess(store_url) as other, timernn.connect(other.address) as client:
        assert client.get_model("finishing").head.number == 2
