"""Models whose weights do not fit one message: made in one decision, from a file in parts."""

from __future__ import annotations

import asyncio
import queue
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

import timernn
from timernn._core.weights import parts, weights_to_file
from timernn.v1 import model_service_pb2 as pb
from timernn.v1.model_service_pb2_grpc import ModelServiceStub

if TYPE_CHECKING:
    from collections.abc import Iterator

D, H = 128, 2048  # 17 MiB of float32 weights


@pytest.fixture(scope="module")
def weights() -> dict[str, Any]:
    """Weights of more than a message may carry."""
    rng = np.random.default_rng(7)
    shapes = {"Wx": (D, H), "Wh": (H, H), "b": (H,)}
    return {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}


def check(got: timernn.Weights, weights: dict[str, Any]) -> None:
    """Compare all arrays; they are the model's first version."""
    assert got.version.number == 1
    for name, array in weights.items():
        np.testing.assert_array_equal(getattr(got, name), array)


def test_a_model_of_any_size_is_created_in_one_call(
    live: timernn.Client, model_id: str, weights: dict[str, Any]
) -> None:
    """The weights are the first version; a second call finds the name taken, or the model there."""
    made = live.create_model(model_id, input_size=D, hidden_size=H, **weights)
    assert made.head.number == 1
    check(live.get_weights(model_id), weights)
    with pytest.raises(timernn.ModelExists):
        live.create_model(model_id, input_size=D, hidden_size=H, **weights)
    again = live.create_model(model_id, input_size=D, hidden_size=H, **weights, exist_ok=True)
    assert again.incarnation == made.incarnation


async def test_so_it_is_with_asyncio(
    live: timernn.Client, model_id: str, weights: dict[str, Any]
) -> None:
    """The other frontend sends the same."""
    addresses = await asyncio.to_thread(lambda: live._core.context.caller.addresses)
    async with timernn.aio.connect(addresses) as client:
        await client.create_model(model_id, input_size=D, hidden_size=H, **weights)
        check(await client.get_weights(model_id), weights)


def test_a_model_is_not_there_before_all_of_it_has_come(
    live: timernn.Client, model_id: str
) -> None:
    """MODEL_NOT_FOUND while its file is under way; then version 1; the request can be sent again."""
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal(shape).astype("f4") for shape in ((3, 5), (5, 5), (5,))]
    file = weights_to_file(*arrays)
    spec = pb.ModelSpec(model_id=model_id, input_size=3, hidden_size=5)
    header = pb.ImportModelHeader(spec=spec, request_id="r", total_bytes=len(file))
    sent: queue.Queue[pb.ImportModelRequest | None] = queue.Queue()
    with grpc.insecure_channel(live._core.context.caller.addresses[0]) as channel:
        stub = ModelServiceStub(channel)
        sent.put(pb.ImportModelRequest(header=header))
        sent.put(pb.ImportModelRequest(data=file[:100]))
        call = stub.ImportModel.future(iter(sent.get, None), timeout=30)
        with pytest.raises(timernn.ModelNotFound):
            live.get_model(model_id)
        sent.put(pb.ImportModelRequest(data=file[100:]))
        sent.put(None)
        made = call.result()
        assert (made.model.head.number, made.replayed) == (1, False)
        np.testing.assert_array_equal(live.get_weights(model_id).Wh, arrays[1])

        def again(header: pb.ImportModelHeader, file: bytes) -> pb.ImportModelResponse:
            requests = [pb.ImportModelRequest(header=header)]
            requests += [pb.ImportModelRequest(data=part) for part in parts(file)]
            answer: pb.ImportModelResponse = stub.ImportModel(iter(requests), timeout=30)
            return answer

        assert again(header, file).replayed
        other = weights_to_file(*(array * 2 for array in arrays))
        with pytest.raises(grpc.RpcError, match="used for a model with other content"):
            again(header, other)


def half_of(header: pb.ImportModelHeader, file: bytes) -> Iterator[pb.ImportModelRequest]:
    """Yield a header and less than its file."""
    yield pb.ImportModelRequest(header=header)
    yield pb.ImportModelRequest(data=file[: len(file) // 2])


def test_an_upload_that_breaks_off_leaves_nothing(live: timernn.Client, model_id: str) -> None:
    """A file that is cut short is refused, and the name is free."""
    arrays = [np.zeros(shape, "f4") for shape in ((3, 5), (5, 5), (5,))]
    file = weights_to_file(*arrays)
    spec = pb.ModelSpec(model_id=model_id, input_size=3, hidden_size=5)
    header = pb.ImportModelHeader(spec=spec, request_id="r", total_bytes=len(file))
    address = live._core.context.caller.addresses[0]
    with (
        grpc.insecure_channel(address) as channel,
        pytest.raises(grpc.RpcError, match="total_bytes"),
    ):
        ModelServiceStub(channel).ImportModel(half_of(header, file), timeout=30)
    with pytest.raises(timernn.ModelNotFound):
        live.get_model(model_id)
    assert live.create_model(model_id, input_size=3, hidden_size=5).head.number == 1
