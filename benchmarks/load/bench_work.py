"""Heavy work: compute-bound chunks, training steps, several workers."""

import subprocess
import sys
from pathlib import Path

from benchmarks.load.bench_rates import OURS
from benchmarks.load.lab import Lab
from benchmarks.load.processes import Child, StartError
from benchmarks.load.rows import Bar, Row, compare
from benchmarks.load.workload import COMPUTE_BOUND

COMPUTE_SESSIONS = 16
WORKER_SESSIONS = 32
LONG_WORK_SECONDS = 5.0


def compute_bound(lab: Lab) -> list[Row]:
    """Compare streamed chunks that are mostly arithmetic with the arithmetic alone, in one thread."""
    return _compute_bound(lab, f"compute-bound, {COMPUTE_SESSIONS} sessions, {COMPUTE_BOUND}")


def compute_bound_on_one_core(lab: Lab) -> list[Row]:
    """Compare the same where the server has one core, which its loop and the arithmetic share."""
    title = f"compute-bound, {COMPUTE_SESSIONS} sessions, {COMPUTE_BOUND}, server on one core"
    return _compute_bound(lab, title)


def _compute_bound(lab: Lab, title: str) -> list[Row]:
    order = {"mode": "stream", "sessions": COMPUTE_SESSIONS, "seconds": _seconds(lab)}
    samples = lab.take_turns(
        title,
        {
            OURS: (lab.client(OURS, COMPUTE_BOUND), order),
            "engine": (_engine(lab), order),
        },
    )
    ours, engine = samples[OURS], samples["engine"]
    name = f"{ours.scenario} / the engine alone"
    return [compare(name, "chunks/s", ours.values("rate"), engine.values("rate"), Bar(0.85))]


def _seconds(lab: Lab) -> float:
    # What is under way at the end does not count: an eighth of a second's work must not matter.
    return max(lab.plan.seconds, LONG_WORK_SECONDS)


def _engine(lab: Lab) -> Child:
    sizes = COMPUTE_BOUND
    return lab.worker(
        "benchmarks.load.engine_alone", "--sizes", sizes.steps, sizes.inputs, sizes.hidden
    )


def training_step(lab: Lab) -> list[Row]:
    """Compare a training step through the service with one in process."""
    trainer = "benchmarks.load.training"
    target = lab.server(OURS).address
    workers = {
        OURS: lab.worker(trainer, "--trainer", OURS, "--target", target),
        "engine": lab.worker(trainer, "--trainer", "engine"),
        "torch": lab.worker(trainer, "--trainer", "torch"),
    }
    rows = []
    for with_dxs, title in ((True, "training step, with dxs"), (False, "training step, no dxs")):
        order = {"with_dxs": with_dxs}
        samples = lab.take_turns(title, {name: (one, order) for name, one in workers.items()})
        ours = samples[OURS].values("rate")
        # Both bars are for the step that returns all a layer below needs.
        bars = {"engine": Bar(0.5), "torch": Bar(0.8)} if with_dxs else {}
        rows += [
            compare(
                f"{title} / {peer} in process", "steps/s", ours, samples[peer].values("rate"),
                bars.get(peer),
            )
            for peer in ("engine", "torch")
        ]  # fmt: skip
    return rows


def two_workers(lab: Lab) -> list[Row]:
    """Compare two workers with one, on compute-bound chunks; each computes one batch at a time.

    Left to itself one worker uses two cores for such chunks, and there is nothing that a second one
    could add on two.
    """
    if not _serve_has_option("--workers"):
        raise StartError("timernn serve has no --workers")
    order = {"mode": "stream", "sessions": WORKER_SESSIONS, "seconds": _seconds(lab)}
    clients = {
        f"{count} workers": lab.client(
            OURS, COMPUTE_BOUND, "--workers", str(count), "--compute-threads", "1",
            channels=WORKER_SESSIONS,
        )
        for count in (1, 2)
    }  # fmt: skip
    samples = lab.take_turns(
        f"workers, {WORKER_SESSIONS} sessions, {COMPUTE_BOUND}",
        {name: (client, order) for name, client in clients.items()},
    )
    one, two = samples["1 workers"], samples["2 workers"]
    name = "two workers / one worker, compute-bound"
    return [compare(name, "chunks/s", two.values("rate"), one.values("rate"), Bar(1.7))]


def _serve_has_option(option: str) -> bool:
    command = [str(Path(sys.executable).parent / "timernn"), "serve", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return option in done.stdout
