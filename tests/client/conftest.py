"""A stand-in for the service that fails on demand, and real replicas on a real store."""

from __future__ import annotations

import subprocess
import sys
import threading
import uuid
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
import redis
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # has no stubs

import timernn
from service.domain.types import ModelKey, SessionKey
from service.store import keys
from timernn.v1 import model_service_pb2 as model_pb
from timernn.v1 import session_service_pb2 as session_pb
from timernn.v1 import tensor_pb2 as tensor_pb
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from service.store.embedded import EmbeddedStore

D, H = 3, 2
READY = "timernn ready on "
QUICK = timernn.RetryPolicy(initial_backoff_s=0.001, max_backoff_s=0.01, jitter=0.0)


def make_refusal(
    code: grpc.StatusCode, reason: str = "", retry_after_s: float | None = None, **metadata: str
) -> status_pb2.Status:
    """Make a status as the service does: code, text, ErrorInfo and perhaps RetryInfo."""
    status = status_pb2.Status(code=code.value[0], message=f"refused: {reason}")
    if reason:
        info = error_details_pb2.ErrorInfo(reason=reason, domain="timernn", metadata=metadata)
        status.details.add().Pack(info)
    if retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(retry_after_s * 1000))
        status.details.add().Pack(retry)
    return status


def tensor(array: Any) -> tensor_pb.Tensor:
    """Write a float32 tensor."""
    values = np.asarray(array, "<f4")
    return tensor_pb.Tensor(
        dtype=tensor_pb.D_TYPE_FLOAT32, shape=values.shape, data=values.tobytes()
    )


def values(message: tensor_pb.Tensor) -> Any:
    """Read a float32 tensor."""
    return np.frombuffer(message.data, "<f4").reshape(tuple(message.shape))


class Failure(Exception):
    """A status that a method of the stand-in ends with."""

    def __init__(self, status: status_pb2.Status) -> None:
        super().__init__(status.message)
        self.status = status


class StandIn:
    """A service without a store: hs counts the steps, tokens count the chunks.

    Attributes:
        requests: What came, by method, in order.
        limits: What GetServerInfo returns.
        kept: The numbers of the versions that FindVersions lists; None: as an older replica, which
            does not have the method.
        gone: Chunks whose outputs cannot be computed a second time.
        replica: What answers it is named by.
        results_per_message: Answers of a stream that leave together.
    """

    def __init__(self, replica: str = "one") -> None:
        self.replica = replica
        self.requests: dict[str, list[Any]] = defaultdict(list)
        self.limits = model_pb.Limits(message_bytes=16 << 20, chunk_steps=4096, replay_window=4)
        self._failures: dict[str, list[tuple[status_pb2.Status | None, bool]]] = defaultdict(list)
        self._chunks: dict[tuple[str, int], list[rnn_pb.ForwardResponse]] = defaultdict(list)
        self._recorded: set[tuple[str, int, int]] = set()
        self._updates: dict[str, rnn_pb.UpdateResponse] = {}
        self.version = 1
        self.results_per_message = 1
        self.kept: set[int] | None = set()
        self.gone: set[int] = set()
        self._arrived = threading.Condition()
        self._held: dict[str, threading.Event] = {}
        self._server = grpc.server(ThreadPoolExecutor(8))
        self._server.add_generic_rpc_handlers((_Handlers(self),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        """Stop serving at once."""
        self._server.stop(None).wait()

    def forget(self) -> None:
        """Begin anew, as if nothing had been sent."""
        self.requests.clear()
        self._chunks.clear()
        self._updates.clear()
        self._recorded.clear()
        self.version = 1

    def fail_next(
        self, method: str, *statuses: status_pb2.Status, after_applying: bool = False
    ) -> None:
        """Let the next calls of a method end with these, before or after they take effect."""
        self._failures[method] += [(status, after_applying) for status in statuses]

    def apply_next(self, method: str, count: int = 1) -> None:
        """Let the next calls of a method succeed, before those that are to fail."""
        self._failures[method] += [(None, False)] * count

    def steps_of(self, session_id: str) -> list[int]:
        """Return T of each chunk that was applied to a session, in order."""
        ends = [
            int(values(chunk.h)[0, 0])
            for (name, _), chunks in self._chunks.items()
            for chunk in chunks
            if name == session_id
        ]
        return [end - before for before, end in zip([0, *ends], ends, strict=False)]

    def wait_for(self, method: str) -> None:
        """Wait until a call of a method has come."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: self.requests[method], 10)

    @contextmanager
    def hold(self, method: str) -> Iterator[None]:
        """Let calls of a method wait, unanswered, until the block ends."""
        self._held[method] = threading.Event()
        try:
            yield
        finally:
            self._held.pop(method).set()

    def answer(self, method: str, request: Any) -> Any:
        """Answer one call or one operation."""
        with self._arrived:
            self.requests[method].append(_copy(request))
            self._arrived.notify_all()
        if method in self._held:
            self._held[method].wait(10)
        failures = self._failures[method]
        status, after_applying = failures.pop(0) if failures else (None, False)
        if status is not None and not after_applying:
            raise Failure(status)
        response = getattr(self, f"_{method}")(request)
        if status is not None:
            raise Failure(status)
        return response

    def _GetServerInfo(self, _: Any) -> Any:  # noqa: N802
        return model_pb.GetServerInfoResponse(replica_id=self.replica, limits=self.limits)

    def _GetModel(self, request: Any) -> Any:  # noqa: N802
        spec = model_pb.ModelSpec(
            model_id=request.model_id, input_size=D, hidden_size=H, dtype=tensor_pb.D_TYPE_FLOAT32
        )
        return model_pb.GetModelResponse(model=model_pb.Model(spec=spec, head=self._head()))

    def _FindVersions(self, request: Any) -> Any:  # noqa: N802
        if self.kept is None:
            raise Failure(make_refusal(grpc.StatusCode.UNIMPLEMENTED))
        found = [_version(number) for number in request.numbers if number in self.kept]
        return model_pb.FindVersionsResponse(head=self._head(), versions=found)

    def _DeleteModel(self, _: Any) -> Any:  # noqa: N802
        return model_pb.DeleteModelResponse(deleted=True)

    def _OpenSession(self, request: Any) -> Any:  # noqa: N802
        rows = request.batch_size or 1
        if request.restored_epoch:  # nothing is ever lost here
            raise Failure(make_refusal(grpc.StatusCode.ABORTED, "EPOCH_FENCED", epoch="100"))
        session = session_pb.Session(
            session_id=request.session_id,
            model_id=request.model_id,
            epoch=request.restored_epoch or 100,
            batch_size=rows,
            state_token=b"0",
        )
        session.ttl.FromSeconds(60)
        return session_pb.OpenSessionResponse(session=session, state=tensor(np.zeros((rows, H))))

    def _SetState(self, request: Any) -> Any:  # noqa: N802
        session = session_pb.Session(
            session_id=request.session_id, epoch=request.expected_epoch + 1, batch_size=1
        )
        return session_pb.SetStateResponse(session=session)

    def _Forward(self, request: Any) -> Any:  # noqa: N802
        chunks = self._chunks[request.session_id, request.epoch]
        if request.session_id and request.chunk_seq > len(chunks) + 1:
            expected = str(len(chunks) + 1)
            raise Failure(make_refusal(grpc.StatusCode.ABORTED, "SEQ_GAP", expected_seq=expected))
        if request.session_id and request.chunk_seq <= len(chunks):
            again = _copy(chunks[request.chunk_seq - 1])
            again.replayed = True
            if request.chunk_seq in self.gone and request.return_hs != rnn_pb.RETURN_HS_NONE:
                code, seq = grpc.StatusCode.FAILED_PRECONDITION, str(request.chunk_seq)
                raise Failure(
                    make_refusal(code, "REPLAY_WINDOW_PASSED", applied="true", chunk_seq=seq)
                )
            if request.return_hs == rnn_pb.RETURN_HS_NONE:
                again.ClearField("hs")
            return again
        rows, steps = request.xs.shape[0], request.xs.shape[1]
        before = values(chunks[-1].h)[0, 0] if chunks else 0.0
        hs = np.broadcast_to((before + np.arange(1, steps + 1))[None, :, None], (rows, steps, H))
        response = rnn_pb.ForwardResponse(
            session_id=request.session_id,
            epoch=request.epoch,
            chunk_seq=request.chunk_seq,
            h=tensor(hs[:, -1]),
            weights_version=self._head(),
            state_token=b"%d" % request.chunk_seq,
        )
        if request.return_hs == rnn_pb.RETURN_HS_ALL:
            response.hs.CopyFrom(tensor(hs))
        elif request.return_hs == rnn_pb.RETURN_HS_LAST:
            response.hs.CopyFrom(tensor(hs[:, -1:]))
        chunks.append(response)
        return response

    def _Backward(self, request: Any) -> Any:  # noqa: N802
        dhs = values(request.dhs)
        name = (request.session_id, request.epoch, request.chunk_seq)
        replayed = name in self._recorded
        self._recorded.add(name)
        response = rnn_pb.BackwardResponse(
            replayed=replayed,
            session_id=request.session_id,
            epoch=request.epoch,
            chunk_seq=request.chunk_seq,
            dxs=tensor(np.broadcast_to(dhs[..., :1], (*dhs.shape[:2], D))),
            dh0=tensor(dhs[:, 0]),
            gradient_norm=1.0,
        )
        if request.HasField("update"):
            if self._failures["inline Update"]:
                raise Failure(self._failures["inline Update"].pop(0)[0])
            response.update.CopyFrom(self._Update(request.update))
        return response

    def _Update(self, request: Any) -> Any:  # noqa: N802
        if request.request_id not in self._updates:
            self.version += 1
            count = sum(len(named.chunk_seqs) for named in request.contributions)
            answer = rnn_pb.UpdateResponse(version=self._head(), contribution_count=count)
            self._updates[request.request_id] = answer
        return _copy(self._updates[request.request_id])

    def _head(self) -> tensor_pb.WeightsVersion:
        return _version(self.version)


class _Handlers(grpc.GenericRpcHandler):
    """Routes every method to the stand-in."""

    def __init__(self, stand_in: StandIn) -> None:
        self._stand_in = stand_in

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        name = details.method.rpartition("/")[2]
        module = next(m for m in (model_pb, session_pb, rnn_pb) if hasattr(m, f"{name}Request"))
        make = grpc.unary_unary_rpc_method_handler
        behaviour = self._unary(name)
        if name == "Stream":
            make, behaviour = grpc.stream_stream_rpc_method_handler, self._stream
        return make(
            behaviour,
            request_deserializer=getattr(module, f"{name}Request").FromString,
            response_serializer=getattr(module, f"{name}Response").SerializeToString,
        )

    def _unary(self, name: str) -> Callable[[Any, grpc.ServicerContext], Any]:
        def handle(request: Any, context: grpc.ServicerContext) -> Any:
            try:
                return self._stand_in.answer(name, request)
            except Failure as failure:
                _abort(context, failure.status)

        return handle

    def _stream(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        results: list[Any] = []
        for request in requests:
            for operation in request.operations:
                result = rnn_pb.OperationResult(tag=operation.tag)
                try:
                    result.forward.CopyFrom(self._stand_in.answer("Forward", operation.forward))
                except Failure as failure:
                    if failure.status.message.endswith("BREAK"):
                        context.abort(grpc.StatusCode.UNAVAILABLE, "the connection breaks")
                    result.error.CopyFrom(failure.status)
                results.append(result)
                if len(results) == self._stand_in.results_per_message:
                    yield rnn_pb.StreamResponse(results=results)
                    results = []


def _version(number: int) -> tensor_pb.WeightsVersion:
    return tensor_pb.WeightsVersion(number=number, digest=b"w%d" % number)


def _abort(context: grpc.ServicerContext, status: status_pb2.Status) -> None:
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    context.abort(code, status.message)


def _copy(message: Any) -> Any:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


@pytest.fixture
def refusal() -> Callable[..., status_pb2.Status]:
    """The maker of statuses."""
    return make_refusal


@pytest.fixture
def quick() -> timernn.RetryPolicy:
    """Retries that hardly wait."""
    return QUICK


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    """A stand-in on a free port."""
    server = StandIn()
    yield server
    server.stop()


@pytest.fixture
def other_stand_in() -> Iterator[StandIn]:
    """A second stand-in for the service."""
    server = StandIn("two")
    yield server
    server.stop()


@pytest.fixture
def client(stand_in: StandIn) -> Iterator[timernn.Client]:
    """A blocking client of the stand-in that does not wait long between tries."""
    with timernn.connect(stand_in.address, timeout=5, retry=QUICK) as connected:
        yield connected


class Replica(str):
    """A replica's address, with the process behind it."""

    __slots__ = ("process",)
    process: subprocess.Popen[str]


@contextmanager
def replica(store_url: str) -> Iterator[Replica]:
    """Run a real replica as a process; yields its address."""
    command = [sys.executable, "-m", "service", "serve", "--listen", "127.0.0.1:0"]
    command += ["--redis-url", store_url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(READY), "the replica ended before it served"
        address = Replica(line.removeprefix(READY).strip())
        address.process = process
        yield address
    finally:
        process.terminate()
        process.wait(30)
        if process.stdout is not None:
            process.stdout.close()


@pytest.fixture(scope="session")
def replicas(store: EmbeddedStore) -> Iterator[list[str]]:
    """Two replicas on the run's store."""
    with ExitStack() as stack:
        yield [stack.enter_context(replica(store.url)) for _ in range(2)]


@pytest.fixture
def doomed(store: EmbeddedStore) -> Iterator[Replica]:
    """A replica of the test's own, to be killed."""
    with replica(store.url) as started:
        yield started


@pytest.fixture
def live(replicas: list[str]) -> Iterator[timernn.Client]:
    """A blocking client of the two replicas."""
    with timernn.connect(replicas, timeout=20) as connected:
        yield connected


@pytest.fixture
def model_id() -> str:
    """A model's name that no other test uses."""
    return f"m{uuid.uuid4().hex}"


class Slot:
    """A hash slot's keys, which a test sets back as a failover does that lost writes."""

    def __init__(self, store_url: str, tag: bytes) -> None:
        self._redis: Any = redis.Redis.from_url(store_url)
        self._pattern = tag.replace(b"[", b"\\[") + b"*"
        self._kept: dict[bytes, tuple[bytes, int]] = {}
        self.keep()

    def keep(self) -> None:
        """Remember the keys as they are now."""
        self._kept = {
            key: (self._redis.dump(key), max(0, self._redis.pttl(key)))
            for key in self._redis.keys(self._pattern)
        }

    def forget(self) -> None:
        """Let what was kept be the time before there were any keys."""
        self._kept = {}

    def lose(self) -> None:
        """Set the keys back to what was kept, at one stroke."""
        with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.delete(b"nothing", *self._redis.keys(self._pattern))
            for key, (value, ttl_ms) in self._kept.items():
                pipeline.restore(key, ttl_ms, value)
            pipeline.execute()

    def close(self) -> None:
        """Close the connection."""
        self._redis.close()


@pytest.fixture
def slots(store: EmbeddedStore) -> Iterator[Slots]:
    """The slots of sessions and models in the run's store."""
    made = Slots(store.url)
    yield made
    made.close()


class Slots:
    """Makes slots, and closes them at the end."""

    def __init__(self, store_url: str) -> None:
        self._store_url = store_url
        self._made: list[Slot] = []

    def of_session(self, session_id: str) -> Slot:
        """Keep the slot of a session as it is now."""
        return self._of(keys.session_tag(SessionKey("default", session_id)))

    def of_model(self, model_id: str) -> Slot:
        """Keep the slot of a model as it is now."""
        return self._of(keys.model_tag(ModelKey("default", model_id)))

    def expire(self, session_id: str) -> None:
        """Let a session's time to live be over; its marker outlives it."""
        with redis.Redis.from_url(self._store_url) as connection:
            connection.delete(keys.record_key(keys.session_tag(SessionKey("default", session_id))))

    def close(self) -> None:
        """Close every slot's connection."""
        for slot in self._made:
            slot.close()

    def _of(self, tag: bytes) -> Slot:
        slot = Slot(self._store_url, tag)
        self._made.append(slot)
        return slot
