"""Show what a greedy tenant does to its neighbour.

Run as ``python -m benchmarks.neighbours``. One server with tokens and with a rate for the greedy tenant, which sends at
that rate and at ten times of it in turn and never waits when it is refused; meanwhile a modest tenant without a bound
sends a little, and its latencies in both cases are set side by side.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks.harness import RESULTS, write_document
from benchmarks.load.bench_rates import OURS
from benchmarks.load.lab import Lab, Plan, laboratory
from benchmarks.load.machine import describe_machine, machine_line
from benchmarks.load.page import write_block
from benchmarks.load.processes import Child
from benchmarks.load.rows import Bar, Ratio, paired, ratio_table, table
from benchmarks.load.workload import SMALL
from service.security.roles import Role
from service.security.tokens import create_token

COMMAND = "python -m benchmarks.neighbours --write"
GREEDY, MODEST = "greedy", "modest"
WAYS = ("stream", "unary")
WITHIN, BEYOND = "at its rate", "at ten times of it"
TIMES = {WITHIN: 1, BEYOND: 10}
SESSIONS = {GREEDY: 32, MODEST: 8}
MODEST_RATE = 200  # chunks/s
LEAD_S = 2.5  # the greedy tenant begins so much sooner: what it may send at once is used up by then
TAIL_S = 0.5  # and goes on for so much longer
# What is compared: where the samples hold it, and the bar of the ratio.
FIGURES = (
    ("p50", "p50_us", Bar(1.2, at_most=True)),
    ("p99", "p99_us", Bar(1.5, at_most=True)),
)

Pair = dict[str, dict[str, Any]]  # by tenant what its client reported
Samples = dict[tuple[str, str], list[Pair]]  # by way, and how much the greedy one sends


def start(lab: Lab, rate: int) -> dict[str, Child]:
    """Start the server and a client of each tenant."""
    tokens, tenants = lab.folder / "tokens.toml", lab.folder / "tenants.toml"
    tenants.write_text(f"[tenant.{GREEDY}]\noperations_per_second = {rate}\n")
    options = ("--tokens", str(tokens), "--tenants", str(tenants))
    logins = {}
    for tenant in SESSIONS:
        token, _ = create_token(tokens, Role.ADMIN, tenant, name=tenant, expires=None)
        file = lab.folder / f"{tenant}.token"
        file.write_text(token)
        logins[tenant] = ("--token-file", str(file))
    return {
        tenant: lab.client(OURS, SMALL, *options, login=login) for tenant, login in logins.items()
    }


def measure(
    lab: Lab, rate: int, repetitions: int, tick: Callable[[str], None] = lambda _text: None
) -> Samples:
    """Let the greedy tenant send at its rate and at ten times of it in turn, with streams and with calls."""
    clients = start(lab, rate)
    for tenant, client in clients.items():
        # Slowly: opening counts as well.
        lab.prepare(client, mode="open", sessions=SESSIONS[tenant])
    samples: Samples = {(way, load): [] for way in WAYS for load in TIMES}
    with ThreadPoolExecutor(len(clients)) as pool:
        for _ in range(repetitions):
            for (way, load), taken in samples.items():
                taken.append(_side_by_side(lab, clients, pool, way=way, rate=rate * TIMES[load]))
                tick(f"{way}: {load}")
    return samples


def _side_by_side(
    lab: Lab, clients: dict[str, Child], pool: ThreadPoolExecutor, *, way: str, rate: int
) -> Pair:
    """Measure both tenants at once; the greedy one begins sooner and ends later."""
    seconds, order = lab.plan.seconds, {"mode": "tenant", "is_unary": way == "unary"}
    orders = {
        GREEDY: {"rate": rate, "warmup_s": LEAD_S, "seconds": seconds + TAIL_S},
        MODEST: {"rate": MODEST_RATE, "warmup_s": LEAD_S, "seconds": seconds},
    }
    asked = {
        tenant: pool.submit(clients[tenant].ask, {**order, **more, "sessions": SESSIONS[tenant]})
        for tenant, more in orders.items()
    }
    return {tenant: answer.result() for tenant, answer in asked.items()}


def compared(samples: Samples) -> Iterator[Ratio]:
    """Set the neighbour's latencies side by side."""
    for way in WAYS:
        for name, key, bar in FIGURES:
            beyond, within = (
                [pair[MODEST][key] for pair in samples[way, load]] for load in (BEYOND, WITHIN)
            )
            yield paired(f"{way}: the neighbour's {name}, µs", beyond, within, bar)


def load_table(samples: Samples) -> str:
    """Lay out what both tenants sent and got."""
    header = ("", "greedy, taken/s", "greedy, refused/s", "neighbour, taken/s")
    return table(
        header,
        [
            (
                f"{way}, the greedy one {load}",
                *(
                    f"{median(pair[tenant][key] for pair in taken):,.0f}"
                    for tenant, key in ((GREEDY, "rate"), (GREEDY, "refused"), (MODEST, "rate"))
                ),
            )
            for (way, load), taken in samples.items()
        ],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write.

    Returns:
        The exit code: not 0 only where something could not be measured.
    """
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    plan = Plan(seconds=options.seconds, repetitions=options.repetitions)
    with tqdm(total=len(WAYS) * len(TIMES) * options.repetitions, unit="run") as progress:

        def tick(text: str) -> None:
            progress.set_postfix_str(text)
            progress.update()

        with laboratory(plan) as lab:
            samples = measure(lab, options.rate, options.repetitions, tick)
    machine, rows = describe_machine(), list(compared(samples))
    write_document(
        options.json,
        machine=machine,
        command=COMMAND,
        greedy_rate=options.rate,
        results=[row.as_json() for row in rows],
    )
    tables = f"{ratio_table(rows, BEYOND, WITHIN)}\n\n{load_table(samples)}"
    text = f"{machine_line(machine)}.\n\n{tables}"
    print("\n" + text)
    if options.write:
        write_block(COMMAND, text)
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.neighbours", description=__doc__)
    parser.add_argument("--rate", type=int, default=200, help="of the greedy tenant, operations/s")
    parser.add_argument("--repetitions", type=int, default=9, help="of each measurement")
    parser.add_argument("--seconds", type=float, default=5.0, help="of one measurement")
    parser.add_argument("--json", type=Path, default=RESULTS / "neighbours.json")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
