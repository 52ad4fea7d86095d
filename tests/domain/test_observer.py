"""What an observer is reported of batches, round trips, caches, chunks, contributions and versions."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest_asyncio

from instruments.replicas import HIDDEN, INPUTS, ROWS, Client, draw, open_on, refusal, step
from recorder import NOTED, Recorder
from rnn_engine import SGD, TanhNetwork
from service.domain.types import InitialWeights, ModelKey, ModelSpec, SessionKey
from service.telemetry import Observer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from instruments.replicas import Replica

STEPS = 5
STATE_BYTES = 4 * ROWS * HIDDEN
WEIGHTS_BYTES = 4 * (INPUTS * HIDDEN + HIDDEN * HIDDEN + HIDDEN)


class Watched(NamedTuple):
    """A replica with a model and a session, and what watches it."""

    replica: Replica
    client: Client
    recorder: Recorder


@pytest_asyncio.fixture
async def watched(make_replica: Callable[..., Awaitable[Replica]], tenant: str) -> Watched:
    """A replica whose caches know the model's head and the session."""
    recorder = Recorder()
    replica = await make_replica(observer=recorder, head_max_age_ms=600_000)
    spec = ModelSpec("m", TanhNetwork(INPUTS, HIDDEN), "float32", SGD(lr=0.1))
    await replica.models.create(tenant, spec, InitialWeights(seed=1), request_id="")
    opened = await open_on(replica, tenant)
    client = Client([replica], tenant, "s", opened.session.epoch)
    await client.forward(chunk(np.random.default_rng(1)))
    recorder.clear()
    return Watched(replica, client, recorder)


def chunk(rng: np.random.Generator) -> Any:
    """Draw a chunk's inputs."""
    return draw(rng, steps=STEPS)


def test_the_recorder_notes_every_method() -> None:
    """No report is missing from the list by which the recorder takes them."""
    methods = {name for name in vars(Observer) if not name.startswith("_")}
    assert methods == {*NOTED, "cache_added"}


async def test_a_chunk_of_a_cached_session_is_one_batch_and_one_round_trip(
    watched: Watched, rng: np.random.Generator
) -> None:
    """Rows, work, bytes and durations are those of the chunk; four reports at most are made for it."""
    await watched.client.forward(chunk(rng))
    seen = watched.recorder.seen
    (batch,), (trip,) = seen["batch_computed"], seen["round_trip_ended"]
    assert (batch["chunks"], batch["rows"]) == (1, ROWS)
    assert batch["work"] == ROWS * STEPS * (INPUTS + HIDDEN + 1) * HIDDEN
    assert 0 < batch["duration_s"] < 60
    assert 0 < batch["wait_s"] < 60
    assert (trip["name"], trip["commands"], trip["is_lost"]) == ("commit_chunks", 1, False)
    assert STATE_BYTES < trip["sent_bytes"] < STATE_BYTES + 1000
    assert trip["received_bytes"] == len(b"OK")
    assert 0 < trip["duration_s"] < 60
    assert seen["chunk_applied"] == [{"tape_bytes": 0}]
    assert sum(map(len, seen.values())) == 3  # and one for the operation, above the domain


async def test_chunks_of_several_sessions_are_one_batch(
    watched: Watched, tenant: str, rng: np.random.Generator
) -> None:
    """The batch has the rows and the work of all of them; each chunk is reported as applied."""
    clients = [watched.client]
    for name in ("s2", "s3"):
        opened = await open_on(watched.replica, tenant, name)
        clients.append(Client([watched.replica], tenant, name, opened.session.epoch))
    watched.recorder.clear()
    await asyncio.gather(*(client.forward(chunk(rng)) for client in clients))
    (batch,) = watched.recorder.seen["batch_computed"]
    assert (batch["chunks"], batch["rows"]) == (3, 3 * ROWS)
    assert batch["work"] == 3 * ROWS * STEPS * (INPUTS + HIDDEN + 1) * HIDDEN
    assert len(watched.recorder.seen["chunk_applied"]) == 3


async def test_a_chunk_that_comes_again_is_replayed_and_not_applied(
    watched: Watched, rng: np.random.Generator
) -> None:
    """A replay is one report of its own kind."""
    xs = chunk(rng)
    await watched.client.forward(xs)
    watched.recorder.clear()
    again = watched.client.forward(xs, chunk_seq=watched.client.chunk_seq, previous_token=b"")
    assert (await again).replayed
    assert watched.recorder.seen["chunk_replayed"] == [{}]
    assert watched.recorder.seen["chunk_applied"] == []


async def test_a_backward_with_an_update_records_and_publishes(
    watched: Watched, rng: np.random.Generator
) -> None:
    """The tape, the contribution and the version are each reported once, with the bytes written."""
    await watched.client.forward(chunk(rng), train=True)
    assert watched.recorder.seen["chunk_applied"] == [
        {"tape_bytes": 4 * ROWS * STEPS * INPUTS + STATE_BYTES}
    ]
    watched.recorder.clear()
    await watched.client.backward(draw(rng, steps=STEPS, size=HIDDEN), update=step("", "u1"))
    seen = watched.recorder.seen
    assert seen["contribution_recorded"] == [{"gradient_bytes": WEIGHTS_BYTES}]
    (version,) = seen["version_published"]
    assert version["contributions"] == 1
    assert version["version_bytes"] >= WEIGHTS_BYTES
    names = {trip["name"] for trip in seen["round_trip_ended"]}
    assert names >= {"read_tape", "record_contribution", "publish_version", "mark_tape_consumed"}


async def test_weights_that_are_uploaded_take_no_contributions(
    watched: Watched, tenant: str
) -> None:
    """A version that no optimizer step made is reported apart."""
    key = ModelKey(tenant, "m")
    _, data = await watched.replica.models.read_weights(key, None, include_moments=False)
    await watched.replica.models.put_weights(key, data, expected=None, request_id="put-1")
    (version,) = watched.recorder.seen["version_published"]
    assert version["contributions"] == 0


async def test_a_replayed_backward_records_nothing(
    watched: Watched, rng: np.random.Generator
) -> None:
    """The same contribution is reported when it is left, not when it is sent again."""
    await watched.client.forward(chunk(rng), train=True)
    dhs = draw(rng, steps=STEPS, size=HIDDEN)
    await watched.client.backward(dhs)
    assert (await watched.client.backward(dhs)).replayed
    assert len(watched.recorder.seen["contribution_recorded"]) == 1


async def test_a_refused_chunk_is_neither_applied_nor_computed(
    watched: Watched, rng: np.random.Generator
) -> None:
    """What is refused after the session was read costs one round trip and no batch."""
    watched.client.chunk_seq += 5
    assert (await refusal(watched.client.forward(chunk(rng)))).reason == "SEQ_GAP"
    seen = watched.recorder.seen
    assert [trip["name"] for trip in seen["round_trip_ended"]] == ["read_session"]
    assert seen["batch_computed"] == seen["chunk_applied"] == []


async def test_caches_count_hits_and_misses(watched: Watched, rng: np.random.Generator) -> None:
    """A chunk of a cached session hits session, head and weights; one of a forgotten session misses."""
    before = watched.recorder.lookups()
    await watched.client.forward(chunk(rng))
    after = watched.recorder.lookups()
    for name in ("sessions", "heads", "weights"):
        assert (after[name][0] - before[name][0], after[name][1]) == (1, before[name][1]), name
    assert set(after) == {"sessions", "heads", "weights", "moments", "tapes", "gradients"}
    assert watched.recorder.caches["sessions"].size_bytes > STATE_BYTES
    watched.replica.caches.sessions.drop(SessionKey(watched.client.tenant, "s"))
    await watched.client.forward(chunk(rng))
    assert watched.recorder.lookups()["sessions"] == (
        after["sessions"][0],
        after["sessions"][1] + 1,
    )
