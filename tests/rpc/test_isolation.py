"""One tenant finds nothing of another: every method with every kind of id that the other has.

The same requests go to two servers. Behind the one another tenant has what they name, behind the other nobody ever
had. The answers have to be the same bytes, and what the other tenant has has to stay as it is.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest
from redis.asyncio import Redis

from instruments.replicas import keys_of
from lab import file_of, tensor
from service.app import build_server
from service.domain.types import ModelKey, SessionKey
from service.rpc.auth import AllowAll, Principal
from service.rpc.server import SERVICES
from service.settings import Settings
from service.store import keys
from service.store.connect import open_store
from service.store.embedded import EmbeddedStore
from timernn.v1 import model_service_pb2 as model_pb
from timernn.v1 import session_service_pb2 as session_pb
from timernn.v1 import time_rnn_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from google.protobuf.message import Message

    from service.rpc.auth import Caller

METHODS = {
    method.name: method
    for service in SERVICES
    if service.full_name.startswith("timernn.")
    for method in service.methods
}
D, H = 3, 4
NAMES_NOTHING = {"GetServerInfo", "Stream"}
MAKES = ("CreateCheckpoint", "CreateModel", "ImportModel")


class ByMetadata(AllowAll):
    """Takes the tenant from the metadata."""

    def authenticate(self, caller: Caller) -> Principal:
        """Return the tenant that the caller names."""
        return Principal(dict(caller.invocation_metadata() or ())["tenant"])


@dataclass(frozen=True)
class Ids:
    """Everything by which a request can name what a tenant has."""

    session: str
    model: str
    checkpoint: str
    version: Any
    session_page: str
    model_page: str
    epoch: int
    token: bytes


# An epoch is a time, so that of two servers differs; nobody can guess one from another's.
KINDS = [field.name for field in fields(Ids) if field.name != "epoch"]


def requests_of(ids: Ids) -> dict[str, list[Message]]:
    """Return for each method the messages of a call that names these ids."""
    update = pb.UpdateRequest(
        model_id=ids.model,
        contributions=[
            pb.ContributionSelector(session_id=ids.session, epoch=ids.epoch, chunk_seqs=[1])
        ],
        expected_version=ids.version,
        request_id="isolated",
    )
    spec = model_pb.ModelSpec(model_id=ids.model, input_size=D, hidden_size=H)
    file = file_of()
    next_version = {"expected_version": ids.version, "request_id": "isolated"}
    made: list[Message] = [
        model_pb.GetModelRequest(model_id=ids.model),
        model_pb.ListModelsRequest(page_size=1, page_token=ids.model_page),
        model_pb.DeleteModelRequest(model_id=ids.model),
        model_pb.GetWeightsRequest(model_id=ids.model, version=ids.version),
        model_pb.FindVersionsRequest(model_id=ids.model, numbers=[ids.version.number]),
        model_pb.CreateCheckpointRequest(
            model_id=ids.model, checkpoint_id=ids.checkpoint, version=ids.version
        ),
        model_pb.ListCheckpointsRequest(model_id=ids.model),
        model_pb.RestoreCheckpointRequest(
            model_id=ids.model, checkpoint_id=ids.checkpoint, **next_version
        ),
        model_pb.DeleteCheckpointRequest(model_id=ids.model, checkpoint_id=ids.checkpoint),
        session_pb.OpenSessionRequest(
            model_id=ids.model,
            session_id=ids.session,
            on_exists=session_pb.ON_EXISTS_MUST_EXIST,
        ),
        session_pb.GetSessionRequest(session_id=ids.session),
        session_pb.ListSessionsRequest(
            model_id=ids.model, page_size=1, page_token=ids.session_page
        ),
        session_pb.GetStateRequest(session_id=ids.session, extend_ttl=True),
        session_pb.SetStateRequest(session_id=ids.session, state=tensor(1, H)),
        session_pb.ResetStateRequest(session_id=ids.session),
        session_pb.ForkSessionRequest(session_id=ids.session, new_session_id="fork"),
        session_pb.CloseSessionRequest(session_id=ids.session),
        pb.ForwardRequest(
            session_id=ids.session,
            epoch=ids.epoch,
            chunk_seq=2,
            previous_token=ids.token,
            xs=tensor(1, 2, D),
            pinned_version=ids.version,
        ),
        pb.BackwardRequest(
            session_id=ids.session,
            epoch=ids.epoch,
            chunk_seq=1,
            state_token=ids.token,
            dhs=tensor(1, 2, H),
            update=update,
        ),
        update,
        pb.DiscardGradientsRequest(model_id=ids.model, contributions=update.contributions),
        pb.ListWaitingRequest(session_id=ids.session),
    ]
    by_class = {type(message).__name__: [message] for message in made}
    found = {name: by_class.get(f"{name}Request", []) for name in METHODS}
    found["PutWeights"] = [
        model_pb.PutWeightsRequest(
            header=model_pb.PutWeightsHeader(
                model_id=ids.model, total_bytes=len(file), **next_version
            )
        ),
        model_pb.PutWeightsRequest(data=file),
    ]
    # What makes what it names comes last.
    for name in MAKES:
        found[name] = found.pop(name)
    found["CreateModel"] = [model_pb.CreateModelRequest(spec=spec, request_id="isolated")]
    header = model_pb.ImportModelHeader(spec=spec, request_id="isolated", total_bytes=len(file))
    found["ImportModel"] = [
        model_pb.ImportModelRequest(header=header),
        model_pb.ImportModelRequest(data=file),
    ]
    return found


def variants(own: Ids, theirs: Ids) -> Iterator[tuple[str, str, list[Message]]]:
    """Yield each method with each kind of id taken from another tenant, if the method has that kind."""
    usual = requests_of(own)
    for name in usual:
        for kind in KINDS:
            messages = requests_of(replace(own, **{kind: getattr(theirs, kind)}))[name]
            if messages != usual[name]:
                yield name, kind, messages


class Tenant:
    """A client of one tenant."""

    def __init__(self, channel: Any, name: str) -> None:
        self.channel, self.name = channel, name
        self.metadata = (("tenant", name),)

    async def answer(self, method: str, messages: list[Message]) -> tuple[str, bytes]:
        """Return how a call ends: its code with text and details, or OK with the bytes of the answer."""
        contract = METHODS[method]
        path = f"/{contract.containing_service.full_name}/{method}"
        raw = [message.SerializeToString() for message in messages]
        try:
            if contract.client_streaming:
                call = self.channel.stream_unary(path)(iter(raw), metadata=self.metadata)
                return "OK", await call
            if contract.server_streaming:
                parts = self.channel.unary_stream(path)(raw[0], metadata=self.metadata)
                return "OK", b"".join([part async for part in parts])
            return "OK", await self.channel.unary_unary(path)(raw[0], metadata=self.metadata)
        except grpc.aio.AioRpcError as error:
            details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
            return error.code().name, str(error.details()).encode() + bytes(details)

    async def streamed(self, field: str, message: Any) -> tuple[str, bytes]:
        """Return the same of an operation on a stream."""
        stream: Any = self.channel.stream_stream(
            "/timernn.v1.TimeRnnService/Stream",
            pb.StreamRequest.SerializeToString,
            pb.StreamResponse.FromString,
        )(metadata=self.metadata)
        asked: dict[str, Any] = {field: message}
        await stream.write(pb.StreamRequest(operations=[pb.Operation(tag=1, **asked)]))
        (result,) = (await stream.read()).results
        await stream.done_writing()
        if result.HasField("error"):
            return grpc.StatusCode(
                next(each for each in grpc.StatusCode if each.value[0] == result.error.code)
            ).name, result.error.SerializeToString()
        return "OK", result.SerializeToString()


async def furnish(tenant: Tenant, name: str, seed: int) -> Ids:
    """Make a model with a checkpoint, and a session with a chunk whose gradient waits for an Update."""

    async def done(method: str, *messages: Message) -> bytes:
        code, raw = await tenant.answer(method, list(messages))
        assert code == "OK", (method, code, raw)
        return raw

    spec = model_pb.ModelSpec(model_id=f"{name}-m", input_size=D, hidden_size=H)
    model = model_pb.CreateModelResponse.FromString(
        await done("CreateModel", model_pb.CreateModelRequest(spec=spec, seed=seed))
    ).model
    await done(
        "CreateCheckpoint",
        model_pb.CreateCheckpointRequest(model_id=f"{name}-m", checkpoint_id=f"{name}-c"),
    )
    session = session_pb.OpenSessionResponse.FromString(
        await done(
            "OpenSession",
            session_pb.OpenSessionRequest(
                model_id=f"{name}-m", session_id=f"{name}-s", batch_size=1
            ),
        )
    ).session
    chunk = pb.ForwardResponse.FromString(
        await done(
            "Forward",
            pb.ForwardRequest(
                session_id=f"{name}-s",
                epoch=session.epoch,
                chunk_seq=1,
                xs=tensor(1, 2, D),
                mode=pb.FORWARD_MODE_TRAIN,
            ),
        )
    )
    await done(
        "Backward",
        pb.BackwardRequest(
            session_id=f"{name}-s",
            epoch=session.epoch,
            chunk_seq=1,
            state_token=chunk.state_token,
            dhs=tensor(1, 2, H),
        ),
    )
    sessions = session_pb.ListSessionsResponse.FromString(
        await done("ListSessions", session_pb.ListSessionsRequest(page_size=1))
    )
    models = model_pb.ListModelsResponse.FromString(
        await done("ListModels", model_pb.ListModelsRequest(page_size=1))
    )
    return Ids(
        session=f"{name}-s",
        model=f"{name}-m",
        checkpoint=f"{name}-c",
        version=model.head,
        session_page=sessions.next_page_token,
        model_page=models.next_page_token,
        epoch=session.epoch,
        token=chunk.state_token,
    )


async def start(stack: AsyncExitStack, url: str) -> grpc.aio.Channel:
    """Start a server over a store, and return a channel to it."""
    settings = Settings(store_timeout_ms=20_000)
    store = await open_store(url, settings)
    stack.push_async_callback(store.close)
    server = build_server(settings, store, stack, authenticator=ByMetadata())
    address = await server.start("127.0.0.1:0")
    stack.push_async_callback(server.drain, 0)
    return await stack.enter_async_context(grpc.aio.insecure_channel(address))


async def everything_of(raw: Redis, tenant: str, ids: Ids) -> dict[bytes, bytes | None]:
    """Return every key that a tenant has, with its value."""
    tags = [
        keys.session_tag(SessionKey(tenant, ids.session)),
        keys.model_tag(ModelKey(tenant, ids.model)),
        keys.tenant_tag(tenant),
    ]
    return {key: await raw.dump(key) for tag in tags for key in await keys_of(raw, tag)}


def test_each_method_names_something_in_the_table() -> None:
    """A new method has to say what it names, or stand among those that name nothing."""
    version = model_pb.Model().head
    none = Ids("s", "m", "c", version, "p", "q", 1, b"")
    assert {name for name, messages in requests_of(none).items() if not messages} == NAMES_NOTHING


@pytest.mark.parametrize("over_stream", [False, True], ids=["unary", "stream"])
async def test_what_another_tenant_has_is_as_if_it_never_was(
    store_url: str,
    tenant: str,
    tmp_path: Path,
    over_stream: bool,  # noqa: FBT001
) -> None:
    """The same bytes come back as from a store in which it never was, and it stays as it is."""
    fields_of = {
        "Forward": "forward",
        "Backward": "backward",
        "Update": "update",
        "DiscardGradients": "discard_gradients",
    }
    async with AsyncExitStack() as stack:
        elsewhere = stack.enter_context(EmbeddedStore(tmp_path))
        raw = await stack.enter_async_context(Redis.from_url(store_url))
        here, there = await start(stack, store_url), await start(stack, elsewhere.url)
        theirs = await furnish(Tenant(here, f"{tenant}-a"), "theirs", seed=1)
        before = await everything_of(raw, f"{tenant}-a", theirs)
        asking, control = Tenant(here, f"{tenant}-b"), Tenant(there, f"{tenant}-b")
        own = await furnish(asking, "own", seed=2)
        own_there = await furnish(control, "own", seed=2)
        pairs = zip(variants(own, theirs), variants(own_there, theirs), strict=True)
        seen = set()
        for (method, kind, messages), (_, _, same) in pairs:
            if over_stream and method not in fields_of:
                continue
            if over_stream:
                found = await asking.streamed(fields_of[method], messages[0])
                expected = await control.streamed(fields_of[method], same[0])
            else:
                found = await asking.answer(method, messages)
                expected = await control.answer(method, same)
            seen.add((method, kind))
            assert found[0] == expected[0], (method, kind, found, expected)
            if found[0] == "OK":
                assert b"theirs" not in found[1] or method in MAKES
            else:
                assert found == expected, (method, kind)
            unchanged = await everything_of(raw, f"{tenant}-a", theirs)
            assert unchanged == before, (method, kind)
        assert len(seen) > (5 if over_stream else 30)


async def test_what_a_server_says_of_itself_is_the_same_whoever_else_it_serves(
    store_url: str, tenant: str
) -> None:
    """GetServerInfo names no tenant, and another tenant's models and sessions change none of it but the time."""
    async with AsyncExitStack() as stack:
        here = await start(stack, store_url)
        asking = Tenant(here, f"{tenant}-b")

        async def described() -> bytes:
            code, raw = await asking.answer("GetServerInfo", [model_pb.GetServerInfoRequest()])
            assert code == "OK"
            info = model_pb.GetServerInfoResponse.FromString(raw)
            info.ClearField("server_time")
            return info.SerializeToString()

        before = await described()
        await furnish(Tenant(here, f"{tenant}-a"), "theirs", seed=1)
        assert await described() == before
        assert tenant.encode() not in before
