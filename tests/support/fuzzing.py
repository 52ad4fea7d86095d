"""Calls that nobody meant to make, and what has to hold of each answer.

`World` knows what is there, so that most of a changed message is right and it gets far; `Fuzzer` makes calls of it; `Findings`
judges how they end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # has no stubs
from grpc_health.v1 import health_pb2

from lab import D, H, file_of, tensor
from random_messages import mutated, random_message, with_a_change
from service.rpc.errors import DETAILS_KEY, MAX_DETAILS_BYTES, MAX_MESSAGE_BYTES
from service.rpc.server import SERVICES
from timernn.v1 import model_service_pb2 as model_pb
from timernn.v1 import session_service_pb2 as session_pb
from timernn.v1 import time_rnn_service_pb2 as pb

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

METHODS: dict[str, Any] = {
    f"/{service.full_name}/{method.name}": method
    for service in SERVICES
    for method in service.methods
}
STREAM = "/timernn.v1.TimeRnnService/Stream"
# A healthy server with a healthy store and no deadline has no other answers to what a client sends.
CODES = frozenset(
    {
        "OK", "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "ABORTED", "FAILED_PRECONDITION",
        "RESOURCE_EXHAUSTED",
    }
)  # fmt: skip
NUMBERS = {each.value[0]: each.name for each in grpc.StatusCode}
LEAKS = re.compile(
    r"Traceback|File \"|redis|valkey|tn:|0x[0-9a-f]{4}|/usr|/tmp|class '<", re.IGNORECASE
)
LIMITS = {
    "batch_size": 4, "chunk_steps": 16, "input_size": 8, "hidden_size": 8, "message_bytes": 64 << 10,
    "operations_per_message": 8, "sessions_per_tenant": 50, "models_per_tenant": 50,
    "contributions_per_model": 20, "checkpoints_per_model": 10, "weights_bytes": 8 << 10,
}  # fmt: skip
"""Small limits, so that the numbers of random messages lie around them."""


class Client:
    """Makes one call with bytes; how, is the subclass's."""

    async def call(self, path: str, parts: list[bytes]) -> tuple[list[bytes], Any]:
        """Return the answers of a call, and None or a status: `code()`, `details()`, `trailing_metadata()`."""
        raise NotImplementedError

    async def ask(self, path: str, request: Any, response_class: Any) -> Any:
        """Call a unary method, which has to succeed, and return its answer."""
        answers, error = await self.call(path, [request.SerializeToString()])
        assert error is None, f"{path}: {error.code()} {error.details()}"
        return response_class.FromString(answers[0])


@dataclass
class World:
    """A model with a checkpoint, and a session with a chunk whose Backward waits.

    Attributes:
        client: Calls the server.
        session: As it is now.
        token: Of its last chunk.
        seq: Of its last chunk.
        page: A page token.
    """

    client: Client
    session: Any = field(default_factory=session_pb.Session)
    token: bytes = b""
    seq: int = 0
    page: str = ""

    async def restore(self) -> None:
        """Make whatever is missing, and learn how it stands; it has to succeed, whatever was sent before."""
        models, sessions = "/timernn.v1.ModelService", "/timernn.v1.SessionService"
        await self._remove_all()
        spec = model_pb.ModelSpec(model_id="m", input_size=D, hidden_size=H)
        create = model_pb.CreateModelRequest(spec=spec)
        await self.client.ask(f"{models}/CreateModel", create, model_pb.CreateModelResponse)
        checkpoint = model_pb.CreateCheckpointRequest(model_id="m", checkpoint_id="c")
        await self.client.ask(
            f"{models}/CreateCheckpoint", checkpoint, model_pb.CreateCheckpointResponse
        )
        opening = session_pb.OpenSessionRequest(
            model_id="m", session_id="s", on_exists=session_pb.ON_EXISTS_RESET, batch_size=1
        )
        opened = await self.client.ask(
            f"{sessions}/OpenSession", opening, session_pb.OpenSessionResponse
        )
        self.session, self.seq, self.token = opened.session, 0, b""
        listing = session_pb.ListSessionsRequest(page_size=1)
        listed = await self.client.ask(
            f"{sessions}/ListSessions", listing, session_pb.ListSessionsResponse
        )
        self.page = listed.next_page_token
        await self.advance()

    async def _remove_all(self) -> None:
        """Close every session and delete every model, so that no quota is reached in the long run."""
        models, sessions = "/timernn.v1.ModelService", "/timernn.v1.SessionService"
        opened = await self.client.ask(
            f"{sessions}/ListSessions",
            session_pb.ListSessionsRequest(page_size=1000),
            session_pb.ListSessionsResponse,
        )
        for session in opened.sessions:
            close = session_pb.CloseSessionRequest(session_id=session.session_id)
            path = f"{sessions}/CloseSession"
            await self.client.ask(path, close, session_pb.CloseSessionResponse)
        made = await self.client.ask(
            f"{models}/ListModels",
            model_pb.ListModelsRequest(page_size=1000),
            model_pb.ListModelsResponse,
        )
        for model in made.models:
            delete = model_pb.DeleteModelRequest(model_id=model.spec.model_id)
            await self.client.ask(f"{models}/DeleteModel", delete, model_pb.DeleteModelResponse)

    async def advance(self) -> None:
        """Apply the next chunk of the session: the server is alive and computes."""
        answer = await self.client.ask(
            "/timernn.v1.TimeRnnService/Forward", self.chunk(), pb.ForwardResponse
        )
        self.seq, self.token = answer.chunk_seq, answer.state_token
        assert list(answer.hs.shape) == [1, 2, H]

    def chunk(self) -> pb.ForwardRequest:
        """Return the session's next chunk."""
        return pb.ForwardRequest(
            session_id="s",
            epoch=self.session.epoch,
            chunk_seq=self.seq + 1,
            previous_token=self.token,
            xs=tensor(1, 2, D, value=0.5),
            mode=pb.FORWARD_MODE_TRAIN,
        )

    def requests(self) -> list[Any]:
        """Return valid requests, also those that would change the world."""
        epoch = self.session.epoch
        named = pb.ContributionSelector(session_id="s", epoch=epoch, chunk_seqs=[self.seq])
        update = pb.UpdateRequest(model_id="m", contributions=[named], request_id="r")
        adam = model_pb.Optimizer(adam_w=model_pb.AdamW(lr=0.1))
        spec = model_pb.ModelSpec(model_id="n", input_size=D, hidden_size=H, optimizer=adam)
        given = model_pb.GivenWeights(wx=tensor(D, H), wh=tensor(H, H), b=tensor(H))
        backward = pb.BackwardRequest(
            session_id="s",
            epoch=epoch,
            chunk_seq=self.seq,
            state_token=self.token,
            dhs=tensor(1, 2, H, value=1.0),
            dh_next=tensor(1, H),
            update=update,
        )
        made: list[Any] = [
            self.chunk(),
            pb.ForwardRequest(model_id="m", xs=tensor(2, 3, D), h0=tensor(2, H)),
            backward,
            update,
            pb.DiscardGradientsRequest(model_id="m", contributions=[named]),
            pb.ListWaitingRequest(session_id="s"),
            session_pb.OpenSessionRequest(model_id="m", session_id="t", initial_state=tensor(1, H)),
            session_pb.GetSessionRequest(session_id="s"),
            session_pb.ListSessionsRequest(model_id="m", page_size=1, page_token=self.page),
            session_pb.GetStateRequest(session_id="s", extend_ttl=True),
            session_pb.SetStateRequest(session_id="s", state=tensor(1, H)),
            session_pb.ResetStateRequest(session_id="s"),
            session_pb.ForkSessionRequest(session_id="s", new_session_id="t"),
            session_pb.CloseSessionRequest(session_id="t"),
            model_pb.CreateModelRequest(spec=spec, given=given),
            model_pb.CreateModelRequest(spec=spec, seed=1, request_id="r"),
            model_pb.GetModelRequest(model_id="m"),
            model_pb.ListModelsRequest(page_size=1),
            model_pb.DeleteModelRequest(model_id="n"),
            model_pb.GetWeightsRequest(model_id="m"),
            model_pb.FindVersionsRequest(model_id="m", numbers=[1]),
            model_pb.CreateCheckpointRequest(model_id="m", checkpoint_id="d"),
            model_pb.ListCheckpointsRequest(model_id="m"),
            model_pb.RestoreCheckpointRequest(model_id="m", checkpoint_id="c", request_id="r"),
            model_pb.DeleteCheckpointRequest(model_id="m", checkpoint_id="d"),
            model_pb.GetServerInfoRequest(),
            health_pb2.HealthCheckRequest(),
        ]
        return made

    def uploads(self) -> list[tuple[str, list[Any]]]:
        """Return valid uploads: the method's path, and its messages."""
        file = file_of()
        spec = model_pb.ModelSpec(model_id="n", input_size=D, hidden_size=H)
        put = model_pb.PutWeightsHeader(model_id="m", request_id="u", total_bytes=len(file))
        new = model_pb.ImportModelHeader(spec=spec, request_id="u", total_bytes=len(file))
        return [
            (
                "/timernn.v1.ModelService/PutWeights",
                [model_pb.PutWeightsRequest(header=put), model_pb.PutWeightsRequest(data=file)],
            ),
            (
                "/timernn.v1.ModelService/ImportModel",
                [model_pb.ImportModelRequest(header=new), model_pb.ImportModelRequest(data=file)],
            ),
        ]


BY_REQUEST: dict[str, list[str]] = {}
for _path, _method in METHODS.items():
    if not _method.client_streaming:
        BY_REQUEST.setdefault(_method.input_type.full_name, []).append(_path)
_OPERATIONS: Any = pb.Operation.DESCRIPTOR.oneofs_by_name["operation"].fields
_FIELDS = {each.message_type.full_name: each.name for each in _OPERATIONS}


class Fuzzer:
    """Makes calls: a path and the bytes of its messages."""

    def __init__(self, world: World, source: random.Random) -> None:
        """Keep the world and the randomness."""
        self._world = world
        self._source = source
        self._paths = sorted(METHODS)

    def next_call(self) -> tuple[str, list[bytes]]:
        """Return a call: generated, or a valid one changed as a message or as bytes; unary, upload, stream or frame."""
        source = self._source
        kind = source.randrange(10)
        if kind == 0:
            path = source.choice(self._paths)
            made = random_message(GetMessageClass(METHODS[path].input_type), source)
            return path, [made.SerializeToString()] * source.choice((1, 1, 2))
        if kind == 1:
            return source.choice(self._paths), [source.randbytes(source.choice((0, 1, 9, 400)))]
        if kind == 2:
            path, messages = source.choice(self._world.uploads())
            return path, self._parts(messages)
        if kind <= 5:
            return STREAM, self._frames()
        request = self._changed(source.choice(self._world.requests()))
        path = source.choice(BY_REQUEST[request.DESCRIPTOR.full_name])
        return path, [self._bytes(request)]

    def _changed(self, message: Any) -> Any:
        for _ in range(self._source.choice((0, 1, 1, 1, 2, 3))):
            message = with_a_change(message, self._source)
        return message

    def _bytes(self, message: Any) -> bytes:
        raw: bytes = message.SerializeToString()
        return mutated(raw, self._source) if self._source.random() < 0.3 else raw

    def _parts(self, messages: list[Any]) -> list[bytes]:
        """Return the parts of an upload, changed, doubled, left out or in another order."""
        parts = [self._bytes(self._changed(each)) for each in messages]
        action = self._source.randrange(5)
        if action == 0:
            parts.reverse()
        elif action == 1:
            parts += parts
        elif action == 2:
            parts.pop(self._source.randrange(len(parts)))
        return parts

    def _frames(self) -> list[bytes]:
        """Return messages of a Stream with none, one or many operations each."""
        source = self._source
        requests = [each for each in self._world.requests() if each.DESCRIPTOR.full_name in _FIELDS]
        frames = []
        for _ in range(source.choice((1, 1, 2, 3))):
            frame = pb.StreamRequest()
            for tag in range(source.choice((0, 1, 1, 1, 2, 5, 7, 8, 9))):
                request = source.choice(requests)
                asked: Any = {_FIELDS[request.DESCRIPTOR.full_name]: request}
                frame.operations.append(self._changed(pb.Operation(tag=tag, **asked)))
            frames.append(self._bytes(frame))
        return frames


@dataclass
class Findings:
    """How the calls ended.

    Attributes:
        codes: How often each code was the end of a call or of an operation on a stream.
        reasons: How often each reason was.
    """

    codes: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)

    def judge(self, path: str, parts: list[bytes], answers: list[bytes], error: Any) -> None:
        """Check how a call ended; raise AssertionError with what was sent if it is not as promised."""
        sent = f"{path} {parts!r:.2000}"
        if path == STREAM:
            for answer in answers:
                for result in pb.StreamResponse.FromString(answer).results:
                    if result.HasField("error"):
                        self._judge_status(result.error, sent)
                    else:
                        self._count("OK", "", sent)
        if error is None:
            self._count("OK", "", sent)
            return
        trailers = dict(error.trailing_metadata() or ())
        raw = trailers.get(DETAILS_KEY)
        if raw is None:
            # Only for what the health protocol says without details.
            assert path.startswith("/grpc.health"), f"{sent}: {error.code()} {error.details()}"
            self._count(error.code().name, "", sent)
            return
        status = status_pb2.Status.FromString(raw)
        assert (NUMBERS[status.code], status.message) == (error.code().name, error.details()), sent
        self._judge_status(status, sent)

    def _judge_status(self, status: Any, sent: str) -> None:
        info = error_details_pb2.ErrorInfo()
        assert status.details, f"{sent}: {status}"
        status.details[0].Unpack(info)
        assert info.domain == "timernn", f"{sent}: {status}"
        shown = f"{status.message} {dict(info.metadata)}"
        assert not LEAKS.search(shown), f"{sent}: {shown}"
        assert status.message.isprintable(), f"{sent}: {status.message!r}"
        assert len(status.message.encode()) <= MAX_MESSAGE_BYTES, f"{sent}: {status.message}"
        assert status.ByteSize() <= MAX_DETAILS_BYTES, f"{sent}: {status}"
        self._count(NUMBERS[status.code], info.reason, sent)

    def _count(self, code: str, reason: str, sent: str) -> None:
        assert code in CODES, f"{sent}: {code} {reason}"
        self.codes[code] = self.codes.get(code, 0) + 1
        if reason:
            self.reasons[reason] = self.reasons.get(reason, 0) + 1


async def fuzz(
    client: Client, source: random.Random, calls: int, step: Callable[[str], None]
) -> Findings:
    """Make calls one after another; return how they ended.

    Args:
        client: Makes them.
        source: The randomness: the same makes the same calls, as long as the server answers the same.
        calls: How many.
        step: Called now and then with how many are done.

    Raises:
        AssertionError: If one did not end as promised, or a valid call in between failed.
    """
    world = World(client)
    fuzzer, findings = Fuzzer(world, source), Findings()
    for number in range(calls):
        if number % 100 == 0:
            await world.restore()
            step(f"{number} of {calls} calls")
        path, parts = fuzzer.next_call()
        answers, error = await client.call(path, parts)
        findings.judge(path, parts, answers, error)
    await world.restore()
    return findings
