"""A replica that dies, sleeps, fails or is cancelled at any point of its work; another finishes it."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from instruments.processes import ServiceProcess
from scenes.figures import figure
from scenes.fleet import Fleet, start_all
from scenes.training import Trainer
from scenes.wire import TIMEOUT_S, Model, Wire, answer_of, steady_traffic
from timernn import errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from instruments.report import Proof

FORWARD = ("after_read", "after_compute", "before_commit", "after_commit")
BACKWARD = ("after_tape_read", "before_count", "after_count", "before_settle")
UPDATE = ("after_look", "before_update", "after_update")
# What each operation passes on its way. A Backward and an Update read, compute and write in steps of
# their own, so the points of a chunk are not on their way, nor theirs on its; the runs check that: a
# point that is not on an operation's way ends the process. `before_drain` is on the way of none.
PATHS = {
    "Forward": FORWARD,
    "Forward over Stream": FORWARD,
    "Backward": BACKWARD,
    "Backward with its Update": BACKWARD + UPDATE,
    "Update": UPDATE,
}
POINTS = FORWARD + BACKWARD + UPDATE
STEPS = 5  # enough to pass every point once
EXIT_CODE = 137
RECOVERY_S = 2.0
TOGETHER = 4  # replicas started side by side


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """The store, and the replica that finishes what others leave."""
    with Fleet(1, "--store-timeout-ms", "5000") as running:
        yield running


class Failover:
    """Stubs that try one replica with one operation, and then another that is well.

    All other operations go to the one that is well.
    """

    def __init__(self, operation: str, first: Wire, second: Wire, timeout_s: float) -> None:
        """Give the first so many seconds."""
        self._method = operation.partition(" ")[0]
        self._is_streamed = operation.endswith("over Stream")
        self._first, self._second, self._timeout_s = first, second, timeout_s
        self.has_update = operation.endswith("with its Update")
        self.failures: list[errors.Error] = []
        self.slowest_s = 0.0
        self.rnn = self

    async def forward(self, request: Any) -> Any:
        """Send a Forward."""
        return await self._send("Forward", request)

    async def Backward(self, request: Any, **_: float) -> Any:  # noqa: N802 - as the stub
        """Send a Backward."""
        return await self._send("Backward", request)

    async def Update(self, request: Any, **_: float) -> Any:  # noqa: N802 - as the stub
        """Send an Update."""
        return await self._send("Update", request)

    async def _send(self, method: str, request: Any) -> Any:
        if method != self._method:
            return await self._send_to(self._second, method, request, TIMEOUT_S)
        started = time.monotonic()
        try:
            return await self._send_to(self._first, method, request, self._timeout_s)
        except (errors.Unavailable, errors.DeadlineExceeded, errors.Internal) as error:
            self.failures.append(error)
        if method == "Backward":
            request.resent = True
        answer = await self._send_to(self._second, method, request, TIMEOUT_S)
        self.slowest_s = max(self.slowest_s, time.monotonic() - started)
        return answer

    async def _send_to(self, wire: Wire, method: str, request: Any, timeout_s: float) -> Any:
        if self._is_streamed and method == self._method:
            return await wire.streamed(request, timeout_s)
        return await answer_of(getattr(wire.rnn, method)(request, timeout=timeout_s))


async def train(failover: Failover, model: Model, well: Wire, seed: int) -> list[Any]:
    """Make the same steps each time; return what was answered, for comparison bit by bit."""
    trainer = await Trainer.start(model, well, np.random.default_rng(seed))
    found: list[Any] = []
    for number in range(STEPS):
        gradient, update = await trainer.taped(failover), trainer.update(f"{number}")
        found.append(gradient.state_token)
        if failover.has_update:
            gradient.update.CopyFrom(update)
        recorded = await trainer.record(failover, gradient)
        found.append((recorded.dxs.data, recorded.dh0.data, recorded.gradient_norm))
        if failover.has_update:
            made = recorded.update
            trainer.known = made.version
        else:
            made = await trainer.step(failover, update)
        found.append((made.version.number, made.version.digest, made.contribution_count))
    return [*found, await trainer.head(well)]


class Bench:
    """A model trained undisturbed, and copies of it to be disturbed."""

    def __init__(self, well: Wire, proof: Proof, seed: int) -> None:
        """Take the replica that is well."""
        self._well, self._proof, self._seed = well, proof, seed
        self._wanted: list[Any] = []
        self._count = 0

    async def prepare(self) -> None:
        """Measure steady traffic and train undisturbed."""
        rng = np.random.default_rng(self._seed)
        model = await Model.create(self._well, rng, f"traffic-{self._seed}")
        await steady_traffic(self._proof, [self._well], model, rng, sessions=8)
        calm = Failover("", self._well, self._well, TIMEOUT_S)
        self._wanted = await train(calm, await self._model(), self._well, self._seed)

    async def compare(
        self, operation: str, replica: ServiceProcess, what: str, timeout_s: float = 30
    ) -> Failover:
        """Train with an operation's calls to a replica that fails; compare with the undisturbed run."""
        async with Wire(replica.address) as failing:
            failover = Failover(operation, failing, self._well, timeout_s)
            found = await train(failover, await self._model(), self._well, self._seed)
            for number, (got, wanted) in enumerate(zip(found, self._wanted, strict=True)):
                self._proof.require(got == wanted, f"{what}: answer {number} is another")
        return failover

    async def _model(self) -> Model:
        self._count += 1
        rng = np.random.default_rng(self._seed)  # the same weights each time
        return await Model.create(self._well, rng, f"m-{self._seed}-{self._count}")


def failing(fleet: Fleet, failpoints: Sequence[str], stack: ExitStack) -> list[ServiceProcess]:
    """Start a replica for each text of failpoints."""
    made = [
        ServiceProcess(
            fleet.store.url,
            *("--testing", "--store-timeout-ms", "5000"),
            env={"TIMERNN_FAILPOINTS": text},
        )
        for text in failpoints
    ]
    for replica in made:
        stack.callback(replica.close)
    start_all(made)
    return made


@pytest.mark.timeout(300)
@pytest.mark.promise("R5", "another replica finishes what one leaves at any point")
@pytest.mark.parametrize("operation", PATHS)
@figure("rounds", 1, 5)
async def test_training_over_a_replica_that_dies_at_any_point_is_undisturbed(
    fleet: Fleet, proof: Proof, seed: int, rounds: int, operation: str
) -> None:
    """The process ends without a word at each point of its way; answers and weights stay the same."""
    points = PATHS[operation] * rounds
    async with Wire(fleet.addresses[0]) as well:
        bench = Bench(well, proof, seed)
        await bench.prepare()
        for at in range(0, len(points), TOGETHER):
            now = points[at : at + TOGETHER]
            with ExitStack() as stack:
                replicas = await asyncio.to_thread(
                    failing, fleet, [f"{point}=exit" for point in now], stack
                )
                for point, replica in zip(now, replicas, strict=True):
                    what = f"{operation}: exit {point}"
                    failover = await bench.compare(operation, replica, what)
                    proof.require(replica.wait() == EXIT_CODE, f"{point} was not reached")
                    proof.hit(what)
                    proof.figures["recovery s"] = max(
                        proof.figures.get("recovery s", 0.0), failover.slowest_s
                    )
                    proof.require(
                        failover.slowest_s < RECOVERY_S,
                        f"{what}: recovered after {failover.slowest_s:.1f} s",
                    )
                    proof.require(
                        not any(isinstance(each, errors.Internal) for each in failover.failures),
                        f"{what}: {failover.failures!r}",
                    )


@pytest.mark.timeout(300)
@pytest.mark.promise("R5", "another replica finishes what one leaves at any point")
@pytest.mark.parametrize("action", ["sleep(2)", "cancel", "raise"])
async def test_training_over_a_replica_that_sleeps_or_fails_is_undisturbed(
    fleet: Fleet, proof: Proof, seed: int, action: str
) -> None:
    """Each point of a way is passed once with a sleep beyond the deadline, a cancel or an error."""
    texts = [
        ";".join(f"{point}={action if point in path else 'exit'}" for point in POINTS)
        for path in PATHS.values()
    ]
    async with Wire(fleet.addresses[0]) as well:
        bench = Bench(well, proof, seed)
        await bench.prepare()
        with ExitStack() as stack:
            replicas = await asyncio.to_thread(failing, fleet, texts, stack)
            await asyncio.gather(
                *(
                    pass_all_points(bench, operation, replica, action, proof)
                    for operation, replica in zip(PATHS, replicas, strict=True)
                )
            )


async def pass_all_points(
    bench: Bench, operation: str, replica: ServiceProcess, action: str, proof: Proof
) -> None:
    """Train until every point of an operation's way has done what it says, and no other one has."""
    failures: list[errors.Error] = []
    what, path = f"{operation}: {action}", PATHS[operation]
    for attempt in range(len(path)):
        # A chunk that sleeps holds up its session's next ones: another session goes on.
        failover = await bench.compare(operation, replica, what, 0.5 if "sleep" in action else 30)
        failures += failover.failures
        if all(f"failpoint {point}:" in replica.log for point in path):
            break
        assert attempt < len(path) - 1, f"{what}: not every point: {replica.log[-2000:]}"
    for point in path:
        proof.hit(f"{what} {point}", replica.log.count(f"failpoint {point}:"))
    proof.require(replica.is_alive, f"{what}: a point that is not on its way was passed")
    check_failures(proof, action, failures)
    proof.require(await asyncio.to_thread(replica.terminate) == 0, f"{what}: it did not end well")


def check_failures(proof: Proof, action: str, failures: list[errors.Error]) -> None:
    """Compare what the callers got with what each action promises."""
    expected = {
        "sleep(2)": (errors.DeadlineExceeded,),
        "cancel": (errors.Unavailable,),
        "raise": (errors.Internal, errors.Unavailable),
    }[action]
    for failure in failures:
        proof.require(isinstance(failure, expected), f"{action}: {failure!r}")


@pytest.mark.timeout(300)
@pytest.mark.promise("R5", "another replica finishes what one leaves at any point")
async def test_a_replica_that_dies_as_it_begins_to_drain_loses_nothing(
    fleet: Fleet, proof: Proof, seed: int
) -> None:
    """It is asked to stop and ends without a word; what it had answered is there."""
    async with Wire(fleet.addresses[0]) as well:
        rng = np.random.default_rng(seed)
        model = await Model.create(well, rng, f"drain-{seed}")
        with ExitStack() as stack:
            (replica,) = await asyncio.to_thread(failing, fleet, ["before_drain=exit"], stack)
            async with Wire(replica.address) as dying:
                writers = await steady_traffic(proof, [dying, well], model, rng)
                assert await asyncio.to_thread(replica.terminate) == EXIT_CODE
            proof.hit("exit before_drain")
            for writer in writers:
                xs = rng.standard_normal((2, 3, 4)).astype(np.float32)
                writer.check(await well.forward(writer.chunk(xs)), xs, proof)
