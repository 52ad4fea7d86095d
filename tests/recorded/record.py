"""Record what a release writes into a store, and how it goes on from there.

    python tests/recorded/record.py CHECKOUT NAME

starts the server of a checkout (with its own .venv where it has one) on an empty store, brings the store
into every state that matters to a later release, and writes `tests/recorded/NAME.jsonl`: the store's keys, then
calls with the answers that this server gave after it was recorded. Later releases get the same calls.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import redis

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from recorded_store import Recording, to_text  # noqa: E402

from service.store.embedded import EmbeddedStore  # noqa: E402
from timernn.v1 import model_service_pb2 as model_pb  # noqa: E402
from timernn.v1 import session_service_pb2 as session_pb  # noqa: E402
from timernn.v1 import tensor_pb2 as tensor_pb  # noqa: E402
from timernn.v1 import time_rnn_service_pb2 as pb  # noqa: E402
from timernn.v1.model_service_pb2_grpc import ModelServiceStub  # noqa: E402
from timernn.v1.session_service_pb2_grpc import SessionServiceStub  # noqa: E402
from timernn.v1.time_rnn_service_pb2_grpc import TimeRnnServiceStub  # noqa: E402

READY = "timernn ready on "
N, T, D, H = 2, 3, 3, 4
LARGE = 1100  # H of a model whose gradient is kept in parts: more than 4 MiB
TRAIN = pb.FORWARD_MODE_TRAIN


class Recorder:
    """Makes the calls, and remembers those after the recording with their answers."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, [("grpc.max_receive_message_length", -1)])
        self._stubs: list[Any] = [
            stub(self._channel)
            for stub in (ModelServiceStub, SessionServiceStub, TimeRnnServiceStub)
        ]
        self._rng = np.random.default_rng(5)
        self.answers: list[dict[str, Any]] = []

    def __call__(self, request: Any) -> Any:
        """Make the call that a request is of."""
        name = type(request).__name__.removesuffix("Request")
        stub = next(stub for stub in self._stubs if hasattr(stub, name))
        answer = getattr(stub, name)(request, timeout=60)
        self.answers.append(
            {
                "request": type(request).__name__,
                "sent": to_text(request.SerializeToString()),
                "answer": to_text(answer.SerializeToString()),
            }
        )
        return answer

    def tensor(self, *shape: int, dtype: str = "<f4", scale: float = 1.0) -> tensor_pb.Tensor:
        """Make a tensor of normal values; scale 0: of zeros."""
        array = (scale * self._rng.standard_normal(shape) + 0.0).astype(
            dtype
        )  # no -0.0: zeros compress
        wire = tensor_pb.D_TYPE_FLOAT32 if dtype == "<f4" else tensor_pb.D_TYPE_FLOAT64
        return tensor_pb.Tensor(dtype=wire, shape=shape, data=array.tobytes())


class Walk:
    """One session of one model, chunk after chunk, as a client would number it."""

    def __init__(
        self, call: Recorder, model_id: str, session_id: str, sizes: tuple[int, int, int, int],
        *, dtype: str = "<f4", scale: float = 1.0,
    ) -> None:  # fmt: skip
        self._call, self._model_id, self._id = call, model_id, session_id
        self._sizes, self._dtype, self._scale = sizes, dtype, scale
        opening = session_pb.OpenSessionRequest(
            model_id=model_id, session_id=session_id, batch_size=sizes[0],
            on_exists=session_pb.ON_EXISTS_FAIL, request_id=f"open-{session_id}",
        )  # fmt: skip
        self.epoch = call(opening).session.epoch
        self.chunk_seq, self.token = 0, b""

    def forward(
        self, mode: Any = pb.FORWARD_MODE_INFER, acknowledged: int = 0
    ) -> pb.ForwardRequest:
        """Apply the next chunk; return the request, to be sent again later."""
        rows, steps, inputs, _ = self._sizes
        request = pb.ForwardRequest(
            session_id=self._id, epoch=self.epoch, chunk_seq=self.chunk_seq + 1,
            previous_token=self.token, acknowledged_seq=acknowledged, mode=mode,
            xs=self._call.tensor(rows, steps, inputs, dtype=self._dtype, scale=self._scale),
            return_hs=pb.RETURN_HS_ALL,
        )  # fmt: skip
        answer = self._call(request)
        self.chunk_seq, self.token = answer.chunk_seq, answer.state_token
        return request

    def backward(self) -> pb.BackwardRequest:
        """Leave the contribution of the newest chunk; return the request."""
        rows, steps, _, hidden = self._sizes
        request = pb.BackwardRequest(
            session_id=self._id, epoch=self.epoch, chunk_seq=self.chunk_seq, state_token=self.token,
            dhs=self._call.tensor(rows, steps, hidden, dtype=self._dtype, scale=self._scale),
            return_dxs=True,
        )  # fmt: skip
        self._call(request)
        return request

    def update(self, request_id: str, *chunks: int) -> pb.UpdateRequest:
        """Make a step of some chunks' contributions; return the request."""
        named = pb.ContributionSelector(
            session_id=self._id, epoch=self.epoch, chunk_seqs=chunks or [self.chunk_seq]
        )
        request = pb.UpdateRequest(
            model_id=self._model_id, contributions=[named], request_id=request_id,
            reduction=pb.REDUCTION_SUM,
        )  # fmt: skip
        self._call(request)
        return request


def record(call: Recorder, store: redis.Redis, release: str) -> Recording:
    """Bring the store into its states, record it, go on."""
    spec = model_pb.ModelSpec(
        model_id="adam", input_size=D, hidden_size=H,
        optimizer=model_pb.Optimizer(adam=model_pb.Adam(lr=0.01)),
    )  # fmt: skip
    call(model_pb.CreateModelRequest(spec=spec, seed=7, request_id="create-adam"))
    momentum = model_pb.Optimizer(momentum=model_pb.Momentum())
    spec = model_pb.ModelSpec(
        model_id="double", input_size=D, hidden_size=H, dtype=tensor_pb.D_TYPE_FLOAT64,
        optimizer=momentum,
    )  # fmt: skip
    call(model_pb.CreateModelRequest(spec=spec, seed=8, request_id="create-double"))
    spec = model_pb.ModelSpec(model_id="large", input_size=1, hidden_size=LARGE)
    zeros = model_pb.GivenWeights(
        wx=call.tensor(1, LARGE, scale=0), wh=call.tensor(LARGE, LARGE, scale=0),
        b=call.tensor(LARGE, scale=0),
    )  # fmt: skip
    call(model_pb.CreateModelRequest(spec=spec, given=zeros, request_id="create-large"))

    # Superseded versions, a checkpoint with its moments, remembered requests, consumed contributions and
    # tapes, then one contribution and one tape that wait.
    trainer = Walk(call, "adam", "trainer", (N, T, D, H))
    for step in range(3):
        trainer.forward(TRAIN, acknowledged=trainer.chunk_seq)
        backward = trainer.backward()
        update = trainer.update(f"step-{step}")
        if step == 1:
            call(model_pb.CreateCheckpointRequest(model_id="adam", checkpoint_id="kept"))
    trainer.forward(TRAIN, acknowledged=trainer.chunk_seq)
    waiting = trainer.backward()
    taped = trainer.forward(TRAIN, acknowledged=trainer.chunk_seq)

    streamer = Walk(call, "adam", "streamer", (1, T, D, H))
    sent = [streamer.forward() for _ in range(7)]  # nothing acknowledged: the ring has grown

    double = Walk(call, "double", "double", (N, T, D, H), dtype="<f8")
    state = call.tensor(N, H, dtype="<f8", scale=0.1)
    answer = call(session_pb.SetStateRequest(session_id="double", state=state, request_id="set"))
    double.epoch, double.chunk_seq = answer.session.epoch, 0
    double.token = answer.session.state_token
    double.forward(TRAIN)
    double.backward()
    double.update("double-step")

    large = Walk(call, "large", "large", (1, 1, 1, LARGE), scale=0)
    large.forward(TRAIN)
    in_parts = large.backward()

    Walk(call, "adam", "closed", (1, T, D, H)).forward()
    call(session_pb.CloseSessionRequest(session_id="closed"))

    recording = Recording.of(store, release)
    call.answers.clear()
    for request in (*sent[-4:], backward, waiting, taped, in_parts, update):
        call(request)  # each was answered before: replayed
    for session_id in ("trainer", "streamer", "double", "large"):
        call(session_pb.GetStateRequest(session_id=session_id))
    streamer.forward()
    double.forward(TRAIN)
    double.backward()
    trainer.backward()  # of the tape that waited
    trainer.update("step-3", 4, 5)
    large.update("large-step")
    call(model_pb.ListCheckpointsRequest(model_id="adam"))
    call(
        model_pb.RestoreCheckpointRequest(model_id="adam", checkpoint_id="kept", request_id="back")
    )
    for model_id in ("adam", "double", "large"):
        call(model_pb.GetModelRequest(model_id=model_id))
    recording.answers = list(call.answers)
    return recording


def main() -> None:
    """Record one release."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="the release's checkout")
    parser.add_argument("name", help="of the recording")
    options = parser.parse_args()
    checkout = options.checkout.resolve()
    own = checkout / ".venv" / "bin" / "python"
    python = own if own.exists() else Path(sys.executable)
    with tempfile.TemporaryDirectory() as folder, EmbeddedStore(Path(folder)) as running:
        command = ["env", f"PYTHONPATH={checkout}", str(python), "-P", "-m", "service", "serve"]
        command += ["--listen", "127.0.0.1:0", "--redis-url", running.url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            address = server.stdout.readline().removeprefix(READY).strip()
            began = time.monotonic()
            with redis.Redis.from_url(running.url) as store:
                recording = record(Recorder(address), store, options.name)
            server.terminate()
    path = HERE / f"{options.name}.jsonl"
    recording.save(path)
    print(
        f"{path.name}: {len(recording.records)} keys, {len(recording.answers)} answers, "
        f"{path.stat().st_size:,} bytes, in {time.monotonic() - began:.1f} s"
    )


if __name__ == "__main__":
    main()
