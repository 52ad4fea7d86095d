"""The laboratory: one store, the servers and their clients, each in a process of its own."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.load.processes import ROOT, Child, StartError, child, interpreter_of, module
from benchmarks.load.store import Store, running_store
from benchmarks.load.workload import SMALL, Sizes, save_weights

MAX_SESSIONS = 2_000_000
BEFORE = "before"  # this project's server as it was in another checkout


@dataclass(frozen=True)
class Pins:
    """Which core each kind of process is pinned to; None leaves it to the scheduler."""

    server: int | None = None
    client: int | None = None
    store: int | None = None


FREE = Pins()
ONE_CORE = Pins(0, 0, 0)
SPLIT = Pins(server=0, client=1, store=1)


@dataclass(frozen=True)
class Plan:
    """How long and how often is measured.

    Attributes:
        seconds: Of one measurement.
        warmup_s: The warm-up before each measurement, whose answers are left out, in seconds.
        repetitions: Of each measurement; the servers take turns.
        is_long: Whether benches that take minutes run at full length.
    """

    seconds: float = 2.0
    warmup_s: float = 0.4
    repetitions: int = 4
    is_long: bool = False


@dataclass
class Samples:
    """What one server's repetitions gave in one scenario.

    Attributes:
        scenario: For example "stream, 64 sessions".
        server: Its name.
        results: One a repetition: rate, p50_us, p99_us, as the client reported them.
    """

    scenario: str
    server: str
    results: list[dict[str, Any]] = field(default_factory=list)

    def values(self, key: str) -> list[float]:
        """Return one figure of every repetition."""
        return [result[key] for result in self.results]


class Lab:
    """Starts what a bench asks for, keeps it until the end, and lets servers take turns.

    Attributes:
        plan: How long and how often is measured.
        log: Everything measured so far, for the tables.
        folder: For weights, logs and what a bench needs.
    """

    def __init__(
        self,
        stack: ExitStack,
        folder: Path,
        store: Store,
        *,
        plan: Plan,
        pins: Pins = FREE,
        mlserver: Path | None = None,
        before: Path | None = None,
        tick: Callable[[str], None] = lambda _text: None,
    ) -> None:
        """Start nothing yet.

        Args:
            stack: Ends the processes.
            folder: For weights, logs and what a bench needs.
            store: The store of all servers.
            plan: How long and how often is measured.
            pins: Which process runs on which core.
            mlserver: Interpreter of MLServer's environment; None where it is not installed.
            before: Another checkout of this project, whose server is `BEFORE`.
            tick: Called after each measurement with its result.
        """
        self.plan = plan
        self.log: list[Samples] = []
        self.store = store
        self.mlserver = mlserver
        self._before = before
        self._stack = stack
        self.folder = folder
        self._pins = pins
        self._tick = tick
        self._children: dict[tuple[object, ...], Child] = {}

    def server(self, name: str, sizes: Sizes = SMALL, *options: str) -> Child:
        """Return a running server, started at the first call.

        Args:
            name: echo, afternoon, mlserver or timernn.
            sizes: Of the chunks it will get; this project's server takes all sizes.
            options: More of its command line.
        """
        key = (name, None if name == "timernn" else sizes, options)
        if key not in self._children:
            command = [*self._server_command(name, sizes), *options]
            self._children[key] = self._start(command, self._pins.server)
        return self._children[key]

    def profiled_server(self, name: str) -> Child:
        """Return this project's server, as it is or as it was, in a process that counts its calls.

        Args:
            name: timernn or `BEFORE`.
        """
        script = ROOT / "benchmarks" / "load" / "profiled_server.py"
        # Else the head of the model would be read again in the midst of the chunks.
        options = ["--limit-head-max-age-ms", "600000"]
        command = [*self._python_of(name), str(script), *self._serve(f"{name}-profiled"), *options]
        return self._start(command, self._pins.server)

    def client(
        self,
        name: str,
        sizes: Sizes = SMALL,
        *options: str,
        channels: int = 1,
        login: tuple[str, ...] = (),
    ) -> Child:
        """Return a running client of a server; both are started at the first call.

        Args:
            name: echo, afternoon, mlserver, redis (the store itself) or timernn.
            sizes: Of the chunks it sends.
            options: More of the server's command line.
            channels: Connections of the client.
            login: More of the client's command line, by which the server lets it in.
        """
        key = ("client", name, sizes, options, channels, login)
        if key not in self._children:
            target = self.store.url
            if name != "redis":
                target = self.server(name, sizes, *options).address
            command = module(
                "benchmarks.load.client", "--server", "timernn" if name == BEFORE else name, "--target", target,
                "--sizes", sizes.steps, sizes.inputs, sizes.hidden, "--channels", channels, *login,
            )  # fmt: skip
            self._children[key] = self._start(command, self._pins.client)
        return self._children[key]

    def start_client(self, command: Sequence[str]) -> Child:
        """Start a process of a bench's own that asks a server for something."""
        process = self._start(command, self._pins.client)
        self._children["bench", len(self._children)] = process
        return process

    def worker(self, module_name: str, *arguments: object) -> Child:
        """Return a running process that measures something alone, such as the bare engine."""
        key = ("worker", module_name, arguments)
        if key not in self._children:
            self._children[key] = self._start(module(module_name, *arguments), self._pins.server)
        return self._children[key]

    def take_turns(
        self,
        scenario: str,
        measurements: dict[str, tuple[Child, dict[str, Any]]],
        repetitions: int | None = None,
    ) -> dict[str, Samples]:
        """Measure A B A B …, so that a slow minute of the machine hits all.

        An order may have its own seconds and warmup_s.

        Args:
            scenario: What is measured.
            measurements: For each name the process that measures, and its order.
            repetitions: The plan's where not given.

        Returns:
            For each name its samples.
        """
        samples = {name: Samples(scenario, name) for name in measurements}
        times = {"seconds": self.plan.seconds, "warmup_s": self.plan.warmup_s}
        for _ in range(repetitions or self.plan.repetitions):
            for name, (process, order) in measurements.items():
                samples[name].results.append(self._ask(process, {**times, **order}))
                self._tick(f"{scenario}: {name}")
        self.log += samples.values()
        return samples

    def measure(self, scenario: str, name: str, process: Child, **order: Any) -> dict[str, Any]:
        """Measure once, for benches that watch something change rather than compare."""
        return self.take_turns(scenario, {name: (process, order)}, 1)[name].results[0]

    def prepare(self, process: Child, **order: Any) -> None:
        """Have a client do something that is not measured, such as opening sessions."""
        self._ask(process, {"seconds": 0, "warmup_s": 0, **order})
        self._tick(str(order))

    def _ask(self, process: Child, order: dict[str, Any]) -> dict[str, Any]:
        try:
            return process.ask(order)
        except StartError:
            # Its sessions may stand anywhere now: the next bench gets a client of its own.
            self._children = {k: v for k, v in self._children.items() if v is not process}
            process.stop()
            raise

    def _start(self, command: Sequence[str], core: int | None) -> Child:
        log = self.folder / f"process-{len(self._children)}.log"
        return self._stack.enter_context(child(command, core=core, log=log))

    def _server_command(self, name: str, sizes: Sizes) -> list[str]:
        if name == "echo":
            return module("benchmarks.peers.echo", "--answer-bytes", sizes.answer_bytes)
        if name == "timernn":
            return [str(Path(sys.executable).parent / "timernn"), *self._serve(name)]
        if name == BEFORE:
            return [*self._python_of(name), "-m", "service", *self._serve(name)]
        weights = save_weights(sizes, self.folder)
        arguments = ["--redis-url", self.store.url, "--weights", str(weights)]
        if name == "mlserver":
            script = ROOT / "benchmarks" / "peers" / "mlserver_runtime.py"
            return [str(self.mlserver), str(script), *arguments]
        return module(f"benchmarks.peers.{name}", *arguments)

    def _python_of(self, name: str) -> list[str]:
        """Return how Python is started with the modules of this checkout, or of the one before."""
        checkout = self._before if name == BEFORE and self._before else ROOT
        # -P: the modules of this checkout, in the working directory, must not come first.
        return ["env", f"PYTHONPATH={checkout}", str(interpreter_of(checkout)), "-P"]

    def _serve(self, name: str) -> list[str]:
        return [
            "serve", "--listen", "127.0.0.1:0", "--redis-url", self.store.url,
            "--data-dir", str(self.folder / name), "--log-level", "warning",
            "--limit-sessions-per-tenant", str(MAX_SESSIONS),
        ]  # fmt: skip


@contextmanager
def laboratory(
    plan: Plan,
    *,
    pins: Pins = FREE,
    mlserver: Path | None = None,
    before: Path | None = None,
    tick: Callable[[str], None] = lambda _text: None,
) -> Iterator[Lab]:
    """Open a laboratory with an empty store; everything in it ends with the block."""
    # A short name: the path of a Unix socket has room for about 100 characters.
    with TemporaryDirectory(prefix="tb-") as name, ExitStack() as stack:
        folder = Path(name)
        store = stack.enter_context(running_store(folder, core=pins.store))
        yield Lab(
            stack, folder, store, plan=plan, pins=pins, mlserver=mlserver, before=before, tick=tick
        )
