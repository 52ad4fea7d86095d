"""Show where the microseconds of one durable chunk go: to which process, and inside the server to which stage.

Run as ``python -m benchmarks.where``. Prints tables and writes benchmarks/results/where.json; with
``--write`` the tables go into docs/performance.md as well. ``--before PATH`` measures the server of an earlier checkout
in turn with ours and prints that alone.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.harness import (
    RESULTS,
    interleave,
    one_thread_environment,
    pin_to_one_core,
    write_document,
)
from benchmarks.load.bench_long import fill_sessions, weigh_sessions
from benchmarks.load.bench_rates import OURS, SCENARIOS
from benchmarks.load.calls import count_calls
from benchmarks.load.lab import BEFORE, Lab, Plan, Samples, laboratory
from benchmarks.load.machine import describe_machine, machine_line
from benchmarks.load.page import write_block
from benchmarks.load.rows import paired, ratio_table, table
from benchmarks.load.stages import BATCHES, COPIES, Stages
from benchmarks.load.store import running_store
from benchmarks.load.trips import SHAPES, Trips
from benchmarks.load.weigh import weigh
from service.cli.serve import fast_loop

COMMAND = "python -m benchmarks.where --write"
SHOWN = ("stream-64", "frames-64", "unary-16", "stream-1")
ACCOUNTED = ("stream-64", "frames-64", "stream-1")
CALLS_COUNTED = "stream-1"  # the scenario with one chunk on its way
PEER = "echo"
TRIP_CHUNKS = 4_000
WEIGHED = (1_000, 5_000)  # sessions
STAGES_BUDGET_S = 8.0

Document = dict[str, Any]


def measure_processes(
    lab: Lab, repetitions: int, servers: Sequence[str] = (OURS, PEER)
) -> list[Samples]:
    """Weigh each process in each scenario, ours and the peer's in turn.

    Returns:
        For each scenario, as ``SHOWN`` names it, and server what `weigh` returns.
    """
    samples = [Samples(name, server) for name in SHOWN for server in servers]
    for _ in range(repetitions):
        for one in samples:
            server, client = lab.server(one.server), lab.client(one.server)
            scenario = SCENARIOS[one.scenario]
            one.results.append(
                weigh(lab, scenario, one.server, server=server, client=client, of=one.server)
            )
    return samples


def measure_stages() -> dict[str, list[float]]:
    """Time the stages in process; by stage and batch, microseconds of processor time a chunk."""
    samples = interleave(Stages().contestants(), budget_s=STAGES_BUDGET_S, clock=time.process_time)
    return {name: [1e6 * one / COPIES for one in times] for name, times in samples.items()}


async def measure_trips(repetitions: int, tick: Callable[[], None]) -> list[Document]:
    """Time round trips to a real store, every shape in turn; one median a shape and figure."""
    with TemporaryDirectory(prefix="tb-") as folder, running_store(Path(folder)) as store:
        trips = [Trips(store, shape, f"trip-{number}") for number, shape in enumerate(SHAPES)]
        for one in trips:
            await one.open()
            await one.measure(TRIP_CHUNKS // 10)
        samples: list[list[dict[str, float]]] = [[] for _ in trips]
        for _ in range(repetitions):
            for one, taken in zip(trips, samples, strict=True):
                taken.append(await one.measure(TRIP_CHUNKS))
                tick()
        for one in trips:
            await one.close()
    return [
        asdict(shape) | {name: median(one[name] for one in taken) for name in taken[0]}
        for shape, taken in zip(SHAPES, samples, strict=True)
    ]


def measure(options: argparse.Namespace) -> Document:
    """Measure everything; what is returned is what the JSON file holds."""
    asked = 2 * 2 * len(SHOWN) * options.repetitions + 6
    with tqdm(total=asked + len(SHAPES) * options.repetitions + 1, unit="step") as progress:

        def tick(text: str) -> None:
            progress.set_postfix_str(text)
            progress.update()

        with laboratory(Plan(seconds=options.seconds), tick=tick) as lab:
            processes = measure_processes(lab, options.repetitions)
            fill_sessions(lab, lab.client(OURS), WEIGHED[0])
            session_bytes = weigh_sessions(lab, lab.client(OURS), *WEIGHED)
            calls = count_calls(lab, (OURS,))
            tick("Python calls")
        with asyncio.Runner(loop_factory=fast_loop()) as runner:
            trips = runner.run(measure_trips(options.repetitions, lambda: tick("round trips")))
        pin_to_one_core()
        stages = measure_stages()
        tick("stages")
    return {
        "processes": [asdict(one) for one in processes],
        "python_calls": calls,
        "session_bytes": session_bytes,
        "trips": trips,
        "stages": stages,
    }


def render(document: Document) -> str:
    """Lay out what was measured as the tables of docs/performance.md."""
    processes = [Samples(**one) for one in document["processes"]]
    return "\n\n".join(
        [
            f"`{document['command']}`: {machine_line(document['machine'])}.",
            _process_table(processes, document.get("python_calls", {})),
            _account_table(processes, document),
            _stage_table(document["stages"]),
            _trip_table(document["trips"]),
            f"A session costs the store {document['session_bytes']:,.0f} bytes.",
        ]
    )


def _process_table(processes: Sequence[Samples], calls: Mapping[str, float]) -> str:
    """Lay out what each process took; the Python calls of the server where they were counted."""
    header = (
        "scenario", "server", "chunks/s", "server µs", "of it kernel", "Python calls", "client µs",
        "store µs", "chunks a commit",
    )  # fmt: skip
    lines = []
    for one in processes:
        figures = {name: median(one.values(name)) for name in one.results[0]}
        is_ours = one.server != PEER
        is_counted = one.scenario == CALLS_COUNTED and one.server in calls
        lines.append(
            (
                one.scenario,
                one.server,
                f"{figures['rate']:,.0f}",
                f"{figures['server_us']:,.0f}",
                f"{figures['server_system_us']:,.0f}",
                f"{calls[one.server]:,.0f}" if is_counted else "",
                f"{figures['client_us']:,.0f}",
                f"{figures['store_us']:,.0f}" if is_ours else "",
                f"{figures['batch']:.1f}" if is_ours else "",
            )
        )
    return table(header, lines)


def _ratio_table(samples: Sequence[Samples]) -> str:
    """Set our server against the earlier one, each repetition with the one measured beside it."""
    took = {(one.scenario, one.server): one.values("server_us") for one in samples}
    rows = [paired(name, took[name, OURS], took[name, BEFORE]) for name in SHOWN]
    return ratio_table(rows, "server µs, now", "before")


def _account_table(processes: Sequence[Samples], document: Document) -> str:
    """Set the stages against what the server took, each at the batch that the scenario made."""
    figures = {
        (one.scenario, one.server): {name: median(one.values(name)) for name in one.results[0]}
        for one in processes
    }
    columns = {
        name: _stages_at(document, figures[name, OURS]["batch"], in_frames=name == "frames-64")
        for name in ACCOUNTED
    }
    lines = [
        (stage, *(f"{columns[name][stage]:,.1f}" for name in ACCOUNTED))
        for stage in next(iter(columns.values()))
    ]
    server = [figures[name, OURS]["server_us"] for name in ACCOUNTED]
    left = [
        took - sum(columns[name].values()) for name, took in zip(ACCOUNTED, server, strict=True)
    ]
    echo = [figures[name, PEER]["server_us"] for name in ACCOUNTED]
    for name, values in (("left: gRPC, loop, bookkeeping", left), ("the server", server),
                         ("the echo's server", echo)):  # fmt: skip
        lines.append((name, *(f"{value:,.1f}" for value in values)))
    return table(("inside the server, µs", *ACCOUNTED), lines)


def _stages_at(document: Document, batch: float, *, in_frames: bool) -> dict[str, float]:
    """Return the median of each stage, µs a chunk, where so many chunks are computed and committed at once."""
    stages = {name: median(times) for name, times in document["stages"].items()}
    joined = {one["batch"]: one["server_us"] for one in document["trips"] if one["joined"]}
    engine = {count: stages[f"engine/{count}"] for count in BATCHES}
    return {
        "parse": stages["parse/64" if in_frames else "parse/1"],
        "decode, check": stages["decode, check/1"],
        "digest, token": stages["digest, token/1"],
        "engine": _between(engine, batch),
        "commit: made": stages["commit: made/1"],
        "commit: laid out, sent, answered": _between(joined, batch),
        "encode": stages["encode/1"],
    }


def _between(costs: dict[int, float], batch: float) -> float:
    """Return what a chunk costs in a batch between those measured: a batch's cost is a line."""
    sizes = sorted(costs)
    return float(np.interp(batch, sizes, [size * costs[size] for size in sizes]) / batch)


def _stage_table(stages: dict[str, list[float]]) -> str:
    lines = []
    for name, times in stages.items():
        stage, batch = name.split("/")
        lines.append((stage, batch, f"{min(times):,.2f}", f"{median(times):,.2f}"))
    return table(("stage", "in a batch of", "best µs", "median µs"), lines)


def _trip_table(trips: Sequence[Document]) -> str:
    header = (
        "commits at once",
        "a round trip",
        "calls of the script",
        "server µs",
        "store µs",
        "wall µs",
    )
    return table(
        header,
        [
            (
                str(one["batch"]),
                str(one["per_trip"]),
                "one a trip" if one["joined"] else "one a chunk",
                *(f"{one[name]:,.1f}" for name in ("server_us", "store_us", "wall_us")),
            )
            for one in trips
        ],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure in a child process, since libraries read their thread settings when they are loaded.

    Returns:
        The exit code: not 0 only where something could not be measured.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    _parse(words)  # Bad options end here, before a child is started.
    command = [sys.executable, "-m", "benchmarks.where", "--in-this-process", *words]
    return subprocess.run(command, env=one_thread_environment(), check=False).returncode  # noqa: S603


def compare_with_before(options: argparse.Namespace) -> None:
    """Weigh the server of an earlier checkout beside ours and the echo's, print, write."""
    servers = (BEFORE, OURS, PEER)
    asked = 2 * len(servers) * len(SHOWN) * options.repetitions + 1
    with tqdm(total=asked, unit="step") as progress:

        def tick(text: str) -> None:
            progress.set_postfix_str(text)
            progress.update()

        with laboratory(Plan(seconds=options.seconds), tick=tick, before=options.before) as lab:
            samples = measure_processes(lab, options.repetitions, servers)
            calls = count_calls(lab, (BEFORE, OURS))
            tick("Python calls")
    tables = f"{_process_table(samples, calls)}\n\n{_ratio_table(samples)}"
    text = f"{machine_line(describe_machine())}.\n\n{tables}"
    print("\n" + text)
    if options.write:
        write_block(f"{COMMAND} --before PATH", text)


def run(options: argparse.Namespace) -> None:
    """Measure, print, write."""
    if options.before:
        compare_with_before(options)
        return
    if not options.render:
        parts = measure(options)
        words = [f"--{name} {getattr(options, name):g}" for name in ("repetitions", "seconds")]
        command = " ".join(["python -m benchmarks.where", *words])
        write_document(options.json, machine=describe_machine(), command=command, **parts)
    text = render(json.loads(options.json.read_text()))
    print("\n" + text)
    if options.write:
        write_block(COMMAND, text)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.where", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5, help="of each measurement")
    parser.add_argument("--seconds", type=float, default=2.0, help="of one measurement")
    parser.add_argument("--json", type=Path, default=RESULTS / "where.json")
    parser.add_argument(
        "--before", type=Path, help="an earlier checkout, to compare its server with"
    )
    parser.add_argument("--render", action="store_true", help="measure nothing, render the file")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in-this-process"]:
        run(_parse(sys.argv[2:]))
    else:
        raise SystemExit(main())
