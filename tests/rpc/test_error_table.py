"""Each row of the error table, through a real channel, over a real store, unary and on a stream."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc.aio
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from redis.asyncio import Redis

from lab import D, H, Lab, TenantOfTheTest, file_of, refusal_status, tensor
from service.app import build_server
from service.domain.types import SessionKey
from service.settings import Limits, Settings
from service.store import keys
from service.store.connect import open_store
from service.store.embedded import EmbeddedStore
from timernn.v1 import model_service_pb2 as model_pb
from timernn.v1 import session_service_pb2 as session_pb
from timernn.v1 import time_rnn_service_pb2 as pb
from timernn.v1.tensor_pb2 import WeightsVersion

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    Situation: TypeAlias = Callable[[Lab], Awaitable[Any]]
    LabMaker: TypeAlias = Callable[..., Awaitable[Lab]]
    Unpack: TypeAlias = Callable[[Any], Any]

LEAKS = re.compile(
    r"Traceback|File \"|redis|valkey|tn:|0x[0-9a-f]|/usr|/tmp|class '<", re.IGNORECASE
)
OTHER = b"\x00" * 16


@dataclass(frozen=True, slots=True)
class Row:
    """One situation of the table."""

    code: str
    reason: str
    situation: Situation
    limits: dict[str, Any]
    store: dict[str, str] | None
    text: str


ROWS: list[Row] = []


def row(
    code: str, reason: str, text: str = "", store: dict[str, str] | None = None, **limits: Any
) -> Callable[[Situation], Situation]:
    """Add a situation to the table.

    Args:
        code: The status code it must end in.
        reason: The reason in its details.
        text: What the message must hold.
        store: Settings of a store of its own; None: the store that all tests share.
        limits: Limits that differ from the defaults.
    """

    def add(situation: Situation) -> Situation:
        ROWS.append(Row(code, reason, situation, limits, store, text))
        return situation

    return add


@pytest.fixture
async def make_lab(tenant: str, tmp_path: Path, store: EmbeddedStore) -> AsyncIterator[LabMaker]:
    """Start a whole server over a store."""
    async with AsyncExitStack() as stack:

        async def make_lab(row: Row, *, over_stream: bool) -> Lab:
            own = store
            if row.store is not None:
                own = stack.enter_context(EmbeddedStore(tmp_path, config=row.store))
            settings = Settings(limits=Limits(**row.limits), store_timeout_ms=300)
            opened = await open_store(own.url, settings)
            stack.push_async_callback(opened.close)
            server = build_server(settings, opened, stack, authenticator=TenantOfTheTest(tenant))
            address = await server.start("127.0.0.1:0")
            stack.push_async_callback(server.drain, 0)
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
            return Lab(channel, over_stream, server, own, tenant)

        yield make_lab


# --- INVALID_ARGUMENT ---------------------------------------------------------------------------


@row("INVALID_ARGUMENT", "BAD_FIELD", "chunk_seq: must be 1 to 2^53-1, got 0")
async def no_number(lab: Lab) -> None:
    """A chunk without a number could not be sent again safely."""
    await (await lab.opened()).forward(0)


@row("INVALID_ARGUMENT", "BAD_FIELD", "session_id: must match")
async def bad_name(lab: Lab) -> None:
    """A name that is no name."""
    await (await lab.opened()).forward(1, session_id="../../etc/passwd\n")


@row("INVALID_ARGUMENT", "BAD_TENSOR", "xs.shape: expected 3 dims (N,T,D), got 2")
async def bad_rank(lab: Lab) -> None:
    """A chunk of two dimensions."""
    await (await lab.opened()).forward(1, xs=tensor(2, D))


@row("INVALID_ARGUMENT", "BAD_TENSOR", "xs.shape[2]: expected D=3, got 5")
async def bad_inputs(lab: Lab) -> None:
    """Another D than the model's."""
    await (await lab.opened()).forward(1, xs=tensor(1, 2, 5))


@row("INVALID_ARGUMENT", "BAD_TENSOR", "xs.shape[0]: expected N=1, got 2")
async def bad_rows(lab: Lab) -> None:
    """Another N than the session's is never broadcast."""
    await (await lab.opened()).forward(1, xs=tensor(2, 2, D))


@row("INVALID_ARGUMENT", "BAD_TENSOR", "xs.dtype: expected float32, got float64")
async def bad_dtype(lab: Lab) -> None:
    """Another type than the model's is never converted."""
    await (await lab.opened()).forward(1, xs=tensor(1, 2, D, dtype="float64"))


@row("INVALID_ARGUMENT", "BAD_TENSOR", "xs.shape[1]: T must be 1 to 4096, got 0")
async def no_steps(lab: Lab) -> None:
    """A chunk of no steps."""
    await (await lab.opened()).forward(1, xs=tensor(1, 0, D))


@row("INVALID_ARGUMENT", "BAD_TENSOR", "dhs")
async def bad_gradient(lab: Lab) -> None:
    """A gradient that does not have the shape of hs."""
    of = await (await lab.opened()).train(1)
    await lab.backward(of, dhs=tensor(1, 3, H))


@row("INVALID_ARGUMENT", "BAD_TENSOR", "initial_state")
async def bad_state(lab: Lab) -> None:
    """A state of another H than the model's."""
    await lab.create()
    await lab.open(initial_state=tensor(1, H + 1))


@row("INVALID_ARGUMENT", "NON_FINITE", "xs[0,0,0] is NaN")
async def nan_input(lab: Lab) -> None:
    """A chunk with NaN."""
    await (await lab.opened()).forward(1, float("nan"))


@row("INVALID_ARGUMENT", "NON_FINITE", "dhs[0,0,0] is infinite")
async def infinite_gradient(lab: Lab) -> None:
    """A gradient with infinity."""
    of = await (await lab.opened()).train(1)
    await lab.backward(of, float("inf"))


@row("INVALID_ARGUMENT", "NON_FINITE", "state[0,0] is NaN")
async def nan_state(lab: Lab) -> None:
    """A state with NaN."""
    await lab.opened()
    request = session_pb.SetStateRequest(session_id="s", state=tensor(1, H, value=float("nan")))
    await lab.sessions.SetState(request)


@row("INVALID_ARGUMENT", "NON_FINITE", "b[0] is NaN")
async def nan_weights(lab: Lab) -> None:
    """Weights with NaN in a file."""
    await lab.create()
    await lab.upload(file_of(b=np.full(H, np.nan, np.float32)))


@row("INVALID_ARGUMENT", "BAD_WEIGHTS")
async def pickled_weights(lab: Lab) -> None:
    """A file that is no safetensors file."""
    await lab.create()
    await lab.upload(b"\x80\x04\x95" + bytes(200))


@row("INVALID_ARGUMENT", "BAD_FIELD", "page_token")
async def bad_page_token(lab: Lab) -> None:
    """A token that no page gave."""
    await lab.sessions.ListSessions(session_pb.ListSessionsRequest(page_token="*/../{}"))  # noqa: S106


@row("INVALID_ARGUMENT", "BAD_FIELD", "numbers: must be 1 to 1000 numbers, got 0")
async def no_version_numbers(lab: Lab) -> None:
    """FindVersions does not list all versions at once."""
    await lab.create()
    await lab.models.FindVersions(model_pb.FindVersionsRequest(model_id="m"))


# --- NOT_FOUND ------------------------------------------------------------------------------------


@row("NOT_FOUND", "SESSION_NOT_FOUND")
async def never_opened(lab: Lab) -> None:
    """A session that never was."""
    lab.session.epoch = 5
    await lab.forward(1)


@row("NOT_FOUND", "SESSION_EXPIRED", min_ttl_ms=20)
async def expired(lab: Lab) -> None:
    """A session whose time to live has passed."""
    ttl = Duration(nanos=20_000_000)
    await lab.opened(ttl=ttl)
    await asyncio.sleep(0.05)
    await lab.forward(1)


@row("NOT_FOUND", "SESSION_CLOSED")
async def closed(lab: Lab) -> None:
    """A session that was closed."""
    await (await lab.opened()).forward(1)
    await lab.sessions.CloseSession(session_pb.CloseSessionRequest(session_id="s"))
    await lab.forward(2)


@row("NOT_FOUND", "MODEL_NOT_FOUND")
async def no_model(lab: Lab) -> None:
    """A model that never was."""
    await lab.update()


@row("NOT_FOUND", "MODEL_NOT_FOUND")
async def model_of_another_incarnation(lab: Lab) -> None:
    """A model deleted and made again is not the session's any more."""
    await (await lab.opened()).forward(1)
    await lab.models.DeleteModel(model_pb.DeleteModelRequest(model_id="m"))
    await lab.create()
    await asyncio.sleep(0.06)  # as old as a head may be served
    await lab.forward(2)


@row("NOT_FOUND", "VERSION_GONE", superseded_bytes_per_model=0)
async def version_gone(lab: Lab) -> None:
    """A version that was superseded long ago."""
    await lab.create()
    for number in range(6):
        await lab.upload(file_of(), f"u{number}")
    await lab.download(version=WeightsVersion(number=1))


@row("NOT_FOUND", "CHECKPOINT_NOT_FOUND")
async def no_checkpoint(lab: Lab) -> None:
    """A checkpoint that never was."""
    await lab.create()
    request = model_pb.DeleteCheckpointRequest(model_id="m", checkpoint_id="c")
    await lab.models.DeleteCheckpoint(request)


# --- ALREADY_EXISTS -------------------------------------------------------------------------------


@row("ALREADY_EXISTS", "SESSION_EXISTS")
async def session_exists(lab: Lab) -> None:
    """A live session is not opened again unless asked."""
    await lab.opened()
    await lab.open()


@row("ALREADY_EXISTS", "MODEL_EXISTS")
async def model_exists(lab: Lab) -> None:
    """A model's name is taken."""
    await lab.create()
    await lab.create(seed=1)


@row("ALREADY_EXISTS", "SEQ_REUSED", "chunk 1 was already applied with different content")
async def seq_reused(lab: Lab) -> None:
    """Other content under a number that was used."""
    await (await lab.opened()).forward(1)
    await lab.forward(1, value=0.25)


@row("ALREADY_EXISTS", "REQUEST_ID_REUSED")
async def request_id_reused(lab: Lab) -> None:
    """Other content under a request id that was used."""
    await lab.backward(await (await lab.opened()).train(1))
    await lab.update("r")
    await lab.update("r", clip_norm=2.0)


@row("ALREADY_EXISTS", "CHECKPOINT_EXISTS")
async def checkpoint_exists(lab: Lab) -> None:
    """Another version under a checkpoint's name."""
    await lab.create()
    request = model_pb.CreateCheckpointRequest(model_id="m", checkpoint_id="c")
    await lab.models.CreateCheckpoint(request)
    await lab.upload(file_of())
    request.version.number = 2
    await lab.models.CreateCheckpoint(request)


# --- ABORTED --------------------------------------------------------------------------------------


@row("ABORTED", "SEQ_GAP", "expected chunk_seq 2")
async def seq_gap(lab: Lab) -> None:
    """A chunk whose number leaves out the next."""
    await (await lab.opened()).forward(1)
    await lab.forward(3)


@row("ABORTED", "SEQ_GAP")
async def backward_above(lab: Lab) -> None:
    """A Backward of a chunk that is not there yet is a loss, not a missing tape."""
    of = await (await lab.opened()).train(1)
    of.chunk_seq = 2
    await lab.backward(of)


@row("ABORTED", "EPOCH_FENCED")
async def epoch_fenced(lab: Lab) -> None:
    """A writer of an older epoch."""
    await (await lab.opened()).forward(1)
    await lab.sessions.ResetState(session_pb.ResetStateRequest(session_id="s"))
    await lab.forward(2)


@row("ABORTED", "HISTORY_FORKED")
async def history_forked(lab: Lab) -> None:
    """A chunk that follows another history."""
    await (await lab.opened()).forward(1)
    await lab.forward(2, previous_token=OTHER)


@row("ABORTED", "VERSION_CONFLICT", "the contribution of chunk 1 is recorded")
async def step_refused_after_its_contribution(lab: Lab) -> None:
    """The Update in a Backward expects another head; the error says what the Backward left."""
    await lab.opened()
    expected = WeightsVersion(number=7)
    update = pb.UpdateRequest(request_id="r", expected_version=expected)
    await lab.backward(await lab.train(1), update=update)


@row("ABORTED", "VERSION_CONFLICT")
async def version_conflict(lab: Lab) -> None:
    """A step from another head than the present one."""
    await lab.backward(await (await lab.opened()).train(1))
    await lab.update(expected_version=WeightsVersion(number=7))


# --- FAILED_PRECONDITION --------------------------------------------------------------------------


@row("FAILED_PRECONDITION", "TAPE_MISSING")
async def tape_missing(lab: Lab) -> None:
    """A chunk that ran in INFER mode left no tape."""
    await lab.backward(await (await lab.opened()).forward(1))


@row("FAILED_PRECONDITION", "WEIGHTS_FORKED")
async def weights_forked(lab: Lab) -> None:
    """A version's number with other content."""
    await lab.opened()
    await lab.forward(1, pinned_version=WeightsVersion(number=1, digest=OTHER))


@row("FAILED_PRECONDITION", "NO_GRADIENTS")
async def no_gradients(lab: Lab) -> None:
    """A step from nothing."""
    await lab.create()
    await lab.update()


@row("FAILED_PRECONDITION", "NO_GRADIENTS")
async def named_gradient_missing(lab: Lab) -> None:
    """A named contribution that is not there."""
    await lab.backward(await (await lab.opened()).train(1))
    named = pb.ContributionSelector(session_id="s", epoch=lab.session.epoch, chunk_seqs=[1, 2])
    await lab.update(contributions=[named])


@row("FAILED_PRECONDITION", "REPLAY_WINDOW_PASSED")
async def replay_window_passed(lab: Lab) -> None:
    """A chunk sent again long after it was applied."""
    await lab.opened()
    for seq in range(1, 8):
        await lab.forward(seq)
    await lab.forward(1)


@row("FAILED_PRECONDITION", "NON_FINITE_RESULT", "xs[0]: the state after it would be NaN")
async def non_finite_state(lab: Lab) -> None:
    """A chunk of finite numbers whose products overflow to both sides is not applied."""
    await lab.opened(batch_size=2)
    await lab.upload(
        file_of(Wx=np.full((D, H), 3, np.float32), Wh=np.full((H, H), -3e38, np.float32))
    )
    await lab.forward(1, xs=tensor(2, 2, D, value=3e38))


@row("FAILED_PRECONDITION", "NON_FINITE_RESULT", "v.Wx, v.Wh, v.b would not be finite")
async def non_finite_moments(lab: Lab) -> None:
    """A step whose moments would become infinite is not made, though its weights would not."""
    spec = model_pb.ModelSpec(
        model_id="m",
        input_size=D,
        hidden_size=H,
        optimizer=model_pb.Optimizer(adam=model_pb.Adam()),
    )
    await lab.create(spec=spec)
    lab.session = await lab.open()
    await lab.backward(await lab.train(1), 1e25)
    await lab.update()


@row("FAILED_PRECONDITION", "NON_FINITE_RESULT")
async def non_finite_gradient(lab: Lab) -> None:
    """A gradient that overflows on the way back leaves no contribution."""
    await lab.backward(await (await lab.opened()).train(1), 3e38)


@row("FAILED_PRECONDITION", "NON_FINITE_RESULT")
async def non_finite_step(lab: Lab) -> None:
    """A step that would make weights infinite is not made."""
    await lab.backward(await (await lab.opened()).train(1), 1e37)
    await lab.update(learning_rate=1000.0)


@row("FAILED_PRECONDITION", "UNSUPPORTED_LAYOUT", "found layout 2, this server knows layout 1")
async def unsupported_layout(lab: Lab) -> None:
    """A session whose record a later release has written."""
    await (await lab.opened()).forward(1)
    async with Redis.from_url(lab.store.url) as client:
        await client.setrange(keys.session_tag(SessionKey(lab.tenant, "s")), 0, b"\x02")
    await lab.forward(2)


# --- RESOURCE_EXHAUSTED ---------------------------------------------------------------------------


@row("RESOURCE_EXHAUSTED", "MAX_SESSIONS", sessions_per_tenant=1)
async def too_many_sessions(lab: Lab) -> None:
    """One session more than a tenant may have."""
    await lab.opened()
    await lab.open("other")


@row("RESOURCE_EXHAUSTED", "MAX_MODELS", models_per_tenant=1)
async def too_many_models(lab: Lab) -> None:
    """One model more than a tenant may have."""
    await lab.create()
    await lab.create("other")


@row("RESOURCE_EXHAUSTED", "TAPE_QUOTA", tapes_per_session=1)
async def too_many_tapes(lab: Lab) -> None:
    """One tape more than a session may hold."""
    await (await lab.opened()).train(1)
    await lab.train(2)


@row("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE", message_bytes=2000)
async def answer_too_large(lab: Lab) -> None:
    """A chunk whose answer would not fit is refused before it is applied."""
    await lab.opened()
    await lab.forward(1, xs=tensor(1, 120, D))


@row("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE", message_bytes=2000)
async def request_too_large(lab: Lab) -> None:
    """A message over the limit."""
    await lab.opened()
    request = session_pb.SetStateRequest(session_id="s", state=tensor(100, H, value=1.0))
    request.state.data *= 2
    await lab.sessions.SetState(request)


@row("RESOURCE_EXHAUSTED", "STORE_FULL", store={})
async def store_full(lab: Lab) -> None:
    """A store without room changes nothing."""
    await (await lab.opened()).forward(1)
    await set_in_store(lab, "maxmemory", "1mb")
    await lab.forward(2)


@row("RESOURCE_EXHAUSTED", "OVERLOADED", operations_in_flight=0)
async def overloaded(lab: Lab) -> None:
    """A replica that takes no more."""
    await lab.forward(1, epoch=1)


# --- UNAVAILABLE ----------------------------------------------------------------------------------


@row("UNAVAILABLE", "STORE_DOWN", store={})
async def store_down(lab: Lab) -> None:
    """A store that is gone."""
    await lab.opened()
    lab.store.stop()
    await lab.forward(1, session_id="cold")


# The head stays cached, so that the commit is the first call that the store does not answer.
@row("UNAVAILABLE", "UNKNOWN_OUTCOME", store={}, head_max_age_ms=60_000)
async def unknown_outcome(lab: Lab) -> None:
    """A commit whose answer never came."""
    await (await lab.opened()).forward(1)
    os.kill(lab.store.pid, signal.SIGSTOP)
    try:
        await lab.forward(2)
    finally:
        os.kill(lab.store.pid, signal.SIGCONT)


@row("UNAVAILABLE", "DRAINING")
async def draining(lab: Lab) -> None:
    """A call that slips in while the server stops."""
    lab.server.dispatcher.is_draining = True
    await lab.forward(1, epoch=1)


# --- INTERNAL -------------------------------------------------------------------------------------


@row("INTERNAL", "BUG", "internal error, id ")
async def bug(lab: Lab) -> None:
    """A mistake of ours, planted."""

    def broken(*_arguments: Any) -> None:
        raise ZeroDivisionError('File "/usr/lib/secret" in redis')

    forward = lab.server.dispatcher.operation_of(pb.ForwardRequest.DESCRIPTOR).behaviour
    forward.run.__self__.sizes = broken
    await lab.forward(1, epoch=1)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # what NON_FINITE_RESULT is
@pytest.mark.parametrize("over_stream", [False, True], ids=["unary", "stream"])
@pytest.mark.parametrize("each", ROWS, ids=lambda each: f"{each.reason}-{each.situation.__name__}")
async def test_a_situation_has_its_code_and_reason(
    make_lab: LabMaker, unpack: Unpack, each: Row, *, over_stream: bool
) -> None:
    """Code, reason and words as the table says; nothing in them is for our eyes only."""
    lab = await make_lab(each, over_stream=over_stream)
    refusal = unpack(await refusal_status(each.situation(lab)))
    assert (refusal.code, refusal.reason) == (each.code, each.reason)
    assert each.text in refusal.message
    assert not LEAKS.search(f"{refusal.message} {refusal.metadata}")
    has_delay = "RetryInfo" in refusal.details
    assert has_delay or each.code != "UNAVAILABLE"


async def test_a_refused_chunk_leaves_the_state_as_it_was(make_lab: LabMaker) -> None:
    """Ten chunks that fail for ten reasons, and GetState says what it said before."""
    lab = await (await make_lab(Row("", "", bug, {}, None, ""), over_stream=False)).opened()
    await lab.forward(1)
    request = session_pb.GetStateRequest(session_id="s")
    before = await lab.sessions.GetState(request)
    bad: list[dict[str, Any]] = [
        {"xs": tensor(1, 2, 5)}, {"xs": tensor(2, 2, D)}, {"xs": tensor(1, 0, D)}, {"xs": tensor(2, D)},
        {"xs": tensor(1, 2, D, dtype="float64")}, {"value": float("nan")}, {"chunk_seq": 4}, {"epoch": 1},
        {"previous_token": OTHER}, {"pinned_version": WeightsVersion(number=9)},
    ]  # fmt: skip
    for fields in bad:
        with pytest.raises(grpc.aio.AioRpcError):
            await lab.forward(**{"chunk_seq": 2, **fields})
    assert await lab.sessions.GetState(request) == before


async def set_in_store(lab: Lab, name: str, value: str) -> None:
    """Change a setting of the lab's store."""
    reader, writer = await asyncio.open_unix_connection(str(lab.store.data_dir / "store.sock"))
    writer.write(f"CONFIG SET {name} {value}\r\n".encode())
    assert await reader.readline() == b"+OK\r\n"
    writer.close()
    await writer.wait_closed()
