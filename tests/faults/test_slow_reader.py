"""Clients that ask for much and read little: they cost the server bounded memory, and only them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from scenes.figures import figure
from scenes.fleet import Fleet
from scenes.wire import TIMEOUT_S, Model, Wire, answer_of, draw, steady_traffic
from service.compute.scheduler import MAX_BATCH_BYTES
from timernn._core.convert import tensor_to_proto
from timernn.v1 import model_service_pb2 as model_pb
from timernn.v1 import session_service_pb2 as session_pb
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from instruments.report import Proof

INPUTS, HIDDEN = 2, 256
WINDOW_BYTES = 64 << 10
FIXED_BYTES = 30 << 20  # what 100 sessions and streams are, whoever reads
OPERATION_BYTES = 4 << 10  # one that was read and waits


@dataclass(frozen=True)
class Case:
    """What clients that do not read ask for.

    Attributes:
        streams: How many of them.
        operations: Each stream's.
        frame: Operations a message; those of a frame have no session and need not wait for each other.
        steps: T of each.
        message_bytes: The server's limit.
        messages: How many of the largest messages a stream may hold on the server. Chunks of a session
            are computed one after another, so one is enough. Those of a frame wait as answers for one
            message and are on their way to become answers for another, and the message being written
            is there twice, here and in gRPC.
    """

    streams: int
    operations: int
    frame: int
    steps: int
    message_bytes: int
    messages: int

    @property
    def asked_bytes(self) -> int:
        """The bytes of all answers that were asked for."""
        return self.streams * self.operations * self.steps * HIDDEN * 4

    @property
    def allowed_bytes(self) -> int:
        """What the server may grow by, at its worst moment; it does not depend on what is asked for."""
        # An operation is started while there is room for any of its answer: it may go beyond.
        held = self.message_bytes + self.steps * HIDDEN * 4
        stream = self.messages * held + WINDOW_BYTES + self.frame * OPERATION_BYTES
        joined = 0  # one forward of many: its hidden states, and its inputs times Wx
        if self.frame > 1:
            joined = 2 * min(MAX_BATCH_BYTES, self.streams * self.message_bytes)
        return FIXED_BYTES + self.streams * stream + joined


CASES = {
    "one at a time": Case(99, 64, 1, 64, 128 << 10, 1),
    "frames": Case(99, 64, 64, 64, 128 << 10, 4),
    "frames of big answers": Case(4, 200, 200, 4096, 16 << 20, 4),
}


class Hog:
    """A stream that asks for many answers and reads the first."""

    def __init__(self, wire: Wire, case: Case, number: int) -> None:
        """Take the connection."""
        self._wire, self._case, self._id = wire, case, f"hog{number}"
        self._call: Any = None
        self._answered: set[int] = set()

    @property
    def answers(self) -> int:
        """How many different operations were answered."""
        return len(self._answered)

    async def start(self, xs: np.ndarray[Any, Any]) -> None:
        """Ask for everything, read one message."""
        place = await self._place()
        self._call = self._wire.rnn.Stream(timeout=TIMEOUT_S * 2)
        operations = [
            rnn_pb.Operation(
                tag=number,
                forward=rnn_pb.ForwardRequest(
                    chunk_seq=number if self._case.frame == 1 else 0,
                    xs=tensor_to_proto(xs),
                    mode=rnn_pb.FORWARD_MODE_INFER,
                    **place,
                ),
            )
            for number in range(1, self._case.operations + 1)
        ]
        for at in range(0, len(operations), self._case.frame):
            frame = operations[at : at + self._case.frame]
            await self._call.write(rnn_pb.StreamRequest(operations=frame))
        await self._read()

    async def finish(self) -> None:
        """Read what is left."""
        while self.answers < self._case.operations:
            await self._read()
        await self._call.done_writing()
        await self._call.read()

    def cancel(self) -> None:
        """Cancel the call without reading it."""
        self._call.cancel()

    async def _place(self) -> dict[str, Any]:
        """Return what names the session, or the model where there is none."""
        if self._case.frame > 1:
            return {"model_id": "wide"}
        opening = session_pb.OpenSessionRequest(
            model_id="wide", session_id=self._id, on_exists=session_pb.ON_EXISTS_RESET
        )
        opened = await answer_of(self._wire.sessions.OpenSession(opening, timeout=TIMEOUT_S))
        return {"session_id": self._id, "epoch": opened.session.epoch}

    async def _read(self) -> None:
        for result in (await self._call.read()).results:
            assert result.WhichOneof("result") == "forward", result
            assert result.tag not in self._answered
            self._answered.add(result.tag)


@pytest.mark.timeout(300)
@pytest.mark.promise("R17", "a client that reads slowly costs bounded memory")
@pytest.mark.parametrize("kind", CASES)
@figure("pause_s", 10, 60)
async def test_streams_that_do_not_read_cost_bounded_memory(
    proof: Proof, seed: int, pause_s: int, kind: str
) -> None:
    """They ask for hundreds of MB of answers; others are served meanwhile, all is there at last."""
    rng, case = np.random.default_rng(seed), CASES[kind]
    with Fleet(1, "--limit-message-bytes", str(case.message_bytes)) as fleet:
        replica = fleet.replicas[0]
        async with Wire(fleet.addresses[0]) as wire, Wire(fleet.addresses[0]) as other:
            spec = model_pb.ModelSpec(model_id="wide", input_size=INPUTS, hidden_size=HIDDEN)
            create = model_pb.CreateModelRequest(spec=spec, seed=1)
            await answer_of(wire.models.CreateModel(create, timeout=TIMEOUT_S))
            model = await Model.create(wire, rng, "narrow")
            writers = await steady_traffic(proof, [other], model, rng)
            before = replica.rss_bytes()
            hogs = [Hog(wire, case, number) for number in range(case.streams)]
            xs = rng.standard_normal((1, case.steps, INPUTS)).astype(np.float32)
            await asyncio.gather(*(hog.start(xs) for hog in hogs))
            proof.hit(f"{kind}: stream that stopped reading", len(hogs))
            await serve_others(other, writers, rng, proof, pause_s)
            grown = replica.peak_rss_bytes() - before
            proof.figures[f"{kind}: grown MB"] = grown / 1e6
            proof.figures[f"{kind}: asked for MB"] = case.asked_bytes / 1e6
            proof.require(
                grown < case.allowed_bytes,
                f"{kind}: {grown / 1e6:.0f} MB, {case.allowed_bytes / 1e6:.0f} were allowed",
            )
            for hog in hogs[: len(hogs) // 2]:
                hog.cancel()
            await asyncio.gather(*(hog.finish() for hog in hogs[len(hogs) // 2 :]))
            proof.checked(sum(hog.answers for hog in hogs))


async def serve_others(
    wire: Wire, writers: list[Any], rng: np.random.Generator, proof: Proof, seconds: int
) -> None:
    """Serve sessions whose clients read, for so long."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while loop.time() < end:
        for writer in writers:
            xs = draw(rng)
            writer.check(await wire.forward(writer.chunk(xs), 5.0), xs, proof)
        await asyncio.sleep(0.1)
