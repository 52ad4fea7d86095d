"""Random histories against a dictionary of local layers: two replicas, a real store that is broken on purpose."""

from __future__ import annotations

import asyncio
import copy
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from redis.asyncio import Redis

from instruments.redis_servers import RedisServer
from instruments.replicas import (
    HIDDEN,
    INPUTS,
    ROWS,
    Backup,
    draw,
    head_of,
    head_params,
    open_on,
    start_replica,
    step,
)
from rnn_engine import (
    Adam,
    TanhNetwork,
    apply_update,
    init_moments,
    rnn_backward,
    rnn_forward,
    sum_grads,
)
from scenes.figures import figure
from service.domain.digests import chunk_digest, contribution_key, first_token, next_token
from service.domain.errors import DomainError
from service.domain.types import (
    Backward,
    ChunkKey,
    ForkSession,
    Forward,
    InitialWeights,
    ModelSpec,
    NewEpoch,
    OnExists,
    SessionKey,
    Version,
)
from service.domain.weights import (
    moments_to_blob,
    version_digest,
    weights_to_blob,
)
from service.settings import Limits
from service.store import keys

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from instruments.replicas import (
        Replica,
    )
    from instruments.report import Proof
    from rnn_engine import (
        Array,
        Grads,
        Params,
        Tape,
    )
    from service.domain.types import (
        ContributionKey,
    )

NAMES = ("a", "b", "c")
WHICH = st.integers(0, 11)
WINDOW, MAX_TAPES = 4, 8
LONG = 2000
GONE = {"never": "SESSION_NOT_FOUND", "closed": "SESSION_CLOSED", "expired": "SESSION_EXPIRED"}


@dataclass
class Chunk:
    """A chunk that was applied: what it was given and what it gave."""

    xs: Array
    version: Version
    token: bytes
    tape: Tape
    is_train: bool


@dataclass
class Local:
    """A session as it must be."""

    state: str = "never"
    epoch: int = 0
    h0: Array = field(default_factory=lambda: np.zeros((ROWS, HIDDEN), np.float32))
    chunks: list[Chunk] = field(default_factory=list)
    waiting: set[int] = field(default_factory=set)  # tapes without a contribution

    @property
    def seq(self) -> int:
        """Number of the last chunk."""
        return len(self.chunks)

    @property
    def h(self) -> Array:
        """The hidden state after the newest chunk."""
        return np.ascontiguousarray(self.chunks[-1].tape.hs[:, -1]) if self.chunks else self.h0

    @property
    def token(self) -> bytes:
        """The state token of the newest chunk."""
        return self.chunks[-1].token if self.chunks else first_token(self.h0.tobytes())

    def begin(self, epoch: int, h0: Array | None = None) -> None:
        """Begin a new epoch."""
        self.state, self.epoch, self.chunks, self.waiting = "live", epoch, [], set()
        self.h0 = np.zeros((ROWS, HIDDEN), np.float32) if h0 is None else h0


class World:
    """What all examples share: a store, two replicas, an event loop, the evidence."""

    def __init__(self, store: RedisServer, proof: Proof) -> None:
        """Start the replicas."""
        self.loop = asyncio.new_event_loop()
        self.raw: Any = Redis.from_url(store.url)
        limits = Limits(replay_window=WINDOW, tapes_per_session=MAX_TAPES)
        self.replicas: list[Replica] = [
            self.run(start_replica(store.url, limits)) for _ in range(2)
        ]
        self.proof, self.examples = proof, 0

    def run(self, steps: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine to its end."""
        return self.loop.run_until_complete(steps)

    def close(self) -> None:
        """End replicas and store."""
        for replica in self.replicas:
            self.run(replica.close())
        self.run(self.raw.aclose())
        self.loop.close()


class Machine(RuleBasedStateMachine):
    """One tenant with a model and up to three sessions."""

    world: World

    def __init__(self) -> None:
        """Create the model and its twin here."""
        super().__init__()
        world = self.world
        world.examples += 1
        self.tenant = f"t{id(world)}-{world.examples}"
        self.rng = np.random.default_rng(0)  # each example anew, so that it can be shrunk
        self.optimizer = Adam(lr=1e-2)
        self.spec = ModelSpec("m", TanhNetwork(INPUTS, HIDDEN), "float32", self.optimizer)
        self.turn = self.reads = 0
        world.run(
            self.replica.models.create(self.tenant, self.spec, InitialWeights(3), request_id="")
        )
        self.head: Version = world.run(head_of(self.replica, self.tenant))
        params = world.run(head_params(self.replica, self.tenant, self.spec))
        self.params: dict[Version, Params] = {self.head: params}
        self.moments = init_moments(self.optimizer, self.params[self.head])
        self.sessions = {name: Local() for name in NAMES}
        self.grads: dict[ContributionKey, Grads] = {}  # contributions that wait
        self.recorded: dict[tuple[str, int, int], tuple[Backward, Any]] = {}
        self.backups: dict[str, tuple[Backup, Local]] = {}
        self.updates: list[tuple[Any, Any]] = []

    # -- how to say it ------------------------------------------------------------------------------

    @property
    def replica(self) -> Replica:
        """The replica of the moment."""
        return self.world.replicas[self.turn % 2]

    def outcome(self, call: Coroutine[Any, Any, Any]) -> Any:
        """Return what a call ends in: its answer, or the refusal."""

        async def run() -> Any:
            try:
                return await call
            except DomainError as error:
                return error

        return self.world.run(run())

    def expect(self, call: Coroutine[Any, Any, Any], reason: str) -> DomainError:
        """Check that a call is refused for this reason."""
        found = self.outcome(call)
        assert getattr(found, "reason", "") == reason, f"expected {reason}, got {found!r}"
        self.world.proof.checked()
        figures, name = self.world.proof.figures, f"{reason} raised"
        figures[name] = figures.get(name, 0) + 1
        refused: DomainError = found
        return refused

    def answer(self, call: Coroutine[Any, Any, Any]) -> Any:
        """Check that a call is answered."""
        found = self.outcome(call)
        assert not isinstance(found, DomainError), f"refused: {found!r}"
        self.world.proof.checked()
        figures, name = self.world.proof.figures, f"{getattr(call, '__name__', '?')} answered"
        figures[name] = figures.get(name, 0) + 1
        return found

    def fault(self, name: str) -> None:
        """Count a fault."""
        self.world.proof.hit(name)

    def chunk(self, name: str, xs: Array, seq: int = 0, **options: Any) -> Forward:
        """Lay out a chunk of a session, the next one by default."""
        local = self.sessions[name]
        token = options.pop("previous_token", local.token if not seq else b"")
        epoch = options.pop("epoch", local.epoch or 1)
        return Forward(name, epoch, seq or local.seq + 1, token, xs, **options)

    def forward(self, op: Forward) -> Coroutine[Any, Any, Any]:
        """Send a chunk to the replica of the moment."""
        return self.replica.recurrence.forward(self.tenant, op)

    def is_live(self, name: str) -> bool:
        """Return whether a session is live; check the refusal of the others."""
        local = self.sessions[name]
        if local.state == "live":
            return True
        self.expect(self.forward(self.chunk(name, draw(self.rng))), GONE[local.state])
        return False

    def name_of(self, which: int) -> str:
        """Choose a session: mostly one of the live ones, sometimes any."""
        live = [name for name in NAMES if self.sessions[name].state == "live"]
        choice = live if live and which < 9 else NAMES
        return choice[which % len(choice)]

    # -- chunks -------------------------------------------------------------------------------------

    @initialize()
    def begin(self) -> None:
        """Open two sessions."""
        self.open("a", OnExists.FAIL)
        self.open("b", OnExists.RESUME)

    @rule()
    def switch_replica(self) -> None:
        """Go on with the other replica."""
        self.turn += 1

    @rule(which=WHICH, train=st.booleans(), steps=st.integers(1, 4))
    def forward_next(self, which: int, train: bool, steps: int) -> None:  # noqa: FBT001 - hypothesis'
        """Apply the next chunk."""
        name = self.name_of(which)
        if not self.is_live(name):
            return
        local, xs = self.sessions[name], draw(self.rng, steps)
        op = self.chunk(name, xs, train=train)
        if train and len(local.waiting) >= MAX_TAPES:
            self.expect(self.forward(op), "TAPE_QUOTA")
            return
        self.compare(name, op, self.answer(self.forward(op)))

    @rule(which=WHICH, train=st.booleans(), count=st.integers(2, 6))
    def forward_several(self, which: int, train: bool, count: int) -> None:  # noqa: FBT001 - hypothesis'
        """Apply chunks on the replicas in turn."""
        for _ in range(count):
            self.forward_next(which, train, 2)
            self.turn += 1

    def compare(self, name: str, op: Forward, done: Any) -> None:
        """Apply a chunk here and compare."""
        local = self.sessions[name]
        tape = rnn_forward(self.params[done.version], op.xs, local.h)
        token = next_token(local.token, chunk_digest(op.xs, train=op.train), done.version)
        assert done.version == (op.pinned or self.head)
        assert np.array_equal(done.outputs, tape.hs)
        assert np.array_equal(done.state, tape.hs[:, -1])
        assert (done.token, done.replayed) == (token, False)
        local.chunks.append(Chunk(op.xs, done.version, token, tape, op.train))
        if op.train:
            local.waiting.add(local.seq)

    @rule(which=WHICH, back=st.integers(0, 6))
    def duplicate(self, which: int, back: int) -> None:
        """Send a chunk again that was applied, the last one or an earlier one."""
        name = self.name_of(which)
        local = self.sessions[name]
        if local.state != "live" or not local.seq:
            return
        back %= local.seq
        seq = local.seq - back
        chunk = local.chunks[seq - 1]
        op = self.chunk(name, chunk.xs, seq, train=chunk.is_train)
        self.fault("duplicate")
        if back >= WINDOW:
            self.expect(self.forward(op), "REPLAY_WINDOW_PASSED")
            return
        done = self.answer(self.forward(op))
        assert (done.token, done.version, done.replayed) == (chunk.token, chunk.version, True)
        assert np.array_equal(done.outputs, chunk.tape.hs)

    @rule(which=WHICH)
    def other_payload(self, which: int) -> None:
        """Send other content under the last number."""
        name = self.name_of(which)
        local = self.sessions[name]
        if local.state == "live" and local.seq:
            self.expect(self.forward(self.chunk(name, draw(self.rng, 5), local.seq)), "SEQ_REUSED")

    @rule(which=WHICH, hole=st.integers(1, 3))
    def gap(self, which: int, hole: int) -> None:
        """Send a chunk whose number leaves out others."""
        name = self.name_of(which)
        if self.is_live(name):
            seq = self.sessions[name].seq + 1
            refused = self.expect(
                self.forward(self.chunk(name, draw(self.rng), seq + hole)), "SEQ_GAP"
            )
            assert refused.metadata["expected_seq"] == str(seq)

    @rule(which=WHICH)
    def old_epoch(self, which: int) -> None:
        """Write as a writer of an earlier epoch."""
        name = self.name_of(which)
        if self.is_live(name):
            op = self.chunk(name, draw(self.rng), epoch=self.sessions[name].epoch - 1)
            self.expect(self.forward(op), "EPOCH_FENCED")

    @rule(which=WHICH)
    def other_history(self, which: int) -> None:
        """Go on from a state that is another one."""
        name = self.name_of(which)
        if self.is_live(name):
            op = self.chunk(name, draw(self.rng), previous_token=b"x" * 16)
            self.expect(self.forward(op), "HISTORY_FORKED")

    # -- training -----------------------------------------------------------------------------------

    @rule(session=WHICH, which=st.integers(0, 7))
    def backward(self, session: int, which: int) -> None:
        """Leave the contribution of a chunk whose tape waits."""
        ready = [n for n in NAMES if self.sessions[n].state == "live" and self.sessions[n].waiting]
        if not ready:
            return
        name = ready[session % len(ready)]
        local = self.sessions[name]
        seq = sorted(local.waiting)[which % len(local.waiting)]
        chunk = local.chunks[seq - 1]
        dhs = draw(self.rng, chunk.xs.shape[1], size=HIDDEN)
        op = Backward(name, local.epoch, seq, chunk.token, dhs, return_d_inputs=True)
        key = (name, local.epoch, seq)
        call = self.replica.backpropagation.backward
        if key in self.recorded:  # recorded before the store lost the session's last chunks
            if self.recorded[key][0].token == chunk.token:
                self.again(key)
            else:
                self.expect(call(self.tenant, op), "SEQ_REUSED")
            return
        done = self.answer(call(self.tenant, op))
        made = rnn_backward(self.params[chunk.version], chunk.tape, dhs, None)
        assert np.array_equal(done.d_inputs, made.dxs)
        assert np.array_equal(done.d_state, made.dh0)
        assert (done.version, done.replayed) == (chunk.version, False)
        local.waiting.discard(seq)
        contribution = contribution_key(
            ChunkKey(SessionKey(self.tenant, op.session_id), op.epoch, op.chunk_seq)
        )
        self.grads[contribution] = made.grads
        self.recorded[key] = (op, made)

    @rule(which=WHICH, count=st.integers(1, 4))
    def train(self, which: int, count: int) -> None:
        """Forward some chunks, go back over all that wait, make a step, each on the other replica."""
        self.forward_several(which, train=True, count=count)
        for _ in range(MAX_TAPES):
            self.backward(0, 0)
            self.turn += 1
        self.update()

    @rule(which=WHICH)
    def backward_again(self, which: int) -> None:
        """Send a Backward again that was recorded, consumed by now or not."""
        name = self.name_of(which)
        local = self.sessions[name]
        mine = [key for key in self.recorded if key[:2] == (name, local.epoch)]
        if local.state != "live" or not mine or mine[-1][2] > local.seq:
            return
        self.fault("duplicate")
        op, chunk = self.recorded[mine[-1]][0], local.chunks[mine[-1][2] - 1]
        if op.token == chunk.token:
            self.again(mine[-1])
            return
        # The store lost that chunk, and another one has its number now.
        reason = "HISTORY_FORKED" if chunk.is_train else "TAPE_MISSING"
        self.expect(self.replica.backpropagation.backward(self.tenant, op), reason)

    def again(self, key: tuple[str, int, int]) -> None:
        """Send a Backward again and compare."""
        op, made = self.recorded[key]
        done = self.answer(self.replica.backpropagation.backward(self.tenant, op))
        assert done.replayed
        assert np.array_equal(done.d_inputs, made.dxs)
        # Its tape may wait once more where the store has lost that it was recorded.
        self.sessions[key[0]].waiting.discard(key[2])

    @rule(which=WHICH)
    def backward_without_tape(self, which: int) -> None:
        """Ask for the gradient of an INFER chunk."""
        name = self.name_of(which)
        local = self.sessions[name]
        if local.state == "live" and local.chunks and not local.chunks[-1].is_train:
            dhs = draw(self.rng, local.chunks[-1].xs.shape[1], size=HIDDEN)
            op = Backward(name, local.epoch, local.seq, local.token, dhs)
            self.expect(self.replica.backpropagation.backward(self.tenant, op), "TAPE_MISSING")

    @rule()
    def update(self) -> None:
        """Make a step from all that waits."""
        op = step("m", f"r{len(self.updates)}", expected=self.head)
        call = self.replica.updates.update(self.tenant, op)
        if not self.grads:
            self.expect(call, "NO_GRADIENTS")
            return
        done = self.answer(call)
        joined = sum_grads([self.grads[name] for name in sorted(self.grads)])
        params, self.moments = apply_update(
            self.optimizer, self.params[self.head], joined, self.moments
        )
        digest = version_digest(weights_to_blob(params), moments_to_blob(self.moments))
        self.head = Version(self.head.number + 1, digest)
        self.params[self.head] = params
        assert (done.version, done.replayed) == (self.head, False)
        assert done.contribution_count == len(self.grads)
        self.grads.clear()
        self.updates.append((op, done))

    @rule()
    def update_again(self) -> None:
        """Send the last step again."""
        if self.updates:
            self.fault("duplicate")
            op, first = self.updates[-1]
            done = self.answer(self.replica.updates.update(self.tenant, op))
            assert (done.version, done.replayed) == (first.version, True)

    # -- times to live ------------------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES), on_exists=st.sampled_from(OnExists))
    def open(self, name: str, on_exists: OnExists) -> None:
        """Open a session, whatever became of it before."""
        local = self.sessions[name]
        call = open_on(self.replica, self.tenant, name, on_exists=on_exists)
        if local.state == "live" and on_exists is OnExists.FAIL:
            self.expect(call, "SESSION_EXISTS")
            return
        if local.state != "live" and on_exists is OnExists.MUST_EXIST:
            self.expect(call, GONE[local.state])
            return
        opened = self.answer(call)
        if local.state == "live" and on_exists in {OnExists.RESUME, OnExists.MUST_EXIST}:
            assert opened.resumed
            assert np.array_equal(opened.state, local.h)
            return
        assert opened.session.epoch > local.epoch
        local.begin(opened.session.epoch)

    @rule(which=WHICH, is_given=st.booleans())
    def new_epoch(self, which: int, is_given: bool) -> None:  # noqa: FBT001 - hypothesis'
        """Reset a session or set its state."""
        name = self.name_of(which)
        if not self.is_live(name):
            return
        local = self.sessions[name]
        state = self.rng.standard_normal((ROWS, HIDDEN)).astype(np.float32) if is_given else None
        op = NewEpoch(name, state, 0, None, "", 0)
        view, _ = self.answer(self.replica.sessions.begin_epoch(self.tenant, op))
        assert view.epoch > local.epoch
        local.begin(view.epoch, state)

    @rule(source=st.sampled_from(NAMES), copied=st.sampled_from(NAMES))
    def fork(self, source: str, copied: str) -> None:
        """Open a session from another one's state."""
        if source == copied or not self.is_live(source):
            return
        local, other = self.sessions[source], self.sessions[copied]
        call = self.replica.sessions.fork(self.tenant, ForkSession(source, copied, None, ""))
        if other.state == "live":
            self.expect(call, "SESSION_EXISTS")
            return
        opened = self.answer(call)
        assert np.array_equal(opened.state, local.h)
        other.begin(opened.session.epoch, local.h.copy())

    @rule(name=st.sampled_from(NAMES))
    def close(self, name: str) -> None:
        """Close a session; again is no error, a name that never was is one."""
        local = self.sessions[name]
        call = self.replica.sessions.close(SessionKey(self.tenant, name), 0)
        if local.state == "never":
            self.expect(call, "SESSION_NOT_FOUND")
            return
        assert self.answer(call) == (local.state == "live")
        local.state = "closed" if local.state == "live" else local.state

    @rule(name=st.sampled_from(NAMES))
    def expire(self, name: str) -> None:
        """Let a session's time be over."""
        local = self.sessions[name]
        if local.state != "live":
            return
        tag = keys.session_tag(SessionKey(self.tenant, name))

        async def pass_time() -> None:
            raw = self.world.raw
            async for key in raw.scan_iter(match=tag + b"*", count=1000):
                if key != keys.marker_key(tag):
                    await raw.delete(key)

        self.world.run(pass_time())
        self.fault("expired")
        local.state = "expired"

    # -- a store that is broken ---------------------------------------------------------------------

    @rule()
    def flush_scripts(self) -> None:
        """Let the store forget its scripts."""
        self.world.run(self.world.raw.script_flush())
        self.fault("scripts flushed")

    @rule()
    def kill_clients(self) -> None:
        """Cut the replicas' connections to the store."""
        killing = self.world.raw.client_kill_filter(_type="normal", skipme=True)
        self.fault("connections cut") if self.world.run(killing) else None

    @rule(which=WHICH)
    def back_up(self, which: int) -> None:
        """Remember a session's slot as it is."""
        name = self.name_of(which)
        tag = keys.session_tag(SessionKey(self.tenant, name))
        if self.sessions[name].state != "live":
            return
        backup = self.world.run(Backup.take(self.world.raw, tag))
        self.backups[name] = (backup, copy.deepcopy(self.sessions[name]))

    @rule(which=WHICH, train=st.booleans(), count=st.integers(1, 3))
    def write_and_lose(self, which: int, train: bool, count: int) -> None:  # noqa: FBT001 - hypothesis'
        """Lose what a session wrote last."""
        self.back_up(which)
        self.forward_several(which, train, count)
        if train:
            self.backward(which, 7)
        self.lose(self.name_of(which))

    @rule(which=WHICH)
    def lose_writes(self, which: int) -> None:
        """Lose what a session did since some time ago, perhaps since it was opened."""
        if self.backups:
            self.lose(sorted(self.backups)[which % len(self.backups)])

    def lose(self, name: str) -> None:
        """Set a session's slot back; a client that goes on gets an error, and heals what it can."""
        if name not in self.backups:
            return
        backup, before = self.backups[name]
        lost = self.sessions[name]
        self.world.run(backup.restore(self.world.raw))
        self.fault("writes lost")
        self.sessions[name] = copy.deepcopy(before)
        if lost.state != "live" or (lost.epoch, lost.token) == (before.epoch, before.token):
            return
        op = Forward(name, lost.epoch, lost.seq + 1, lost.token, draw(self.rng))
        refused = self.expect(self.forward(op), "SEQ_GAP")
        assert refused.metadata["expected_seq"] == str(before.seq + 1)
        if lost.epoch != before.epoch:
            return
        for seq in range(before.seq + 1, lost.seq + 1):
            chunk = lost.chunks[seq - 1]
            again = self.chunk(name, chunk.xs, train=chunk.is_train, pinned=chunk.version)
            if chunk.is_train and len(self.sessions[name].waiting) >= MAX_TAPES:
                self.expect(self.forward(again), "TAPE_QUOTA")
                return
            self.compare(name, again, self.answer(self.forward(again)))
            assert self.sessions[name].token == chunk.token

    # -- what always holds --------------------------------------------------------------------------

    @invariant()
    def one_session_stands_where_it_should(self) -> None:
        """The store's view of a session, and its keys, are those that the history gives."""
        self.reads += 1
        self.check(NAMES[self.reads % len(NAMES)])

    def check(self, name: str) -> None:
        """Compare a session with what is known of it here."""
        local = self.sessions[name]
        call = self.replica.sessions.get_state(SessionKey(self.tenant, name), extend_ttl=False)
        if local.state != "live":
            self.expect(call, GONE[local.state])
            return
        seen = self.answer(call)
        view, h = seen.session, seen.state
        assert (view.epoch, view.chunk_seq, view.token) == (local.epoch, local.seq, local.token)
        assert np.array_equal(h, local.h)
        tag = keys.session_tag(SessionKey(self.tenant, name))
        assert self.world.run(self.world.raw.pttl(keys.record_key(tag))) > 0

    def teardown(self) -> None:
        """Compare every session at the end, on both replicas."""
        for name in NAMES * 2:
            self.turn += name == NAMES[0]
            self.check(name)


@pytest.fixture
def world(proof: Proof) -> Iterator[World]:
    """A store of its own, since its clients are killed."""
    with RedisServer(append_only=False) as store:
        made = World(store, proof)
        yield made
        made.close()


def steady(world: World) -> None:
    """Measure undisturbed traffic."""
    machine = Machine()
    machine.open("a", OnExists.FAIL)
    started = time.monotonic()
    for _ in range(100):
        machine.forward_next(0, train=False, steps=2)
    world.proof.steady(100, time.monotonic() - started)


@pytest.mark.timeout(600)
@pytest.mark.promise("P1-P6", "random histories equal local layers, whatever is broken on the way")
@figure("examples", 200, LONG)
def test_random_histories_equal_local_layers(world: World, seed: int, examples: int) -> None:
    """Sessions, training and losses in any order, on two replicas in turn."""
    machine = hypothesis.seed(seed)(type("Seeded", (Machine,), {"world": world}))
    Machine.world = world
    steady(world)
    # Shrinking takes minutes; the seed finds the same history again.
    is_long = examples >= LONG
    phases = list(hypothesis.Phase) if is_long else [hypothesis.Phase.generate]
    run_state_machine_as_test(
        machine,
        settings=hypothesis.settings(
            max_examples=examples,
            stateful_step_count=50 if is_long else 30,
            phases=phases,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )
    assert world.examples > examples
    for fault in ("duplicate", "writes lost", "scripts flushed", "connections cut", "expired"):
        assert world.proof.faults[fault], f"no {fault}"
