"""A record with the layout of another release is refused by every operation, whole, and left as it is."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc.aio
import pytest
from redis.asyncio import Redis

from instruments.replicas import Backup
from lab import D, H, Lab, TenantOfTheTest, file_of, refusal_status, tensor
from service.app import build_server
from service.domain.types import ModelKey, SessionKey
from service.settings import Limits, Settings
from service.store import keys
from service.store.connect import open_store
from timernn.v1 import model_service_pb2 as model_pb
from timernn.v1 import session_service_pb2 as session_pb
from timernn.v1 import time_rnn_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    Operation: TypeAlias = Callable[["Place"], Awaitable[Any]]
    Change: TypeAlias = Callable[["Place"], Awaitable[Any]]
    Unpack: TypeAlias = Callable[[Any], Any]

TRAIN = pb.FORWARD_MODE_TRAIN
SERVICES = (model_pb, session_pb, pb)


@dataclass
class Place:
    """A model and a session with something of everything, and two servers that go on with them.

    Attributes:
        lab: Calls the server whose turn it is.
        warm: Calls the server that made it all, and has it cached.
        cold: Calls a server that has seen none of it.
        raw: A plain connection to the store.
        tenant: Whose they are.
        answers: Of the session's chunks, by number.
    """

    lab: Lab
    warm: Lab
    cold: Lab
    raw: Any
    tenant: str
    answers: dict[int, pb.ForwardResponse] = field(default_factory=dict)

    @property
    def record(self) -> bytes:
        """The key of the session's record."""
        return keys.session_tag(SessionKey(self.tenant, "s"))

    @property
    def model(self) -> bytes:
        """The key of the model's record."""
        return keys.model_tag(ModelKey(self.tenant, "m"))

    async def slots(self) -> list[Backup]:
        """Return all keys of the model and of the sessions as they are."""
        tags = [keys.session_tag(SessionKey(self.tenant, name)) for name in ("s", "other", "new")]
        return [await Backup.take(self.raw, tag) for tag in (self.model, *tags)]

    async def values(self) -> dict[bytes, bytes]:
        """Return the value of each of these keys, serialized.

        Not the parts of a version that was not made: they were written before the decision, under
        names of their own, and go by themselves.
        """
        model, *sessions = await self.slots()
        kept = {key: data for key, (data, ttl_ms) in model.entries.items() if not ttl_ms}
        return kept | {key: data for slot in sessions for key, (data, _) in slot.entries.items()}

    async def fill(self) -> None:
        """Chunk 1 without a tape, 2 consumed, 3 with a tape that waits, 4 a contribution that waits."""
        lab = self.warm
        await lab.create(request_id="create")
        self.lab.session = self.cold.session = lab.session = await lab.open(request_id="open")
        await lab.open("other")
        self.answers[1] = await lab.forward(1)
        for seq in (2, 3, 4):
            self.answers[seq] = await lab.train(seq)
        await lab.backward(self.answers[2])
        await lab.update("step")
        await lab.backward(self.answers[4])
        request = model_pb.CreateCheckpointRequest(model_id="m", checkpoint_id="kept")
        await lab.models.CreateCheckpoint(request)

    async def warm_up(self) -> None:
        """Let the warm server have the session cached."""
        await self.warm.train(4)


@pytest.fixture
async def place(tenant: str, store_url: str) -> AsyncIterator[Place]:
    """Two servers over the run's store, which ask for the head each time."""
    async with AsyncExitStack() as stack:

        async def lab() -> Lab:
            settings = Settings(limits=Limits(head_max_age_ms=0), store_timeout_ms=20_000)
            opened = await open_store(store_url, settings)
            stack.push_async_callback(opened.close)
            server = build_server(settings, opened, stack, authenticator=TenantOfTheTest(tenant))
            address = await server.start("127.0.0.1:0")
            stack.push_async_callback(server.drain, 0)
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
            return Lab(channel)

        raw = await stack.enter_async_context(Redis.from_url(store_url))
        warm, cold = await lab(), await lab()
        made = Place(warm, warm, cold, raw, tenant)
        await made.fill()
        yield made


# --- the operations: each reads or writes what its table is about -----------------------------------


def ask(name: str, **fields: Any) -> Operation:
    """Make a unary call of this name."""
    module = next(each for each in SERVICES if hasattr(each, f"{name}Request"))
    request = getattr(module, f"{name}Request")(**fields)

    async def call(place: Place) -> Any:
        lab = place.lab
        stubs = (lab.models, lab.sessions, lab.rnn)
        return await getattr(next(each for each in stubs if hasattr(each, name)), name)(request)

    return call


def opening(on_exists: Any, name: str = "s") -> Operation:
    """Open a session in a mode."""
    return lambda place: place.lab.open(name, on_exists=on_exists)


def backward(chunk_seq: int, **fields: Any) -> Operation:
    """Send the Backward of a chunk."""
    return lambda place: place.lab.backward(place.answers[chunk_seq], **fields)


async def import_model(place: Place) -> Any:
    """Make a model from a file under the name that is taken."""
    spec, data = model_pb.ModelSpec(model_id="m", input_size=D, hidden_size=H), file_of()
    header = model_pb.ImportModelHeader(spec=spec, request_id="import", total_bytes=len(data))
    parts = (model_pb.ImportModelRequest(header=header), model_pb.ImportModelRequest(data=data))
    return await place.lab.models.ImportModel(iter(parts))


SELECTED = pb.ContributionSelector(session_id="s")
FORWARDS: dict[str, Operation] = {
    "Forward": lambda place: place.lab.forward(5),
    "Forward training": lambda place: place.lab.train(5),
    "Forward again": lambda place: place.lab.train(4),
}
WITH_TAPES: dict[str, Operation] = {
    "OpenSession reset": opening(session_pb.ON_EXISTS_RESET),
    "SetState": ask("SetState", session_id="s", state=tensor(1, H)),
    "ResetState": ask("ResetState", session_id="s"),
    "Backward": backward(3),
    "Backward again": backward(4),
    "Backward with a step": backward(3, update=pb.UpdateRequest(request_id="inline")),
    "DiscardGradients": lambda place: place.lab.discard(contributions=[SELECTED]),
    "ListWaiting": ask("ListWaiting", session_id="s"),
}
OF_A_SESSION: dict[str, Operation] = {
    **FORWARDS,
    **WITH_TAPES,
    "OpenSession": opening(session_pb.ON_EXISTS_FAIL),
    "OpenSession resume": opening(session_pb.ON_EXISTS_RESUME),
    "OpenSession again": lambda place: place.lab.open(request_id="open"),
    "GetSession": ask("GetSession", session_id="s"),
    "ListSessions": ask("ListSessions"),
    "GetState": ask("GetState", session_id="s"),
    "GetState for longer": ask("GetState", session_id="s", extend_ttl=True),
    "ForkSession from it": ask("ForkSession", session_id="s", new_session_id="new"),
    "ForkSession to its name": ask("ForkSession", session_id="other", new_session_id="s"),
    "CloseSession": ask("CloseSession", session_id="s"),
}
OF_A_MODEL: dict[str, Operation] = {
    **FORWARDS,
    "Forward without a session": lambda place: place.lab.forward(
        0, session_id="", epoch=0, model_id="m"
    ),
    "Backward": backward(3),
    "Backward again": backward(4),
    "Backward without a tape": backward(1),
    "Backward with a step": backward(3, update=pb.UpdateRequest(request_id="inline")),
    "Update": lambda place: place.lab.update("next"),
    "Update again": lambda place: place.lab.update("step"),
    "Update with a used id": lambda place: place.lab.update("step", clip_norm=3.0),
    "DiscardGradients": lambda place: place.lab.discard(),
    "DiscardGradients of a session": lambda place: place.lab.discard(contributions=[SELECTED]),
    "ListWaiting": ask("ListWaiting", session_id="s"),
    "OpenSession": opening(session_pb.ON_EXISTS_FAIL, "new"),
    "OpenSession resume": opening(session_pb.ON_EXISTS_RESUME),
    "SetState": ask("SetState", session_id="s", state=tensor(1, H)),
    "ResetState": ask("ResetState", session_id="s"),
    "ForkSession": ask("ForkSession", session_id="s", new_session_id="new"),
    "CreateModel": lambda place: place.lab.create(request_id="another"),
    "CreateModel again": lambda place: place.lab.create(request_id="create"),
    "CreateModel with a used id": lambda place: place.lab.create(request_id="create", seed=9),
    "ImportModel": import_model,
    "GetModel": ask("GetModel", model_id="m"),
    "ListModels": ask("ListModels"),
    "DeleteModel": ask("DeleteModel", model_id="m"),
    "DeleteModel if there": ask("DeleteModel", model_id="m", allow_missing=True),
    "GetWeights": lambda place: place.lab.download(),
    "PutWeights": lambda place: place.lab.upload(file_of()),
    "FindVersions": ask("FindVersions", model_id="m", numbers=[1, 2]),
    "CreateCheckpoint": ask("CreateCheckpoint", model_id="m", checkpoint_id="c"),
    "ListCheckpoints": ask("ListCheckpoints", model_id="m"),
    "RestoreCheckpoint": ask(
        "RestoreCheckpoint", model_id="m", checkpoint_id="kept", request_id="restore"
    ),
    "DeleteCheckpoint": ask("DeleteCheckpoint", model_id="m", checkpoint_id="kept"),
}
# Those that meet no record of a session and no model, and the one that carries all the others.
OF_NOTHING = {"GetServerInfo", "Stream"}

# --- records that another release may have written, with what is said of each ---------------------------------


async def other_layout(place: Place) -> None:
    """The record of a session has another number of its layout."""
    await place.raw.setrange(place.record, 0, b"\x4d")


async def short_record(place: Place) -> None:
    """The record of a session ends within its head."""
    record = await place.raw.get(place.record)
    assert record is not None
    await place.raw.set(place.record, record[:40], keepttl=True)


async def other_marker(place: Place) -> None:
    """The session has gone, and its marker is longer than ours."""
    await place.raw.delete(place.record)
    await place.raw.append(keys.marker_key(place.record), b"+")


async def other_tape_entries(place: Place) -> None:
    """The entries of the list of tapes are longer than ours."""
    index = keys.tape_index_key(place.record)
    for name, entry in (await place.raw.hgetall(index)).items():
        await place.raw.hset(index, name, entry + b"+")


async def other_tapes(place: Place) -> None:
    """Each tape has another number of its layout."""
    index = keys.tape_index_key(place.record)
    for name in await place.raw.hkeys(index):
        await place.raw.setrange(index + name, 0, b"\x09")


def specified(**facts: Any) -> Change:
    """Change fields of a model's specification; None takes one away."""

    async def change(place: Place) -> None:
        spec = json.loads(await place.raw.hget(place.model, "spec"))
        changed = {name: fact for name, fact in {**spec, **facts}.items() if fact is not None}
        await place.raw.hset(place.model, "spec", json.dumps(changed))

    return change


SESSION_CHANGES: list[tuple[Change, str, str]] = [
    (other_layout, "layout 77", "layout 1"),
    (short_record, "40 bytes", "layout 1"),
    (other_marker, "10 bytes", "9 bytes"),
]
FIELDS = "fields cell, dtype, hidden_size, input_size, layout, model_id, optimizer"
MODEL_CHANGES: list[tuple[Change, str, str]] = [
    (specified(layout=2), "layout '2'", "layout 1"),
    (specified(cell="lstm"), "cell 'lstm'", "cell tanh"),
    (specified(layers=3), "field 'layers'", FIELDS),
    (specified(cell=None), "cell 'None'", "cell tanh"),
    (specified(dtype="float16"), "dtype 'float16'", "dtype float32, float64"),
    (specified(optimizer={"kind": "Lion", "lr": 1}), "optimizer 'Lion'", "optimizer "),
    (specified(optimizer={"kind": "SGD", "lr": 1.0, "decay": 1}), "optimizer field 'decay'", ""),
]


def longer(key_of: Callable[[bytes], bytes]) -> Change:
    """Make each entry of a model's hash a byte longer."""

    async def change(place: Place) -> None:
        for name, entry in (await place.raw.hgetall(key_of(place.model))).items():
            await place.raw.hset(key_of(place.model), name, entry + b"+")

    return change


# Whatever the specification says: an entry that cannot be ours is not taken apart.
ENTRIES: list[tuple[Change, str, str, list[str]]] = [
    (
        longer(keys.versions_key),
        "31 bytes",
        "30 bytes",
        [
            *(
                "Forward",
                "Forward again",
                "Backward",
                "Update",
                "GetWeights",
                "PutWeights",
                "FindVersions",
            ),
            *("CreateCheckpoint", "DeleteCheckpoint", "DeleteModel"),
        ],
    ),
    (
        longer(keys.contributions_key),
        "26 bytes",
        "25 bytes waiting, 17 consumed",
        ["Backward again", "Update", "DiscardGradients", "ListWaiting", "DeleteModel"],
    ),
    (
        longer(keys.checkpoints_key),
        "33 bytes",
        "32 bytes",
        ["ListCheckpoints", "RestoreCheckpoint", "DeleteCheckpoint"],
    ),
    (longer(keys.requests_key), "38 bytes", "37 bytes", ["Update again"]),
]


async def check_refused(
    servers: Sequence[Lab],
    place: Place,
    operation: Operation,
    unpack: Unpack,
    found: str,
    known: str,
) -> None:
    """Let servers refuse an operation, and compare every key before and after."""
    before = await place.values()
    assert before
    for lab in servers:
        place.lab = lab
        refusal = unpack(await refusal_status(operation(place)))
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "UNSUPPORTED_LAYOUT")
        assert refusal.metadata["found"] == found
        assert refusal.metadata["known"].startswith(known)
        assert f"found {found}, this server knows {known}" in refusal.message
    assert await place.values() == before


async def check_all(
    place: Place, operation: Operation, unpack: Unpack, changes: Sequence[tuple[Change, str, str]]
) -> None:
    """Let an operation meet one change after another."""
    slots = await place.slots()
    for change, found, known in changes:
        await place.warm_up()
        await change(place)
        await check_refused((place.warm, place.cold), place, operation, unpack, found, known)
        for slot in slots:
            await slot.restore(place.raw)


@pytest.mark.parametrize("name", OF_A_SESSION)
async def test_a_session_of_another_layout_is_refused(
    place: Place, unpack: Unpack, name: str
) -> None:
    """Whoever has it cached and whoever has not says what it found; no key changes."""
    await check_all(place, OF_A_SESSION[name], unpack, SESSION_CHANGES)


@pytest.mark.parametrize("name", OF_A_MODEL)
async def test_a_model_of_another_layout_is_refused(
    place: Place, unpack: Unpack, name: str
) -> None:
    """Its specification governs the whole slot: what is remembered, waits or is kept is not read."""
    await check_all(place, OF_A_MODEL[name], unpack, MODEL_CHANGES)


@pytest.mark.parametrize("name", [*WITH_TAPES, "Forward training"])
async def test_entries_of_another_length_are_refused(
    place: Place, unpack: Unpack, name: str
) -> None:
    """The list of tapes has no number of its own."""
    changes = [(other_tape_entries, "34 bytes", "33 bytes")]
    await check_all(place, OF_A_SESSION[name], unpack, changes)


@pytest.mark.parametrize("name", ["Backward", "Backward again", "Backward with a step"])
async def test_a_tape_of_another_layout_is_refused(place: Place, unpack: Unpack, name: str) -> None:
    """Also by the server that made the tape, and would not need to read it."""
    await check_all(place, OF_A_SESSION[name], unpack, [(other_tapes, "layout 9", "layout 1")])


@pytest.mark.parametrize(
    ("change", "found", "known", "name"),
    [(change, found, known, name) for change, found, known, names in ENTRIES for name in names],
)
async def test_a_models_entries_of_another_length_are_refused(
    place: Place, unpack: Unpack, change: Change, found: str, known: str, name: str
) -> None:
    """A server that has nothing cached reads them, and takes none apart."""
    await change(place)
    await check_refused((place.cold,), place, OF_A_MODEL[name], unpack, found, known)


def test_every_operation_of_the_contract_is_tried() -> None:
    """A method that is added has to say here what it does with another release's records."""
    services = [
        service for module in SERVICES for service in module.DESCRIPTOR.services_by_name.values()
    ]
    methods = {method.name for service in services for method in service.methods}
    tried = {name.split()[0] for name in (*OF_A_SESSION, *OF_A_MODEL)}
    assert tried | OF_NOTHING == methods


async def test_a_stream_goes_on_beside_a_refused_session(place: Place) -> None:
    """Chunks of both sessions come in one message: one is refused, the other applied."""
    await place.warm_up()
    other = await place.warm.open("other", on_exists=session_pb.ON_EXISTS_RESUME)
    await other_layout(place)
    call = place.warm.rnn.Stream()
    chunks = [(1, "s", place.warm.session.epoch, 5), (2, "other", other.epoch, 1)]
    operations = [
        pb.Operation(
            tag=tag,
            forward=pb.ForwardRequest(
                session_id=name, epoch=epoch, chunk_seq=seq, xs=tensor(1, 2, D), mode=TRAIN
            ),
        )
        for tag, name, epoch, seq in chunks
    ]
    await call.write(pb.StreamRequest(operations=operations))
    results: dict[int, Any] = {}
    while len(results) < 2:
        results |= {one.tag: one for one in (await call.read()).results}
    await call.done_writing()
    assert results[1].error.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
    assert results[2].forward.chunk_seq == 1
