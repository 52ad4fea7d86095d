"""Each command of each operation refused in turn: what is answered is what the store holds."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from redis.asyncio import Redis

from instruments.redis_servers import RedisServer, snapshot_failing
from instruments.refusing_store import REFUSALS, RefusingLink
from instruments.replicas import HIDDEN, Client, draw, open_on, start_replica, step
from rnn_engine import Adam, TanhNetwork
from service.domain.errors import DomainError, NotFound
from service.domain.types import (
    DiscardGradients,
    ForkSession,
    InitialWeights,
    ModelKey,
    ModelSpec,
    NewEpoch,
    OnExists,
    Selector,
    SessionKey,
)
from service.settings import Limits
from service.store import keys

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from instruments.refusing_store import Refusal
    from instruments.replicas import Replica
    from instruments.report import Proof

    Act = Callable[[], Awaitable[object]]

MOST_COMMANDS = 12  # that an operation sends, with what it sends again
NOTHING_DONE = ("STORE_FULL", "STORE_DOWN")


@pytest.fixture(scope="module")
def store() -> Iterator[RedisServer]:
    """A store that can be made to refuse; its snapshots fail, which it minds only when it is set to."""
    with RedisServer(append_only=False) as running, snapshot_failing(running):
        running.ask("CONFIG", "SET", "stop-writes-on-bgsave-error", "no")
        yield running


@pytest.fixture
async def replicas(store: RedisServer) -> AsyncIterator[tuple[Replica, Replica]]:
    """The replica that is refused, and one beside it."""
    one, other = await start_replica(store.url, Limits()), await start_replica(store.url, Limits())
    yield one, other
    await one.close()
    await other.close()


@dataclass
class Scene:
    """A tenant of its own with a model, and a session that has a tape and a waiting contribution.

    Attributes:
        replica: Whose commands are refused.
        other: Another one, which is not disturbed.
        tenant: Whose keys nobody else touches.
        client: Of session `s`, which has applied chunks 1 (its gradient recorded) and 2 (its tape waits).
        rng: Draws data; equal seeds give equal scenes.
    """

    replica: Replica
    other: Replica
    tenant: str
    client: Client
    rng: np.random.Generator

    async def contents(self, raw: Redis) -> dict[bytes, bytes | None]:
        """Read what must not change: all keys of the session's and the model's slots but what is only staged."""
        found: dict[bytes, bytes | None] = {}
        for name in ("s", "twin", "new"):
            tag = keys.session_tag(SessionKey(self.tenant, name))
            async for key in raw.scan_iter(match=tag + b"*", count=1000):
                if not key.startswith(keys.staged_tape_key(tag, b"")):
                    found[key] = await raw.dump(key)
        for name in ("m", "n"):
            tag = keys.model_tag(ModelKey(self.tenant, name))
            async for key in raw.scan_iter(match=tag + b"*", count=1000):
                is_part = key[len(tag) : len(tag) + 1] in (b"W", b"M", b"d")
                if not is_part or await raw.pttl(key) < 0:
                    found[key] = await raw.dump(key)
        return found

    async def summary(self) -> list[object]:
        """Describe the state of everything, independently of when it got there."""
        return [
            *[await self._session(name) for name in ("s", "twin", "new")],
            *[await self._model(name) for name in ("m", "n")],
        ]

    async def _session(self, name: str) -> object:
        try:
            found = await self.other.sessions.get_state(
                SessionKey(self.tenant, name), extend_ttl=False
            )
        except NotFound as error:
            return error.reason
        return found.session.chunk_seq, found.state.tobytes()

    async def _model(self, name: str) -> object:
        try:
            view = await self.other.models.get(ModelKey(self.tenant, name))
        except NotFound as error:
            return error.reason
        kept = await self.other.models.list_checkpoints(ModelKey(self.tenant, name))
        return view.head, view.waiting_count, [(one.checkpoint_id, one.version) for one in kept]


async def lay_out(replicas: tuple[Replica, Replica], tenant: str) -> Scene:
    """Make a scene; all of them are alike."""
    rng = np.random.default_rng(5)
    one, other = replicas
    spec = ModelSpec("m", TanhNetwork(3, HIDDEN), "float32", Adam(lr=0.01))
    await one.models.create(tenant, spec, InitialWeights(seed=1), request_id="")
    await one.models.create_checkpoint(ModelKey(tenant, "m"), "old", None)
    opened = await open_on(one, tenant)
    client = Client([one], tenant, "s", opened.session.epoch)
    for _ in range(2):
        await client.forward(draw(rng), train=True)
    await client.backward(draw(rng, size=HIDDEN), 1)
    return Scene(one, other, tenant, client, rng)


async def _forward(scene: Scene, **options: Any) -> Act:
    chunk = scene.client.chunk(draw(scene.rng), **options)
    return lambda: scene.replica.recurrence.forward(scene.tenant, chunk)


async def _train(scene: Scene) -> Act:
    return await _forward(scene, train=True)


async def _replay_behind(scene: Scene) -> Act:
    """A chunk that the other replica has applied, sent to the one whose state is older."""
    chunk = scene.client.chunk(draw(scene.rng))
    await scene.other.recurrence.forward(scene.tenant, chunk)
    return lambda: scene.replica.recurrence.forward(scene.tenant, chunk)


async def _backward(scene: Scene, **options: Any) -> Act:
    op = scene.client.gradient(draw(scene.rng, size=HIDDEN), 2, **options)
    return lambda: scene.replica.backpropagation.backward(scene.tenant, op)


async def _backward_and_step(scene: Scene) -> Act:
    return await _backward(scene, update=step("", "u"))


async def _backward_and_step_over_all(scene: Scene) -> Act:
    return await _backward(scene, update=step("", "u", Selector("s")))


async def _update(scene: Scene) -> Act:
    op = step("m", "u", Selector("s", scene.client.epoch, (1,)))
    return lambda: scene.replica.updates.update(scene.tenant, op)


async def _discard(scene: Scene) -> Act:
    op = DiscardGradients("m", (Selector("s"),))
    return lambda: scene.replica.waiting.discard(scene.tenant, op)


def _open(session_id: str, on_exists: OnExists) -> Callable[[Scene], Awaitable[Act]]:
    async def prepare(scene: Scene) -> Act:
        return lambda: open_on(
            scene.replica, scene.tenant, session_id, on_exists=on_exists, request_id="open"
        )

    return prepare


async def _set_state(scene: Scene) -> Act:
    state = draw(scene.rng, size=HIDDEN)[:, 0].copy()
    op = NewEpoch("s", state, scene.client.epoch, 2, "set", 0)
    return lambda: scene.replica.sessions.begin_epoch(scene.tenant, op)


async def _get_state(scene: Scene) -> Act:
    return lambda: scene.replica.sessions.get_state(SessionKey(scene.tenant, "s"), extend_ttl=True)


async def _fork(scene: Scene) -> Act:
    op = ForkSession("s", "twin", None, "fork")
    return lambda: scene.replica.sessions.fork(scene.tenant, op)


async def _close(scene: Scene) -> Act:
    return lambda: scene.replica.sessions.close(SessionKey(scene.tenant, "s"), 0)


async def _list_waiting(scene: Scene) -> Act:
    return lambda: scene.replica.waiting.list_waiting(SessionKey(scene.tenant, "s"))


async def _import_model(scene: Scene) -> Act:
    spec = ModelSpec("n", TanhNetwork(3, HIDDEN), "float32", Adam())
    _, data = await scene.other.models.read_weights(
        ModelKey(scene.tenant, "m"), None, include_moments=False
    )
    return lambda: scene.replica.models.import_model(scene.tenant, spec, data, request_id="import")


async def _find_versions(scene: Scene) -> Act:
    return lambda: scene.replica.models.find_versions(ModelKey(scene.tenant, "m"), (1,))


async def _create_model(scene: Scene) -> Act:
    spec = ModelSpec("n", TanhNetwork(3, HIDDEN), "float32", Adam())
    return lambda: scene.replica.models.create(
        scene.tenant, spec, InitialWeights(seed=2), request_id="create"
    )


async def _delete_model(scene: Scene) -> Act:
    return lambda: scene.replica.models.delete(ModelKey(scene.tenant, "m"), allow_missing=True)


async def _put_weights(scene: Scene) -> Act:
    _, data = await scene.other.models.read_weights(
        ModelKey(scene.tenant, "m"), None, include_moments=False
    )
    return lambda: scene.replica.models.put_weights(
        ModelKey(scene.tenant, "m"), data, expected=None, request_id="put"
    )


async def _restore_checkpoint(scene: Scene) -> Act:
    return lambda: scene.replica.models.restore_checkpoint(
        ModelKey(scene.tenant, "m"), "old", expected=None, request_id="back"
    )


async def _create_checkpoint(scene: Scene) -> Act:
    return lambda: scene.replica.models.create_checkpoint(ModelKey(scene.tenant, "m"), "kept", None)


async def _delete_checkpoint(scene: Scene) -> Act:
    return lambda: scene.replica.models.delete_checkpoint(
        ModelKey(scene.tenant, "m"), "old", allow_missing=True
    )


OPERATIONS: dict[str, Callable[[Scene], Awaitable[Act]]] = {
    "Forward": _forward,
    "Forward in TRAIN mode": _train,
    "Forward again, another replica having applied it": _replay_behind,
    "Backward": _backward,
    "Backward with its own Update": _backward_and_step,
    "Backward with an Update over all": _backward_and_step_over_all,
    "Update": _update,
    "DiscardGradients": _discard,
    "ListWaiting": _list_waiting,
    "OpenSession": _open("new", OnExists.FAIL),
    "OpenSession with RESUME": _open("s", OnExists.RESUME),
    "OpenSession with RESET": _open("s", OnExists.RESET),
    "OpenSession with MUST_EXIST": _open("s", OnExists.MUST_EXIST),
    "SetState": _set_state,
    "GetState that extends": _get_state,
    "ForkSession": _fork,
    "CloseSession": _close,
    "CreateModel": _create_model,
    "ImportModel": _import_model,
    "FindVersions": _find_versions,
    "DeleteModel": _delete_model,
    "PutWeights": _put_weights,
    "RestoreCheckpoint": _restore_checkpoint,
    "CreateCheckpoint": _create_checkpoint,
    "DeleteCheckpoint": _delete_checkpoint,
}


@pytest.mark.timeout(240)
@pytest.mark.promise("R24b", "a refusal says what was done, whichever command the store refuses")
@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda one: one.name)
async def test_each_command_of_each_operation_is_refused_in_turn(
    store: RedisServer, replicas: tuple[Replica, Replica], proof: Proof, refusal: Refusal, seed: int
) -> None:
    """A refusal left all as it was; what was answered was done; the same call again ends as undisturbed."""
    await _measure_steady(replicas, f"{refusal.name}-steady-{seed}", proof)
    async with Redis.from_url(store.url) as raw:
        for name, operation in OPERATIONS.items():
            calm = await lay_out(replicas, f"{refusal.name}-{name}-{seed}")
            await (await operation(calm))()
            wanted = await calm.summary()
            for is_lasting in (False, True):
                for at in range(1, MOST_COMMANDS):
                    where = f"{name}, {refusal.name} at command {at}{' and on' * is_lasting}"
                    scene = await lay_out(replicas, f"{where}-{seed}")
                    act = await operation(scene)
                    before = await scene.contents(raw)
                    link = RefusingLink(
                        scene.replica.store._client, refusal, at, is_lasting=is_lasting
                    )
                    outcome = await _outcome(act)
                    await link.remove()
                    if not link.has_refused:
                        proof.require(
                            await scene.summary() == wanted, f"{where}: undisturbed, {outcome}"
                        )
                        break
                    proof.hit(refusal.name)
                    await _check_outcome(scene, outcome, before, raw, where, proof)
                    if not isinstance(outcome, Exception):
                        proof.require(
                            await scene.summary() == wanted, f"{where}: answered, not done"
                        )
                    again = await _outcome(act)
                    proof.require(not isinstance(again, Exception), f"{where}: then {again!r}")
                    proof.require(
                        await scene.summary() == wanted, f"{where}: {outcome}, then otherwise"
                    )


async def _measure_steady(replicas: tuple[Replica, Replica], tenant: str, proof: Proof) -> None:
    scene = await lay_out(replicas, tenant)
    started = time.monotonic()
    for _ in range(50):
        await scene.client.forward(draw(scene.rng))
    proof.steady(50, time.monotonic() - started)


async def _outcome(act: Act) -> object:
    try:
        return await act()
    except DomainError as error:
        return error
    finally:
        await asyncio.sleep(0)  # what an answer left to be noted behind it


async def _check_outcome(
    scene: Scene,
    outcome: object,
    before: dict[bytes, bytes | None],
    raw: Redis,
    where: str,
    proof: Proof,
) -> None:
    """Compare a refusal with what the store holds."""
    if not isinstance(outcome, Exception):
        return
    if not isinstance(outcome, DomainError):
        proof.violated(f"{where}: {outcome!r}")
        return
    if "recorded" in outcome.metadata:
        waiting = (await scene.other.models.get(ModelKey(scene.tenant, "m"))).waiting_count
        proof.require(waiting == 2, f"{where}: {outcome.reason}, recorded, {waiting} wait")
        proof.require("nothing was changed" not in outcome.message, f"{where}: {outcome.message}")
    elif outcome.reason in NOTHING_DONE:
        proof.require(
            await scene.contents(raw) == before, f"{where}: {outcome.reason}, but changed"
        )
    else:
        proof.require(outcome.reason == "UNKNOWN_OUTCOME", f"{where}: {outcome!r}")
        proof.require("nothing was changed" not in outcome.message, f"{where}: {outcome.message}")
