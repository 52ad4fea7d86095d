"""Sessions that expire: as a whole, by the store's clock alone, and only when nobody used them."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from scenes.figures import figure
from scenes.fleet import Fleet
from scenes.training import Trainer
from scenes.wire import TIMEOUT_S, H, Model, Wire, answer_of, draw, outcome, refusal, steady_traffic
from service.domain.types import SessionKey
from service.store import keys
from timernn.v1 import model_service_pb2 as model_pb
from timernn.v1 import session_service_pb2 as session_pb

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from instruments.report import Proof

TTL_S, TAPE_TTL_S = 4.0, 1.5
SKEW_S = 3600
# A clock that is an hour off, in each sense of the word that Python has; not the monotonic one,
# which no administrator can set.
SKEWED = """
import datetime, time
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + ({skew})
time.time_ns = lambda: _time_ns() + ({skew}) * 10**9
"""


@pytest.fixture(scope="module")
def skews(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """The environments of a replica whose clock is fast, and of one whose clock is slow."""
    made = []
    for name, skew in (("fast", SKEW_S), ("slow", -SKEW_S)):
        folder: Path = tmp_path_factory.mktemp(name)
        (folder / "sitecustomize.py").write_text(SKEWED.format(skew=skew))
        made.append({"PYTHONPATH": str(folder)})
    return made


@pytest.fixture(scope="module")
def fleet(skews: list[dict[str, str]]) -> Iterator[Fleet]:
    """Two replicas whose clocks are two hours apart; tapes live shorter than sessions."""
    options = ("--limit-tape-ttl-ms", str(int(TAPE_TTL_S * 1000)))
    with Fleet(2, *options, envs=skews) as running:
        yield running


def keys_of(fleet: Fleet, session_id: str) -> list[str]:
    """Return what the keys of a session have after its tag: nothing for the record, e, t, t + name."""
    tag = keys.session_tag(SessionKey("default", session_id))
    cursor, found = b"0", []
    while True:
        cursor, names = fleet.store.ask("SCAN", cursor, "MATCH", tag + b"*", "COUNT", 1000)
        found += [name.removeprefix(tag)[:1].decode() for name in names]
        if cursor == b"0":
            return sorted(found)


@pytest.mark.timeout(300)
@pytest.mark.promise(
    "R22", "a session's time to live slides and it ends as a whole, by the store's clock"
)
@figure("sessions", 30, 300)
async def test_sessions_live_by_use_and_end_whole_whatever_the_replicas_clocks_say(
    fleet: Fleet, proof: Proof, seed: int, sessions: int
) -> None:
    """Used ones live on, read and refused ones do not; then a marker is all that is left."""
    rng = np.random.default_rng(seed)
    async with Wire(fleet.addresses[0]) as fast, Wire(fleet.addresses[1]) as slow:
        wires = (fast, slow)
        model = await Model.create(fast, rng, f"ttl-{seed}-{sessions}")
        await steady_traffic(proof, wires, model, rng)
        proof.hit("skewed clock", len(fleet.replicas))
        trainers = [
            await Trainer.start(model, wires[k % 2], rng, ttl=timedelta(seconds=TTL_S))
            for k in range(sessions)
        ]
        for k, trainer in enumerate(trainers):
            await trainer.record(wires[k % 2], await trainer.taped(wires[k % 2]))
            await trainer.taped(wires[k % 2])  # one tape waits, one is consumed
        for trainer in trainers:
            found = keys_of(fleet, trainer.writer.session.session_id)
            proof.require(found == ["", "e", "t", "t", "t"], f"keys {found}")
        used, kept, idle = trainers[::3], trainers[1::3], trainers[2::3]
        # Past the first expiry: the used ones live on by their chunks, the kept ones by asking for it.
        for k in range(6):
            await asyncio.sleep(TTL_S / 4)
            for n, trainer in enumerate(used):
                request = trainer.writer.chunk(draw(rng))
                trainer.writer.took(await wires[(n + k) % 2].forward(request))
            for n, trainer in enumerate(kept):
                await read(wires[(n + k) % 2], trainer, extend_ttl=True)
            for n, trainer in enumerate(idle if k < 2 else ()):
                await read(wires[(n + k) % 2], trainer, extend_ttl=False)
                wrong = trainer.writer.chunk(draw(rng, size=H))
                bad = await refusal(wires[n % 2].rnn.Forward(wrong, timeout=TIMEOUT_S))
                proof.require(bad.reason == "BAD_TENSOR", f"{bad!r}")
        for trainer in (*used, *kept):
            found = keys_of(fleet, trainer.writer.session.session_id)
            proof.require(found == ["", "e"], f"alive, its tapes over: keys {found}")
        await require_expired(fleet, wires, idle, proof)
        await asyncio.sleep(TTL_S + 1)
        await require_expired(fleet, wires, trainers, proof)
        await require_fenced(wires, model, trainers[0], rng, proof)


async def read(wire: Wire, trainer: Trainer, *, extend_ttl: bool) -> Any:
    """Read a session's state, extending its time to live or not."""
    request = session_pb.GetStateRequest(
        session_id=trainer.writer.session.session_id, extend_ttl=extend_ttl
    )
    answer = await outcome(wire.sessions.GetState(request, timeout=TIMEOUT_S))
    assert not extend_ttl or isinstance(answer, session_pb.GetStateResponse), answer
    return answer


async def require_expired(
    fleet: Fleet, wires: tuple[Wire, ...], trainers: list[Trainer], proof: Proof
) -> None:
    """Check that nothing but the marker is left, and that every replica says so."""
    for trainer in trainers:
        found = keys_of(fleet, trainer.writer.session.session_id)
        proof.require(found == ["e"], f"expired: keys {found}")
        for wire in wires:
            gone = await refusal(read(wire, trainer, extend_ttl=False))
            proof.require(gone.reason == "SESSION_EXPIRED", f"{gone!r}")
            request = trainer.writer.chunk(np.zeros((2, 3, 4), np.float32))
            gone = await refusal(wire.rnn.Forward(request, timeout=TIMEOUT_S))
            proof.require(gone.reason == "SESSION_EXPIRED", f"{gone!r}")
        proof.hit("session expired")


async def require_fenced(
    wires: tuple[Wire, ...],
    model: Model,
    trainer: Trainer,
    rng: np.random.Generator,
    proof: Proof,
) -> None:
    """Open an expired name anew on each replica: its epoch grows, writers of the earlier epoch are fenced."""
    epoch = trainer.writer.session.epoch
    for wire in wires:
        opened = await model.open(
            wire, trainer.writer.session.session_id, on_exists=session_pb.ON_EXISTS_RESET
        )
        proof.require(opened.session.epoch > epoch, "the epoch did not grow over the skewed clocks")
        proof.require(opened.session.epoch < epoch + SKEW_S * 1000, "a replica's clock was used")
        epoch = opened.session.epoch
        xs = draw(rng)
        opened.check(await wire.forward(opened.chunk(xs)), xs, proof)
    old = trainer.writer.chunk(draw(rng), 1, previous_token=b"")
    for wire in wires:
        fenced = await refusal(wire.rnn.Forward(old, timeout=TIMEOUT_S))
        proof.require(fenced.reason == "EPOCH_FENCED", f"{fenced!r}")


@pytest.mark.promise("R22", "a session's time to live slides and it ends as a whole", control=True)
async def test_the_replicas_clocks_are_really_wrong(fleet: Fleet, proof: Proof) -> None:
    """They say that they began two hours apart; else the run above would prove nothing."""
    starts = []
    for address in fleet.addresses:
        async with Wire(address) as wire:
            info = await answer_of(
                wire.models.GetServerInfo(model_pb.GetServerInfoRequest(), timeout=TIMEOUT_S)
            )
            starts.append(info.start_time.seconds)
    proof.require(starts[0] - starts[1] > SKEW_S, f"the clocks agree: {starts}")
