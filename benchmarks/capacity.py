"""How many cores, replicas and masters a load needs: the arithmetic, and a simulation that checks it.

Run as ``python -m benchmarks.capacity``. Measures nothing: it reads what benchmarks.where and
benchmarks.service have written. ``--write`` puts the tables into docs/performance.md, ``--charts`` draws
docs/img/capacity.png.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks.harness import RESULTS
from benchmarks.load.bench_rates import OURS, SCENARIOS
from benchmarks.load.costs import Costs, Fleet, plan, read_costs
from benchmarks.load.fleet import Outcome, simulate
from benchmarks.load.lab import Samples
from benchmarks.load.machine import machine_line
from benchmarks.load.page import write_block
from benchmarks.load.rows import table
from benchmarks.load.workload import SMALL

COMMAND = "python -m benchmarks.capacity --write"
CHART = Path(__file__).parents[1] / "docs" / "img" / "capacity.png"
GIB = 1 << 30
SMALLER = (100, 10)  # the target's parts that are planned as well
LOADS = [step / 20 for step in range(2, 25, 2)]  # of the most that a fleet takes
WAYS = {"streams": "stream-64", "frames": "frames-64"}
ROUTES = {"any worker": False, "by slot": True}


@dataclass(frozen=True)
class Wish:
    """What is to be served.

    Attributes:
        target: Chunks a second.
        sessions: Live ones.
        headroom: The share of what is there that the load may take.
        cores: A replica's, each with a worker.
    """

    target: float
    sessions: int
    headroom: float
    cores: int


def render(where: dict[str, Any], service: dict[str, Any], wish: Wish, command: str) -> str:
    """Lay out all tables; simulates, with a progress bar."""
    costs = {way: read_costs(where, scenario) for way, scenario in WAYS.items()}
    return "\n\n".join(
        [
            f"`{command}`, with the figures of `{where['command']}`: {machine_line(where['machine'])}.",
            _unit_table(where, wish.cores),
            _store_table(costs["streams"]),
            _check_table(where, service),
            _workers_line(service),
            _plan_table(costs, wish),
            _simulation_table(costs["streams"], wish),
        ]
    )


def _ours(where: dict[str, Any]) -> dict[str, dict[str, float]]:
    samples = [Samples(**one) for one in where["processes"] if one["server"] == OURS]
    return {
        one.scenario: {name: median(one.values(name)) for name in one.results[0]} for one in samples
    }


def _unit_table(where: dict[str, Any], cores: int) -> str:
    header = (
        "sent as", "server µs a chunk", "chunks/s a core", f"a replica of {cores} cores",
        "store µs a chunk", "chunks/s a Redis core",
    )  # fmt: skip
    lines = []
    for scenario, figures in _ours(where).items():
        server, store = 1e6 / figures["server_us"], 1e6 / figures["store_us"]
        lines.append(
            (
                SCENARIOS[scenario].title,
                f"{figures['server_us']:,.0f}",
                f"{server:,.0f}",
                f"{cores * server:,.0f}",
                f"{figures['store_us']:,.1f}",
                f"{store:,.0f}",
            )
        )
    return table(header, lines)


def _store_table(costs: Costs) -> str:
    lines = [
        (
            "one call for all" if trips is costs.joined else "a call each",
            str(size),
            f"{trips.store(size) / size:,.1f}",
            f"{1e6 * size / trips.store(size):,.0f}",
        )
        for trips in (costs.joined, costs.apart)
        for size in trips.sizes
    ]
    sessions = f"A GiB holds {GIB / costs.session_bytes:,.0f} sessions of {costs.session_bytes:,.0f} bytes."
    header = ("script", "commits a round trip", "store µs a commit", "commits/s a Redis core")
    return f"{table(header, lines)}\n\n{sessions}"


def _check_table(where: dict[str, Any], service: dict[str, Any]) -> str:
    """Set what the processor time allows beside what was reached, on the machine it was measured on."""
    cores = where["machine"]["cores"]
    rates = {
        one["scenario"]: median(result["rate"] for result in one["repetitions"])
        for one in service["measurements"]
        if one["server"] == OURS
    }
    lines = []
    for scenario, figures in _ours(where).items():
        known = SCENARIOS[scenario]
        # A lone session's processes wait for each other; many keep all cores busy, but none has two.
        used = min(cores, known.order["sessions"])
        each = [figures[f"{process}_us"] for process in ("server", "client", "store")]
        total = sum(each)
        rate = rates.get(known.title)
        lines.append(
            (
                known.title,
                f"{total:,.0f}",
                f"{min(used * 1e6 / total, 1e6 / max(each)):,.0f}",
                f"{figures['rate']:,.0f}",
                "" if rate is None else f"{rate:,.0f}",
            )
        )
    header = (
        "client, server and store here", "µs a chunk, all", "chunks/s by arithmetic",
        "reached meanwhile", "reached in `make bench`",
    )  # fmt: skip
    return table(header, lines)


def _workers_line(service: dict[str, Any]) -> str:
    found = [row for row in service["results"] if row["name"].startswith("two workers")]
    if not found:
        return "Two workers were not measured beside one."
    (row,) = found
    return (
        f"Two workers reached {row['ratio']:.2f} times the rate of one, on compute-bound chunks and with client "
        f"and store on the same {service['machine']['cores']} cores.\nWhat follows takes workers as independent."
    )


def _plan_table(costs: dict[str, Costs], wish: Wish) -> str:
    header = (
        "chunks/s", "sent as", "sessions go to", "workers", f"replicas of {wish.cores}",
        "masters", "sessions", "GiB", "GiB a master",
    )  # fmt: skip
    lines = []
    for part in (*SMALLER, 1):
        for way, route in ((way, route) for way in WAYS for route in ROUTES):
            rate, sessions = wish.target / part, wish.sessions / part
            fleet = plan(costs[way], rate, wish.headroom, routed=ROUTES[route])
            room = sessions * costs[way].session_bytes / GIB / wish.headroom
            lines.append(
                (
                    f"{rate:,.0f}",
                    way,
                    route,
                    f"{fleet.workers:,}",
                    f"{_replicas(fleet, wish):,}",
                    f"{fleet.masters:,}",
                    f"{sessions:,.0f}",
                    f"{room:,.1f}",
                    f"{room / fleet.masters:,.2f}",
                )
            )
    bits = 8 * wish.target * (SMALL.request_bytes + SMALL.answer_bytes)
    network = f"{wish.target:,.0f} chunks/s are {bits / 1e9:,.0f} Gbit/s of tensors between clients and replicas."
    return f"{table(header, lines)}\n\n{network}"


def _replicas(fleet: Fleet, wish: Wish) -> int:
    return math.ceil(fleet.workers / wish.cores)


def _simulation_table(costs: Costs, wish: Wish) -> str:
    header = (
        "fleet", "workers", "masters", "offered/s", "answered/s", "p50 µs", "p99 µs",
        "batch", "simulated", "workers busy", "simulated", "masters busy", "simulated",
    )  # fmt: skip
    fleets = []
    for route, routed in ROUTES.items():
        fleet = plan(costs, wish.target, wish.headroom, routed=routed)
        fleet = replace(fleet, workers=wish.cores * _replicas(fleet, wish))
        one_less = replace(fleet, workers=fleet.workers - wish.cores)
        fleets += [
            (f"{route}, whole", fleet),
            (f"{route}, a replica gone", one_less),
            (f"{route}, a master gone", replace(fleet, masters=fleet.masters - 1)),
        ]
    lines = []
    for name, fleet in tqdm(fleets, unit="fleet"):
        if fleet.workers < 1 or fleet.masters < 1:
            continue
        lines.append((name, *_simulated_cells(costs, fleet, wish.target)))
    return table(header, lines)


def _simulated_cells(costs: Costs, fleet: Fleet, rate: float) -> tuple[str, ...]:
    seen = simulate(costs, fleet, rate)
    point = costs.point(rate / fleet.workers, fleet.seen)
    return (
        f"{fleet.workers:,}",
        f"{fleet.masters:,}",
        f"{rate:,.0f}",
        f"{seen.rate:,.0f}",
        f"{seen.p50_us:,.0f}",
        f"{seen.p99_us:,.0f}",
        f"{point.batch:.1f}",
        f"{seen.batch:.1f}",
        f"{point.busy:.0%}",
        f"{seen.workers_busy:.0%}",
        f"{fleet.masters_busy(costs, rate):.0%}",
        f"{seen.masters_busy:.0%}",
    )


def draw(costs: dict[str, Costs], wish: Wish, path: Path) -> Path:
    """Draw answered rate and latency against the load offered, and what targets need."""
    import matplotlib as mpl  # noqa: PLC0415 - a second of import that only charts need

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, (rates, latencies, needs) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    streams = costs["streams"]
    for route, routed in ROUTES.items():
        fleet = plan(streams, wish.target / SMALLER[-1], wish.headroom, routed=routed)
        loads, seen = _swept(streams, fleet)
        label = f"{route}: {fleet.workers} workers, {fleet.masters} masters"
        rates.plot(loads, [one.rate for one in seen], marker=".", label=label)
        (line,) = latencies.plot(loads, [one.p99_us for one in seen], label=f"{route}, p99")
        latencies.plot(
            loads, [one.p50_us for one in seen], color=line.get_color(), linestyle=":",
            label=f"{route}, p50",
        )  # fmt: skip
    rates.set(xlabel="chunks/s offered", ylabel="chunks/s answered", ylim=0)
    latencies.set(xlabel="chunks/s offered", ylabel="latency in the fleet, µs", yscale="log")
    targets = [wish.target * 10 ** (step / 4) for step in range(-12, 1)]
    for way, route in ((way, route) for way in WAYS for route in ROUTES):
        fleets = [plan(costs[way], each, wish.headroom, routed=ROUTES[route]) for each in targets]
        (line,) = needs.plot(targets, [one.workers for one in fleets], label=f"{way}, {route}")
        needs.plot(targets, [one.masters for one in fleets], color=line.get_color(), linestyle=":")
    needs.set(
        xlabel="chunks/s", ylabel="workers (line), masters (dots)", xscale="log", yscale="log"
    )
    for axes in (rates, latencies, needs):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _swept(costs: Costs, fleet: Fleet) -> tuple[list[float], list[Outcome]]:
    most = fleet.workers * costs.most(fleet.seen)
    loads = [load * most for load in LOADS]
    return loads, [simulate(costs, fleet, load) for load in tqdm(loads, unit="load")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; write and draw what the command line asks for.

    Returns:
        The exit code: 2 where there is nothing to read.
    """
    options = _parse(arguments)
    try:
        where = json.loads(options.where.read_text())
        service = json.loads(options.service.read_text())
    except FileNotFoundError as error:
        print(
            f"{error.filename} is not there: run python -m benchmarks to measure", file=sys.stderr
        )
        return 2
    wish = Wish(options.target, options.sessions, options.headroom, options.cores)
    command = (
        f"python -m benchmarks.capacity --target {wish.target:.0f} --sessions {wish.sessions} "
        f"--headroom {wish.headroom:g} --cores {wish.cores}"
    )
    text = render(where, service, wish, command)
    print("\n" + text)
    if options.write:
        write_block(COMMAND, text)
    if options.charts:
        costs = {way: read_costs(where, scenario) for way, scenario in WAYS.items()}
        print(f"drawn: {draw(costs, wish, CHART)}")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capacity", description=__doc__)
    parser.add_argument("--target", type=float, default=1e6, help="chunks a second")
    parser.add_argument("--sessions", type=int, default=10_000_000, help="live ones")
    parser.add_argument(
        "--headroom", type=float, default=0.6, help="share of what is there that is used"
    )
    parser.add_argument("--cores", type=int, default=8, help="of a replica, a worker each")
    parser.add_argument("--where", type=Path, default=RESULTS / "where.json")
    parser.add_argument("--service", type=Path, default=RESULTS / "service.json")
    parser.add_argument("--charts", action="store_true", help="draw docs/img/capacity.png")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    options = parser.parse_args(arguments)
    if not 0 < options.headroom < 1:
        parser.error(f"--headroom: expected between 0 and 1, got {options.headroom:g}")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
