"""The stages of a chunk inside the server, each called as the server calls it, with no network around it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks.harness import Contestants
from benchmarks.load.timernn_adapter import tensor
from benchmarks.load.workload import SMALL, Array, make_chunk, make_weights
from rnn_engine import Params, rnn_forward, rnn_forward_many
from service.domain.digests import chunk_digest, next_token
from service.domain.ports import ChunkCommit, StoredState
from service.domain.rules import InputRules
from service.domain.types import ForwardResult, SessionKey, Version
from service.rpc.codec import Codec
from service.rpc.time_rnn_messages import OperationReader, fill_forward
from service.settings import Limits
from service.store import keys, layouts
from timernn.v1 import time_rnn_service_pb2 as pb

BATCHES = (1, 16, 64)
SESSION, TENANT = "load-12345-0-0", "default"
VERSION = Version(1, b"v" * 16)
TOKEN = b"t" * 16
# More than one chunk's memory, as a server sees them: what is always in the cache is too quick.
COPIES = 64


class Stages:
    """One chunk's way in pieces; every piece takes what the one before it made."""

    def __init__(self) -> None:
        """Make the messages, the state and the weights."""
        limits = Limits()
        self._codec = Codec(limits.message_bytes)
        self._reader = OperationReader(InputRules(limits))
        self._params = Params(**make_weights(SMALL))
        self._h0 = np.zeros((1, SMALL.hidden), np.float32)
        self._requests = {count: _request(count).SerializeToString() for count in BATCHES}
        message = self._parse(1)
        self._operations = [message.operations[0].forward for _ in range(COPIES)]
        self._xs = [make_chunk(SMALL)[None] for _ in range(COPIES)]
        self._hs = [rnn_forward(self._params, xs, self._h0).hs for xs in self._xs]
        self._commits = [self._commit(hs) for hs in self._hs]
        self._results = [self._result(hs) for hs in self._hs]

    def contestants(self) -> Contestants:
        """Return what to time, by stage and batch: each call does COPIES chunks, in batches."""
        in_turn: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
            "decode, check": (self._decode, self._operations),
            "digest, token": (_digest, self._xs),
            "commit: made": (self._commit, self._hs),
            "commit: laid out": (_lay_out, self._commits),
            "encode": (_encode, self._results),
        }
        calls: dict[str, Callable[[], Any]] = {
            f"parse/{count}": partial(self._parse_all, count) for count in BATCHES
        }
        calls |= {
            f"{name}/1": partial(_each, step, inputs) for name, (step, inputs) in in_turn.items()
        }
        calls |= {f"engine/{count}": partial(self._compute, count) for count in BATCHES}
        return calls

    def _parse_all(self, count: int) -> list[pb.StreamRequest]:
        return [self._parse(count) for _ in range(COPIES // count)]

    def _parse(self, count: int) -> pb.StreamRequest:
        return self._codec.parse(pb.StreamRequest, self._requests[count])

    def _decode(self, request: pb.ForwardRequest) -> object:
        return self._reader.forward(request)

    def _compute(self, count: int) -> None:
        for first in range(0, COPIES, count):
            xs = self._xs[first : first + count]
            if count == 1:
                rnn_forward(self._params, xs[0], self._h0)
            else:
                rnn_forward_many(self._params, xs, [self._h0] * count)

    def _commit(self, hs: Array) -> ChunkCommit:
        h = hs[:, -1].copy()
        state = StoredState(1, TOKEN, TOKEN, VERSION, h.tobytes())
        return ChunkCommit(SessionKey(TENANT, SESSION), 1, TOKEN, state, 0)

    def _result(self, hs: Array) -> ForwardResult:
        return ForwardResult(SESSION, 1, 1, hs, hs[:, -1].copy(), VERSION, TOKEN, False)


def _each(step: Callable[[Any], Any], inputs: list[Any]) -> list[Any]:
    return [step(one) for one in inputs]


def _request(count: int) -> pb.StreamRequest:
    forward = pb.ForwardRequest(
        session_id=SESSION, epoch=1, chunk_seq=1, xs=tensor(make_chunk(SMALL)[None])
    )
    return pb.StreamRequest(operations=[pb.Operation(tag=1, forward=forward)] * count)


def _digest(xs: Array) -> bytes:
    return next_token(TOKEN, chunk_digest(xs, train=False), VERSION)


def _lay_out(commit: ChunkCommit) -> tuple[bytes, Any]:
    tag = keys.session_tag(commit.key)
    return keys.record_key(tag), layouts.commit_to_parts(commit)


def _encode(result: ForwardResult) -> bytes:
    response = pb.StreamResponse()
    answer = response.results.add()
    answer.tag = 1
    fill_forward(answer.forward, result)
    return response.SerializeToString()
