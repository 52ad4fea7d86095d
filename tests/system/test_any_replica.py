"""Any replica at any call: two server processes on one store against one local TimeRNN."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load

import rnn_engine
from replicas import to_array, to_tensor
from rnn_engine import Adam, Params, TimeRNN
from timernn.v1 import model_service_pb2 as models_pb
from timernn.v1 import session_service_pb2 as sessions_pb
from timernn.v1 import time_rnn_service_pb2 as rnn_pb
from timernn.v1.tensor_pb2 import DType

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

    from replicas import TwoReplicas
    from timernn.v1.tensor_pb2 import WeightsVersion

N, T, D, H = 4, 6, 8, 16
STEPS = 100
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


def create(replicas: TwoReplicas, rng: Generator, dtype: str) -> tuple[str, TimeRNN]:
    """Create a model with given weights, and the local layer with the same."""
    Wx, Wh = rng.standard_normal((D, H)) / D, rng.standard_normal((H, H)) / H
    local = TimeRNN(Wx.astype(dtype), Wh.astype(dtype), np.zeros(H, dtype), stateful=True)
    spec = models_pb.ModelSpec(
        model_id=f"m{uuid.uuid4().hex}",
        input_size=D,
        hidden_size=H,
        dtype=DType.Value(f"D_TYPE_{dtype.upper()}"),
        optimizer=models_pb.Optimizer(adam=models_pb.Adam(lr=1e-2)),
    )
    wx, wh, b = map(to_tensor, local.params)
    given = models_pb.GivenWeights(wx=wx, wh=wh, b=b)
    replicas.next.models.CreateModel(models_pb.CreateModelRequest(spec=spec, given=given))
    return spec.model_id, local


def open_session(replicas: TwoReplicas, model_id: str) -> sessions_pb.Session:
    """Open a session of N rows."""
    request = sessions_pb.OpenSessionRequest(model_id=model_id, batch_size=N)
    session: sessions_pb.Session = replicas.next.sessions.OpenSession(request).session
    return session


def forward(
    replicas: TwoReplicas,
    session: sessions_pb.Session,
    xs: NDArray[Any],
    mode: rnn_pb.ForwardMode.ValueType,
    version: WeightsVersion | None = None,
) -> rnn_pb.ForwardResponse:
    """Apply the session's next chunk at the replica whose turn it is, and keep count."""
    request = rnn_pb.ForwardRequest(
        session_id=session.session_id,
        epoch=session.epoch,
        chunk_seq=session.chunk_seq + 1,
        previous_token=session.state_token,
        xs=to_tensor(xs),
        mode=mode,
        minimum_version=version,
    )
    answer: rnn_pb.ForwardResponse = replicas.next.rnn.Forward(request)
    session.chunk_seq, session.state_token = answer.chunk_seq, answer.state_token
    return answer


def read_weights(replicas: TwoReplicas, model_id: str) -> dict[str, NDArray[Any]]:
    """Read the head's weights."""
    parts = replicas.next.models.GetWeights(models_pb.GetWeightsRequest(model_id=model_id))
    return load(b"".join(part.data for part in parts))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_streamed_session_that_changes_replica_at_every_chunk_equals_a_local_layer(
    replicas: TwoReplicas, rng: Generator, dtype: str
) -> None:
    """Outputs and state of a session do not depend on which replica took which chunk."""
    model_id, local = create(replicas, rng, dtype)
    session = open_session(replicas, model_id)
    for _ in range(30):
        xs = rng.standard_normal((N, T, D)).astype(dtype)
        answer = forward(replicas, session, xs, rnn_pb.FORWARD_MODE_INFER)
        np.testing.assert_allclose(
            to_array(answer.hs), local.forward(xs), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_training_that_changes_replica_at_every_call_equals_local_training(
    replicas: TwoReplicas, rng: Generator, dtype: str
) -> None:
    """A hundred steps through two replicas give the weights of the same steps made locally."""
    model_id, local = create(replicas, rng, dtype)
    session = open_session(replicas, model_id)
    moments = rnn_engine.init_moments(Adam(lr=1e-2), Params(*local.params))
    version: WeightsVersion | None = None
    for step in range(STEPS):
        xs = rng.standard_normal((N, T, D)).astype(dtype)
        dhs = rng.standard_normal((N, T, H)).astype(dtype)
        answer = forward(replicas, session, xs, rnn_pb.FORWARD_MODE_TRAIN, version)
        replicas.next.rnn.Backward(
            rnn_pb.BackwardRequest(
                session_id=session.session_id,
                epoch=session.epoch,
                chunk_seq=answer.chunk_seq,
                state_token=answer.state_token,
                dhs=to_tensor(dhs),
            )
        )
        request = rnn_pb.UpdateRequest(model_id=model_id, request_id=f"step {step}")
        version = replicas.next.rnn.Update(request).version
        local.forward(xs)
        local.backward(dhs)
        params = Params(*local.params)
        grads = params.spec.pack(local.grads)
        stepped, moments = rnn_engine.apply_update(Adam(lr=1e-2), params, grads, moments)
        for old, new in zip(local.params, (stepped.Wx, stepped.Wh, stepped.b), strict=True):
            old[...] = new
    weights = read_weights(replicas, model_id)
    for name, expected in zip(("Wx", "Wh", "b"), local.params, strict=True):
        np.testing.assert_allclose(weights[name], expected, rtol=TOLERANCE[dtype])
