"""Measure the service against its peers, everything as a ratio within one run.

Run as ``python -m benchmarks.service``; ``--list`` names the benches, ``--only NAME`` picks some.
Prints tables, writes benchmarks/results/service.json and, with ``--charts``, pictures into docs/img/, with
``--write`` the tables into docs/performance.md.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from benchmarks.load import report
from benchmarks.load.bench_long import growth, soak
from benchmarks.load.bench_rates import ONE_CORE_SCENARIOS, SCENARIOS, run_scenario
from benchmarks.load.bench_work import (
    compute_bound,
    compute_bound_on_one_core,
    training_step,
    two_workers,
)
from benchmarks.load.lab import FREE, ONE_CORE, SPLIT, Lab, Pins, Plan, Samples, laboratory
from benchmarks.load.machine import describe_machine, machine_line
from benchmarks.load.page import write_block
from benchmarks.load.processes import StartError
from benchmarks.load.rows import Row, rows_table
from benchmarks.peers.mlserver_setup import SetupError, mlserver_python

RESULTS = Path(__file__).parent / "results" / "service.json"
CHARTS = Path(__file__).parents[1] / "docs" / "img"
SHORT = Plan()
LONG = Plan(seconds=5.0, warmup_s=1.0, repetitions=8, is_long=True)
PINS = {"free": FREE, "one-core": ONE_CORE, "split": SPLIT}


@dataclass(frozen=True)
class Bench:
    """One bench.

    Attributes:
        name: For ``--only``.
        about: One line.
        run: Measures and compares.
        pins: Where it always runs; None where the command line decides.
    """

    name: str
    about: str
    run: Callable[[Lab], list[Row]]
    pins: Pins | None = None


# Without a peer that could run alone.
OUR_BENCHES = [
    # With both cores the service computes in two threads, the engine beside it in one; so also on one.
    Bench("compute", "compute-bound chunks against the bare engine", compute_bound),
    Bench("compute-one-core", "the same, the server on one core", compute_bound_on_one_core, SPLIT),
    Bench("training", "a training step against the engine and torch in process", training_step),
    Bench("workers", "two workers against one, compute-bound", two_workers),
    Bench("growth", "latency and bytes a session, 1,000 → 20,000 (1,000,000) sessions", growth),
    Bench("soak", "memory and p99 over 1 (10) minutes at 80 % load", soak),
]


@dataclass
class Outcome:
    """What a run brought together."""

    rows: list[Row] = field(default_factory=list)
    samples: list[Samples] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def all_benches(*, with_ours: bool = True) -> list[Bench]:
    """List the benches in the order in which they run.

    Args:
        with_ours: False leaves this project's server out: only the peers' own rates are wanted.
    """
    rates = partial(run_scenario, with_ours=with_ours)
    benches = [
        *(Bench(name, one.title, partial(rates, scenario=one)) for name, one in SCENARIOS.items()),
        *(
            Bench(name, one.title, partial(rates, scenario=one), ONE_CORE)
            for name, one in ONE_CORE_SCENARIOS.items()
        ),
    ]
    return benches + OUR_BENCHES if with_ours else benches


def run(
    benches: Sequence[Bench], plan: Plan, pins: Pins = FREE, mlserver: Path | None = None
) -> Outcome:
    """Run benches, those with the same pins in one laboratory.

    A bench that fails is named with its reason, and the others go on.
    """
    outcome = Outcome()
    groups: dict[Pins, list[Bench]] = {}
    for bench in benches:
        groups.setdefault(bench.pins or pins, []).append(bench)
    with tqdm(total=len(benches), unit="bench") as progress:
        for group_pins, group in groups.items():
            with laboratory(
                plan, pins=group_pins, mlserver=mlserver, tick=progress.set_postfix_str
            ) as lab:
                for bench in group:
                    _run_one(bench, lab, outcome)
                    progress.update()
                outcome.samples += lab.log
    return outcome


def _run_one(bench: Bench, lab: Lab, outcome: Outcome) -> None:
    try:
        outcome.rows += bench.run(lab)
    except StartError as error:
        outcome.skipped.append(f"{bench.name}: {error}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for.

    Returns:
        The exit code: 1 where a bench failed or, with ``--check``, a bar does not hold.
    """
    options = _parser().parse_args(arguments)
    benches = all_benches(with_ours=not options.peers_only)
    if options.list:
        print("\n".join(f"{bench.name:18} {bench.about}" for bench in benches))
        return 0
    unknown = set(options.only) - {bench.name for bench in benches}
    if unknown:
        print(f"no bench of this name: {', '.join(sorted(unknown))}; --list names them")
        return 2
    chosen = [bench for bench in benches if not options.only or bench.name in options.only]
    # An ordinary exit, so that every process that was started is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    mlserver, notes = _find_mlserver(wanted=not options.no_mlserver)
    outcome = run(chosen, _plan(options), PINS[options.pin], mlserver)
    _publish(outcome, options, notes)
    missed = [row for row in outcome.rows if row.holds is False]
    return int(bool(outcome.skipped) or bool(options.check and missed))


def _find_mlserver(*, wanted: bool) -> tuple[Path | None, list[str]]:
    if not wanted:
        return None, ["MLServer was left out"]
    try:
        return mlserver_python(), []
    except SetupError as error:
        return None, [f"MLServer is left out: {error}"]


def _plan(options: argparse.Namespace) -> Plan:
    plan = LONG if options.long else SHORT
    return Plan(
        seconds=options.seconds or plan.seconds,
        warmup_s=plan.warmup_s,
        repetitions=options.repetitions or plan.repetitions,
        is_long=plan.is_long,
    )


def _publish(outcome: Outcome, options: argparse.Namespace, notes: Sequence[str]) -> None:
    machine, skipped = describe_machine(), [*notes, *outcome.skipped]
    tables = [report.samples_table(outcome.samples)]
    if outcome.rows:
        tables.append(rows_table(outcome.rows))
    print("\n" + "\n\n".join([*tables, *skipped]))
    report.write_json(
        options.json,
        outcome.rows,
        outcome.samples,
        machine=machine,
        command=_command(options),
        skipped=skipped,
    )
    print(f"written: {options.json}")
    if options.write:
        line = f"`{_command(options)}`: {machine_line(machine)}."
        write_block(f"{_command(options)} --write", "\n\n".join([line, *tables, *skipped]))
    if options.charts:
        for path in report.draw_charts(outcome.rows, outcome.samples, CHARTS):
            print(f"drawn: {path}")


def _command(options: argparse.Namespace) -> str:
    words = ["python -m benchmarks.service"]
    words += [f"--only {name}" for name in options.only]
    words += ["--long"] if options.long else []
    words += [f"--pin {options.pin}"] if options.pin != "free" else []
    return " ".join(words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service", description=__doc__)
    parser.add_argument("--list", action="store_true", help="name the benches and stop")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="run this one; may be repeated"
    )
    parser.add_argument("--long", action="store_true", help="more and longer repetitions")
    parser.add_argument("--seconds", type=float, help="of one measurement")
    parser.add_argument("--repetitions", type=int, help="of each measurement")
    parser.add_argument(
        "--pin",
        choices=PINS,
        default="free",
        help="one-core: every process on core 0; split: server on 0, client and store on 1",
    )
    parser.add_argument("--no-mlserver", action="store_true", help="leave MLServer out")
    parser.add_argument(
        "--peers-only", action="store_true", help="measure the peers alone, compare nothing"
    )
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 where a bar does not hold"
    )
    parser.add_argument("--charts", action="store_true", help="draw into docs/img/")
    parser.add_argument("--write", action="store_true", help="put the tables into the page")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where results are written")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
