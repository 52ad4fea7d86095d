"""Clients that ask for much and read little: they cost the server bounded memory, and only them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from scenes.figures import figure
from scenes.fleet import Fleet
from scenes.wire import TIMEOUT_S, Model, Wire, draw, steady_traffic, told
from timernn._core.convert import tensor_to_proto
from timernn.v1 import model_service_pb2 as model_pb
from timernn.v1 import session_service_pb2 as session_pb
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from instruments.report import Proof

STREAMS = 100
CHUNKS = 64  # a stream
STEPS, INPUTS, HIDDEN = 64, 2, 256
ANSWER_BYTES = STEPS * HIDDEN * 4
# What a stream may hold on the server: an answer being written, answers that wait to be read, the
# window of its connection.
MESSAGE_BYTES = 128 << 10
WINDOW_BYTES = 64 << 10
FIXED_BYTES = 30 << 20  # what 100 sessions and streams are, whoever reads


class Hog:
    """A stream that asks for many big answers and reads the first."""

    def __init__(self, wire: Wire, number: int) -> None:
        """Take the connection."""
        self._wire, self._id = wire, f"hog{number}"
        self._call: Any = None
        self.answers = 0

    async def start(self, xs: np.ndarray[Any, Any]) -> None:
        """Open a session, ask for all chunks, read one answer."""
        opening = session_pb.OpenSessionRequest(
            model_id="wide", session_id=self._id, on_exists=session_pb.ON_EXISTS_RESET
        )
        opened = await told(self._wire.sessions.OpenSession(opening, timeout=TIMEOUT_S))
        self._call = self._wire.rnn.Stream(timeout=TIMEOUT_S * 2)
        for number in range(1, CHUNKS + 1):
            forward = rnn_pb.ForwardRequest(
                session_id=self._id,
                epoch=opened.session.epoch,
                chunk_seq=number,
                xs=tensor_to_proto(xs),
                mode=rnn_pb.FORWARD_MODE_INFER,
            )
            operation = rnn_pb.Operation(tag=number, forward=forward)
            await self._call.write(rnn_pb.StreamRequest(operations=[operation]))
        await self._read()

    async def finish(self) -> None:
        """Read what is left."""
        while self.answers < CHUNKS:
            await self._read()
        await self._call.done_writing()
        await self._call.read()

    def cancel(self) -> None:
        """Go away."""
        self._call.cancel()

    async def _read(self) -> None:
        for result in (await self._call.read()).results:
            assert result.WhichOneof("result") == "forward", result
            self.answers += 1
            assert result.tag == self.answers


@pytest.mark.timeout(300)
@pytest.mark.promise("R17", "a client that reads slowly costs bounded memory")
@figure("pause_s", 10, 60)
async def test_a_hundred_streams_that_do_not_read_cost_bounded_memory(
    proof: Proof, seed: int, pause_s: int
) -> None:
    """They ask for 400 MB of answers; the server holds back, others are served, all is there at last."""
    rng = np.random.default_rng(seed)
    with Fleet(1, "--limit-message-bytes", str(MESSAGE_BYTES)) as fleet:
        replica = fleet.replicas[0]
        async with Wire(fleet.addresses[0]) as wire, Wire(fleet.addresses[0]) as other:
            spec = model_pb.ModelSpec(model_id="wide", input_size=INPUTS, hidden_size=HIDDEN)
            create = model_pb.CreateModelRequest(spec=spec, seed=1)
            await told(wire.models.CreateModel(create, timeout=TIMEOUT_S))
            model = await Model.create(wire, rng, "narrow")
            writers = await steady_traffic(proof, [other], model, rng)
            before = replica.rss_bytes()
            hogs = [Hog(wire, number) for number in range(STREAMS - 1)]
            xs = rng.standard_normal((1, STEPS, INPUTS)).astype(np.float32)
            await asyncio.gather(*(hog.start(xs) for hog in hogs))
            proof.hit("stream that stopped reading", len(hogs))
            most = await watch(replica, other, writers, rng, proof, pause_s)
            grown, allowed = most - before, FIXED_BYTES + STREAMS * (MESSAGE_BYTES + WINDOW_BYTES)
            proof.figures["grown MB"] = grown / 1e6
            proof.figures["asked for MB"] = len(hogs) * CHUNKS * ANSWER_BYTES / 1e6
            proof.require(
                grown < allowed, f"{grown / 1e6:.0f} MB, {allowed / 1e6:.0f} were allowed"
            )
            for hog in hogs[: len(hogs) // 2]:
                hog.cancel()
            await asyncio.gather(*(hog.finish() for hog in hogs[len(hogs) // 2 :]))
            proof.checked(sum(hog.answers for hog in hogs))


async def watch(
    replica: Any,
    wire: Wire,
    writers: list[Any],
    rng: np.random.Generator,
    proof: Proof,
    seconds: int,
) -> int:
    """Serve others meanwhile; return the most memory that the replica had."""
    loop, most = asyncio.get_running_loop(), 0
    end = loop.time() + seconds
    while loop.time() < end:
        for writer in writers:
            xs = draw(rng)
            writer.check(await wire.forward(writer.chunk(xs), 5.0), xs, proof)
        most = max(most, replica.rss_bytes())
        await asyncio.sleep(0.1)
    return most
