"""A trainer that says where each of its three calls goes, and sends nothing twice by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scenes.wire import TIMEOUT_S, H, answer_of, draw, head_of
from timernn.v1 import tensor_pb2
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    import numpy as np

    from scenes.wire import Model, Wire, Writer


@dataclass
class Trainer:
    """One training session of a model."""

    model: Model
    writer: Writer
    rng: np.random.Generator
    known: tensor_pb2.WeightsVersion | None = None

    @classmethod
    async def start(
        cls, model: Model, wire: Wire, rng: np.random.Generator, **fields: Any
    ) -> Trainer:
        """Open a session to train with."""
        return cls(model, await model.open(wire, **fields), rng)

    async def taped(self, wire: Any) -> rnn_pb.BackwardRequest:
        """Apply a drawn chunk in training mode; make the request of its Backward."""
        # Without it a replica may serve a head that is a moment old, and the run be another.
        request = self.writer.chunk(draw(self.rng), train=True, minimum_version=self.known)
        answer = await wire.forward(request)
        self.writer.took(answer)
        return self.writer.backward(draw(self.rng, size=H))

    async def record(self, wire: Any, request: rnn_pb.BackwardRequest) -> Any:
        """Send a Backward, which records its contribution."""
        return await answer_of(wire.rnn.Backward(request, timeout=TIMEOUT_S))

    def update(self, request_id: str, expected: tuple[int, bytes] | None = None) -> Any:
        """Lay out a step over all that waits."""
        request = rnn_pb.UpdateRequest(model_id=self.model.model_id, request_id=request_id)
        if expected is not None:
            version = tensor_pb2.WeightsVersion(number=expected[0], digest=expected[1])
            request.expected_version.CopyFrom(version)
        return request

    async def step(self, wire: Any, request: rnn_pb.UpdateRequest) -> Any:
        """Send an Update; chunks from now on see its version."""
        made = await answer_of(wire.rnn.Update(request, timeout=TIMEOUT_S))
        self.known = made.version
        return made

    async def whole_step(self, wire: Wire, request_id: str) -> None:
        """Forward, Backward and Update on one replica."""
        await self.record(wire, await self.taped(wire))
        await self.step(wire, self.update(request_id))

    async def head(self, wire: Wire) -> tuple[int, bytes]:
        """Read number and digest of the newest version."""
        return await head_of(wire, self.model.model_id)
