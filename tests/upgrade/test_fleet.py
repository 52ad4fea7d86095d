"""Replicas of two releases on one store: a call may go to either, and be sent again to the other."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
import numpy as np
import pytest
import redis
from safetensors.numpy import load

from replicas import Stubs, to_tensor
from service.domain.types import SessionKey
from service.store import keys
from timernn.v1 import model_service_pb2 as models_pb
from timernn.v1 import session_service_pb2 as sessions_pb
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from instruments.processes import ServiceProcess
    from timernn.v1.tensor_pb2 import Tensor, WeightsVersion

    Order: TypeAlias = tuple[str, ...]
    Call: TypeAlias = Callable[[Stubs, Any], Any]
    Walk: TypeAlias = Callable[["Trainer"], Iterator[Any]]

N, T, D, H = 2, 3, 5, 4
STEPS = 4
INFER, TRAIN = rnn_pb.FORWARD_MODE_INFER, rnn_pb.FORWARD_MODE_TRAIN


def call_unary(replica: Stubs, request: Any) -> Any:
    """Send a request by the method that it is of."""
    name = type(request).__name__.removesuffix("Request")
    services = (replica.models, replica.sessions, replica.rnn)
    return getattr(next(each for each in services if hasattr(each, name)), name)(request)


def call_on_stream(replica: Stubs, request: rnn_pb.ForwardRequest) -> rnn_pb.ForwardResponse:
    """Send a Forward as an operation of Stream."""
    operation = rnn_pb.Operation(tag=1, forward=request)
    (answer,) = replica.rnn.Stream(iter([rnn_pb.StreamRequest(operations=[operation])]))
    forwarded: rnn_pb.ForwardResponse = answer.results[0].forward
    return forwarded


class Trainer:
    """One session of one model, whose requests go to several replicas in turn."""

    def __init__(self, fleet: Sequence[Stubs], model_id: str) -> None:
        self._fleet, self._turn, self._model_id = fleet, 0, model_id
        self._rng, self._steps = np.random.default_rng(13), itertools.count()
        self._version: WeightsVersion | None = None
        spec = models_pb.ModelSpec(
            model_id=model_id, input_size=D, hidden_size=H,
            optimizer=models_pb.Optimizer(adam=models_pb.Adam(lr=0.01)),
        )  # fmt: skip
        self.ask(models_pb.CreateModelRequest(spec=spec, seed=3))
        opening = sessions_pb.OpenSessionRequest(model_id=model_id, batch_size=N)
        self.session = self.ask(opening).session

    @property
    def replica(self) -> Stubs:
        """The replica whose turn it is."""
        return self._fleet[self._turn % len(self._fleet)]

    def ask(self, request: Any, call: Call = call_unary) -> Any:
        """Send a request to the replica whose turn it is."""
        answer = call(self.replica, request)
        self._turn += 1
        return answer

    def send(self, request: Any, call: Call = call_unary) -> Any:
        """Send a request, and again to the next replica, which repeats the answer."""
        answer = self.ask(request, call)
        again = call(self.replica, request)
        assert again.replayed
        again.replayed = False
        if isinstance(again, rnn_pb.BackwardResponse) and again.HasField("update"):
            again.update.replayed = False
        assert again == answer
        return answer

    def forward(
        self, mode: rnn_pb.ForwardMode.ValueType = INFER, call: Call = call_unary
    ) -> Tensor:
        """Apply the next chunk; return its outputs."""
        session = self.session
        request = rnn_pb.ForwardRequest(
            session_id=session.session_id, epoch=session.epoch, chunk_seq=session.chunk_seq + 1,
            previous_token=session.state_token, acknowledged_seq=session.chunk_seq,
            xs=self._draw(N, T, D), mode=mode, minimum_version=self._version,
        )  # fmt: skip
        answer = self.send(request, call)
        session.chunk_seq, session.state_token = answer.chunk_seq, answer.state_token
        hs: Tensor = answer.hs
        return hs

    def backward(self, update: rnn_pb.UpdateRequest | None = None) -> list[Any]:
        """Return the gradients of the newest chunk; with `update`, make a step in the same call."""
        session = self.session
        request = rnn_pb.BackwardRequest(
            session_id=session.session_id, epoch=session.epoch, chunk_seq=session.chunk_seq,
            state_token=session.state_token, dhs=self._draw(N, T, H), update=update,
            return_dxs=True, return_gradients=True,
        )  # fmt: skip
        answer = self.send(request)
        if update is not None:
            self._version = answer.update.version
        return [answer.dxs, answer.dh0, answer.gradients, answer.gradient_norm]

    def make_step(self) -> rnn_pb.UpdateRequest:
        """Make the request of the next step."""
        return rnn_pb.UpdateRequest(
            model_id=self._model_id, request_id=f"step {next(self._steps)}", clip_norm=0.5
        )

    def update(self) -> None:
        """Make a step from the contributions that wait."""
        self._version = self.send(self.make_step()).version

    def restore(self, checkpoint_id: str) -> None:
        """Make the weights and moments of a checkpoint the next version."""
        request = models_pb.RestoreCheckpointRequest(
            model_id=self._model_id, checkpoint_id=checkpoint_id, request_id="restore"
        )
        self._version = self.send(request).version

    def create_checkpoint(self, checkpoint_id: str) -> None:
        """Keep the head's weights and moments."""
        self.ask(
            models_pb.CreateCheckpointRequest(model_id=self._model_id, checkpoint_id=checkpoint_id)
        )

    def weights(self) -> dict[str, bytes]:
        """Read the head's weights and moments."""
        request = models_pb.GetWeightsRequest(
            model_id=self._model_id, version=self._version, include_moments=True
        )
        data = b"".join(part.data for part in self.ask(request))
        return {name: array.tobytes() for name, array in load(data).items()}

    def _draw(self, *shape: int) -> Tensor:
        return to_tensor(self._rng.standard_normal(shape).astype("f4"))


def call_forward(trainer: Trainer) -> Iterator[Any]:
    """Apply chunk after chunk by Forward."""
    for _ in range(3 * STEPS):
        yield trainer.forward()


def stream(trainer: Trainer) -> Iterator[Any]:
    """Apply chunk after chunk by Stream."""
    for _ in range(3 * STEPS):
        yield trainer.forward(call=call_on_stream)


def train(trainer: Trainer) -> Iterator[Any]:
    """Forward, Backward, Update."""
    for _ in range(STEPS):
        yield trainer.forward(TRAIN)
        yield trainer.backward()
        trainer.update()
    yield trainer.weights()


def train_in_two_calls(trainer: Trainer) -> Iterator[Any]:
    """Forward, and Backward with an Update of its own."""
    for _ in range(STEPS):
        yield trainer.forward(TRAIN)
        yield trainer.backward(trainer.make_step())
    yield trainer.weights()


def restore(trainer: Trainer) -> Iterator[Any]:
    """Train, go back to a checkpoint, train on."""
    list(train(trainer))
    trainer.create_checkpoint("kept")
    list(train(trainer))
    trainer.restore("kept")
    yield trainer.weights()
    yield from train(trainer)


@pytest.fixture
def fleet(servers: dict[str, ServiceProcess]) -> Iterator[dict[str, Stubs]]:
    """The stubs of a replica of each release."""
    channels = {name: grpc.insecure_channel(server.address) for name, server in servers.items()}
    yield {name: Stubs.on(channel) for name, channel in channels.items()}
    for channel in channels.values():
        channel.close()


@pytest.mark.parametrize("walk", [call_forward, stream, train, train_in_two_calls, restore])
@pytest.mark.parametrize("order", [("old", "new"), ("new", "old")], ids="-".join)
def test_replicas_of_two_releases_compute_what_one_computes_alone(
    fleet: dict[str, Stubs], model_id: str, order: Order, walk: Walk
) -> None:
    """Outputs, gradients, weights and moments are the same bits, and each call has one effect."""
    alone = Trainer([fleet["new"]], f"{model_id}-alone")
    in_turn = Trainer([fleet[name] for name in order], model_id)
    assert list(walk(in_turn)) == list(walk(alone))


def test_a_replica_refuses_what_it_does_not_know_and_goes_on_with_the_rest(
    fleet: dict[str, Stubs], model_id: str, store_url: str
) -> None:
    """A session with the layout of a release to come is UNSUPPORTED_LAYOUT at the old one, and stays."""
    known, unknown = (Trainer([fleet["old"]], f"{model_id}-{n}") for n in range(2))
    for trainer in (known, unknown):
        trainer.forward()
    key = keys.session_tag(SessionKey("default", unknown.session.session_id))
    with redis.Redis.from_url(store_url) as store:
        store.setrange(key, 0, b"\x02")
        record = store.get(key)
        with pytest.raises(grpc.RpcError) as refused:
            unknown.forward()
        assert store.get(key) == record
        store.delete(key)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "layout 2" in str(refused.value.details())
    known.forward()
