"""Asks one replica once, without the client library's patience, and times the answer."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from timernn import errors
from timernn._core.convert import tensor_to_proto
from timernn._core.status import error_from_rpc
from timernn.v1 import session_service_pb2 as session_pb
from timernn.v1 import time_rnn_service_pb2 as rnn_pb
from timernn.v1.session_service_pb2_grpc import SessionServiceStub
from timernn.v1.time_rnn_service_pb2_grpc import TimeRnnServiceStub

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from instruments.report import Proof

    Array = NDArray[Any]

TIMEOUT_S = 30.0


@dataclass(slots=True)
class Reply:
    """One answer: what it was, when it was asked for, how long it took (s)."""

    at: float
    took_s: float
    answer: Any = None
    error: errors.Error | None = None


class Probe:
    """The stubs of one replica over a connection of its own."""

    def __init__(self, address: str) -> None:
        """Connect to the replica."""
        self.channel = grpc.insecure_channel(address)
        self.sessions: Any = SessionServiceStub(self.channel)
        self.rnn: Any = TimeRnnServiceStub(self.channel)
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)

    def ask(self, method: Callable[..., Any], request: Any) -> Reply:
        """Send one request once."""
        at = time.monotonic()
        try:
            answer = method(request, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            return Reply(at, time.monotonic() - at, error=error_from_rpc(error))
        return Reply(at, time.monotonic() - at, answer)

    def is_serving(self, service: str = "") -> bool:
        """Ask for the health of a service."""
        request = health_pb2.HealthCheckRequest(service=service)
        answer = self.health.Check(request, timeout=TIMEOUT_S)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def open(self, model_id: str, session_id: str, batch_size: int = 1) -> Place:
        """Open a session and stand at its beginning."""
        request = session_pb.OpenSessionRequest(
            model_id=model_id, session_id=session_id, batch_size=batch_size
        )
        reply = self.ask(self.sessions.OpenSession, request)
        if reply.error is not None:
            raise reply.error
        return Place(reply.answer.session)

    def __enter__(self) -> Self:
        """Give the open connection."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self.channel.close()


@dataclass
class Place:
    """Where a session stands, by hand."""

    session: session_pb.Session

    def chunk(self, xs: Array, *, train: bool = False) -> rnn_pb.ForwardRequest:
        """Lay out the next chunk."""
        session = self.session
        return rnn_pb.ForwardRequest(
            session_id=session.session_id,
            epoch=session.epoch,
            chunk_seq=session.chunk_seq + 1,
            previous_token=session.state_token,
            xs=tensor_to_proto(xs),
            mode=rnn_pb.FORWARD_MODE_TRAIN if train else rnn_pb.FORWARD_MODE_INFER,
        )

    def took(self, answer: rnn_pb.ForwardResponse) -> None:
        """Go on from an answer."""
        self.session.chunk_seq, self.session.state_token = answer.chunk_seq, answer.state_token


@dataclass
class HealthWatch:
    """Notes when a replica's health changes, asked every 20 ms; a `with` block runs it."""

    probe: Probe
    changes: list[tuple[float, bool]] = field(default_factory=list)
    liveness_lost: bool = False

    def __post_init__(self) -> None:
        """Prepare the thread."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="health")

    def wait_for(self, *, is_serving: bool, timeout_s: float = 30.0) -> float:
        """Wait until the status is this; return when it became so, on the monotonic clock."""
        latest = time.monotonic() + timeout_s
        while time.monotonic() < latest:
            if self.changes and self.changes[-1][1] == is_serving:
                return self.changes[-1][0]
            self._stop.wait(0.005)
        raise TimeoutError(f"health did not become {is_serving} in {timeout_s} s")

    def __enter__(self) -> Self:
        """Start to ask."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            is_serving = self.probe.is_serving()
            if not self.changes or self.changes[-1][1] != is_serving:
                self.changes.append((time.monotonic(), is_serving))
            self.liveness_lost |= not self.probe.is_serving("liveness")


class WriteWatch:
    """Writes to one session of its own again and again, and knows how long that was UNAVAILABLE.

    Each write begins an epoch, so that it depends on none before it: what the store lost is no
    matter here.
    """

    def __init__(self, address: str, model_id: str, session_id: str, width: int) -> None:
        """Open the session; `width` is the model's H."""
        self._probe = Probe(address)
        self._model_id, self._session_id = model_id, session_id
        self._state = tensor_to_proto(np.zeros((1, width), np.float32))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="writes")
        self.answered: list[float] = []

    def longest_gap_s(self, since: float) -> float:
        """Return the longest time without an answer but UNAVAILABLE after `since`, in seconds."""
        times = [since, *(at for at in self.answered if at >= since), time.monotonic()]
        return max(later - earlier for earlier, later in itertools.pairwise(times))

    def __enter__(self) -> Self:
        """Start to write."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._stop.set()
        self._thread.join()
        self._probe.channel.close()

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            reply = self._probe.ask(
                self._probe.sessions.OpenSession,
                session_pb.OpenSessionRequest(
                    model_id=self._model_id,
                    session_id=self._session_id,
                    batch_size=1,
                    initial_state=self._state,
                    on_exists=session_pb.ON_EXISTS_RESET,
                ),
            )
            if not isinstance(reply.error, errors.Unavailable):
                self.answered.append(time.monotonic())


def note_gap(watch: WriteWatch, since: float, limit_s: float, proof: Proof) -> None:
    """Note for how long the service was UNAVAILABLE, and hold it to its limit."""
    gap_s = watch.longest_gap_s(since)
    proof.figures["UNAVAILABLE for s"] = max(gap_s, proof.figures.get("UNAVAILABLE for s", 0.0))
    proof.require(gap_s <= limit_s, f"UNAVAILABLE for {gap_s:.2f} s, the limit is {limit_s}")
