"""Measures on one core with interleaved repetitions, and describes the machine beside the figures.

A sample is the mean over as many calls as fill a slice of time. The contestants take turns, so that what
disturbs the machine disturbs all of them; the result is the median of the samples.
"""

import gc
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.load.rows import Row

RESULTS = Path(__file__).parent / "results"
THREAD_VARIABLES = (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
# They make OpenBLAS use the kernels of another processor than the one it runs on.
KERNEL_VARIABLES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")

Contestants = Mapping[str, Callable[[], object]]


def one_thread_environment() -> dict[str, str]:
    """Return this process's environment for a child whose libraries start with one thread.

    The variables are read when a library is loaded: setting them later has no effect.
    """
    environment = {k: v for k, v in os.environ.items() if k not in KERNEL_VARIABLES}
    environment |= dict.fromkeys(THREAD_VARIABLES, "1")
    # XLA asks for its thread pool's size through these alone.
    environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    environment["JAX_PLATFORMS"] = "cpu"
    return environment


def pin_to_one_core() -> int | None:
    """Bind this process to the last core it may use.

    Returns:
        The core's number; None where the system has no such call.
    """
    if not hasattr(os, "sched_setaffinity"):
        return None
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return core


def interleave(
    contestants: Contestants,
    *,
    budget_s: float,
    rounds: int = 15,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time the contestants in turn.

    Args:
        contestants: What to call, by name.
        budget_s: About how many seconds all of it may take; at least five rounds are made.
        rounds: How many samples of each to take where the budget allows.
        clock: Returns the seconds. `time.process_time` counts the work of all threads of this
            process: on one core the same as the time that passes, less what other processes take.

    Returns:
        The samples of each, in seconds a call; the k-th of all were taken one right after the other.
    """
    costs = {name: _warm_up(call, clock) for name, call in contestants.items()}
    rounds = max(5, min(rounds, int(budget_s / sum(costs.values()))))
    slice_s = budget_s / rounds / len(costs)
    counts = {name: max(1, int(slice_s / cost)) for name, cost in costs.items()}
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in contestants.items():
                samples[name].append(_sample(call, counts[name], clock))
    finally:
        gc.enable()
    return samples


def _warm_up(call: Callable[[], object], clock: Callable[[], float]) -> float:
    call()
    return min(_sample(call, 1, clock) for _ in range(3))


def _sample(call: Callable[[], object], count: int, clock: Callable[[], float]) -> float:
    repeats = range(count)
    started = clock()
    for _ in repeats:
        call()
    return (clock() - started) / count


def rates(samples: Sequence[float]) -> list[float]:
    """Turn seconds a call into calls a second."""
    return [1 / sample for sample in samples]


def geometric_mean(values: Iterable[float]) -> float:
    """Return the mean that ratios have."""
    logarithms = [math.log(value) for value in values]
    return math.exp(math.fsum(logarithms) / len(logarithms))


def describe_machine(packages: Sequence[str]) -> dict[str, Any]:
    """Return the processor, the system and the versions of Python and the given packages."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.system() + " " + platform.release().split("-")[0],
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def write_results(
    path: Path, rows: Sequence[Row], *, machine: dict[str, Any], command: str
) -> None:
    """Write comparisons beside the machine and versions they hold for."""
    results = [row.as_json() for row in rows]
    write_document(path, machine=machine, command=command, results=results)


def write_document(path: Path, *, machine: dict[str, Any], command: str, **parts: Any) -> None:
    """Write whatever was measured, as JSON, beside the machine and versions it holds for."""
    document = {
        "machine": machine,
        "command": command,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **parts,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
