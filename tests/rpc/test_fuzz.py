"""Messages that nobody meant to send: mutated bytes and fields at their edges."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.message import DecodeError

from random_messages import mutated
from service.domain.errors import DomainError
from service.domain.rules import InputRules
from service.rpc.model_messages import initial_weights_from_proto, spec_from_proto
from service.rpc.session_messages import (
    fork_session_from_proto,
    new_epoch_from_proto,
    open_session_from_proto,
)
from service.rpc.time_rnn_messages import OperationReader
from service.settings import Limits
from timernn.v1 import model_service_pb2 as model_pb
from timernn.v1 import session_service_pb2 as session_pb
from timernn.v1 import time_rnn_service_pb2 as pb
from timernn.v1.tensor_pb2 import Tensor, WeightsVersion

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.message import Message

    Decoder = Callable[[Any], object]

RULES = InputRules(Limits())
READER = OperationReader(RULES)
ROUNDS = int(os.environ.get("FUZZ_ROUNDS", "2000"))  # `make security` takes more
TENSOR = Tensor(dtype=1, shape=[1, 2, 3], data=bytes(24))  # type: ignore[arg-type]
STATE = Tensor(dtype=1, shape=[1, 3], data=bytes(12))  # type: ignore[arg-type]
SQUARE = Tensor(dtype=1, shape=[3, 3], data=bytes(36))  # type: ignore[arg-type]
BIAS = Tensor(dtype=1, shape=[3], data=bytes(12))  # type: ignore[arg-type]
VERSION = WeightsVersion(number=3, digest=b"d" * 16)
SELECTOR = pb.ContributionSelector(session_id="s", epoch=1, chunk_seqs=[1, 2])
UPDATE = pb.UpdateRequest(
    model_id="m", contributions=[SELECTOR], request_id="r", learning_rate=0.1, expected_version=VERSION
)  # fmt: skip


def check_creation(message: model_pb.CreateModelRequest) -> None:
    """Read and check a new model, as its use case does."""
    RULES.check_spec(spec_from_proto(message.spec))
    RULES.check_initial_weights(initial_weights_from_proto(message, RULES))


SEEDS: list[tuple[Message, Decoder]] = [
    (pb.ForwardRequest(session_id="s", epoch=1, chunk_seq=1, xs=TENSOR, pinned_version=VERSION), lambda m: RULES.check_forward(READER.forward(m))),
    (pb.ForwardRequest(model_id="m", xs=TENSOR, h0=STATE), lambda m: RULES.check_forward(READER.forward(m))),
    (pb.BackwardRequest(session_id="s", epoch=1, chunk_seq=1, state_token=b"t" * 16, dhs=TENSOR, dh_next=STATE, update=UPDATE), lambda m: RULES.check_backward(READER.backward(m))),
    (UPDATE, lambda m: RULES.check_update(READER.update(m))),
    (pb.DiscardGradientsRequest(model_id="m", contributions=[SELECTOR]), lambda m: RULES.check_discard(READER.discard(m))),
    (session_pb.OpenSessionRequest(model_id="m", initial_state=STATE, on_exists=2), lambda m: RULES.check_open(open_session_from_proto(m, RULES))),  # type: ignore[arg-type]
    (session_pb.SetStateRequest(session_id="s", state=STATE, expected_chunk_seq=1), lambda m: RULES.check_new_epoch(new_epoch_from_proto(m, RULES))),
    (session_pb.ForkSessionRequest(session_id="s", new_session_id="t"), lambda m: RULES.check_fork(fork_session_from_proto(m, RULES))),
    (model_pb.CreateModelRequest(spec=model_pb.ModelSpec(model_id="m", input_size=2, hidden_size=3, optimizer=model_pb.Optimizer(adam_w=model_pb.AdamW(lr=0.1))), given=model_pb.GivenWeights(wx=STATE, wh=SQUARE, b=BIAS)),
     check_creation),
]  # fmt: skip


@pytest.mark.parametrize(("seed", "decode"), SEEDS, ids=lambda value: type(value).__name__)
def test_mutated_messages_are_read_or_refused(seed: Message, decode: Decoder) -> None:
    """Whatever the bytes are, nothing but a refusal comes out, and no value out of its range."""
    source = random.Random(20_251_124)
    raw = seed.SerializeToString()
    decode(seed)
    kind, refused = type(seed), 0
    for _ in range(ROUNDS):
        try:
            decode(kind.FromString(mutated(raw, source)))
        except (DecodeError, DomainError):
            refused += 1
    assert 0 < refused < ROUNDS
