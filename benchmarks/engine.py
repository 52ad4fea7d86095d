"""The engine against its peers, one thread on one core.

Run as ``python -m benchmarks.engine [--peers torch,onnxruntime,jax] [--seconds 130]``. Ends in tables and
``benchmarks/results/engine.json``. A ratio is ours / peer in passes a second of processor time,
all threads of the process together: above 1 is faster.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_info  # type: ignore[import-untyped]
from tqdm import tqdm

from benchmarks.engine_peers import (
    PEERS,
    BareProducts,
    Engine,
    fewest_calls,
    fewest_ragged_calls,
    installed_peers,
    make_work,
    onnx_session,
)
from benchmarks.harness import (
    RESULTS,
    describe_machine,
    geometric_mean,
    interleave,
    one_thread_environment,
    pin_to_one_core,
    rates,
    write_results,
)
from benchmarks.load.rows import Bar, compare, rows_table, table
from rnn_engine import rnn_backward, rnn_forward, rnn_forward_many

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.engine_peers import Work
    from benchmarks.harness import Contestants
    from benchmarks.load.rows import Row

SIZES = [
    (1, 1, 32, 64),
    (1, 16, 32, 64),
    (1, 64, 64, 128),
    (1, 64, 256, 256),
    (1, 128, 512, 512),
    (1, 64, 1024, 1024),
    (8, 32, 64, 128),
    (32, 35, 100, 100),
    (20, 35, 100, 100),
    (64, 64, 256, 256),
    (64, 64, 512, 512),
    (128, 35, 1024, 1024),
]
NEAR_THE_PRODUCTS_FROM = 512
GEOMETRIC_BARS = {
    ("torch", "forward"): 2.0,
    ("torch", "forward+backward"): 2.6,
    ("onnxruntime", "forward"): 1.6,
    ("jax", "forward"): 1.35,
    ("jax", "forward+backward"): 1.25,
}
FASTER_AT = {"torch": 12, "onnxruntime": 12, "jax": 11}
PRODUCT_BARS = {"forward": Bar(1.08, at_most=True), "backward": Bar(1.12, at_most=True)}
RAGGED_SINGLES_BAR = Bar(6.0)
RAGGED_ONNX_BAR = Bar(1.5)
RAGGED_SIZES = (32, 64)
FLOOR = "fewest calls"
PACKAGES = ("numpy", "torch", "onnxruntime", "jax", "jaxlib")

Timings = dict[str, list[float]]
AllTimings = dict[tuple[tuple[int, ...], str], Timings]


def main(argv: list[str] | None = None) -> int:
    """Measure in a child process, since libraries read their thread settings when they are loaded.

    Returns:
        The exit code: not 0 only where something could not be measured.
    """
    arguments = sys.argv[1:] if argv is None else argv
    command = [sys.executable, "-m", "benchmarks.engine", "--in-this-process", *arguments]
    return subprocess.run(command, env=one_thread_environment(), check=False).returncode  # noqa: S603


def measure(arguments: argparse.Namespace) -> int:
    """Run all benches in this process, print the tables, write the JSON file."""
    core = pin_to_one_core()
    peers = _choose_peers(arguments.peers)
    timings, others = _run_all(peers, arguments.seconds / 100)
    rows = [*_summarize(timings, peers), *others]
    print(_size_table(timings, peers), "", rows_table(rows), sep="\n")
    machine = describe_machine(PACKAGES) | {"core": core, "threads": 1, "blas": _blas()}
    print(f"\n{machine['processor']}, one thread, {machine['blas']}, {machine['packages']}")
    write_results(
        arguments.output,
        [*rows, *_rows_by_size(timings, peers)],
        machine=machine,
        command=f"python -m benchmarks.engine --peers {','.join(peers)} --seconds {arguments.seconds}",
    )
    return 0


def _run_all(peers: list[str], budget_s: float) -> tuple[AllTimings, list[Row]]:
    """Time every size against the peers, the large ones against bare products, and ragged batches."""
    timings: AllTimings = {}
    others: list[Row] = []
    large = [size for size in SIZES if size[3] >= NEAR_THE_PRODUCTS_FROM]
    with tqdm(total=len(SIZES) + len(large) + 1, unit="bench") as progress:
        for size in SIZES:
            progress.set_description(_label(size))
            for what, samples in _run_size(size, peers, budget_s):
                timings[size, what] = samples
            progress.update()
        for size in large:
            progress.set_description(f"bare products, {_label(size)}")
            others += _run_products(size, budget_s)
            progress.update()
        progress.set_description("ragged")
        others += _run_ragged(peers, budget_s)
        progress.update()
    return timings, others


def _choose_peers(wanted: str | None) -> list[str]:
    installed = installed_peers()
    peers = wanted.split(",") if wanted else installed
    missing = [name for name in {*peers, "torch"} if name not in installed]
    if missing:
        raise SystemExit(f"not installed: {', '.join(sorted(missing))}; see `make bench-engine`")
    return peers


def _time(contestants: Contestants, budget_s: float) -> Timings:
    # Whatever else the machine does is left out, and no peer has a thread on another core.
    return interleave(contestants, budget_s=budget_s, clock=time.process_time)


def _run_size(
    size: tuple[int, int, int, int], peers: list[str], budget_s: float
) -> Iterator[tuple[str, Timings]]:
    """Time one size forward, then forward and back, after checking that all agree."""
    work = make_work(*size)
    contestants = {"ours": Engine(work)} | {name: PEERS[name](work) for name in peers}
    expected = contestants["ours"].hidden_states()
    for contestant in contestants.values():
        np.testing.assert_allclose(contestant.hidden_states(), expected, rtol=5e-3, atol=5e-4)
    forward = {name: c.forward for name, c in contestants.items()}
    yield "forward", _time(forward | {FLOOR: fewest_calls(work)}, 3 * budget_s)
    both = {name: c.both for name, c in contestants.items() if c.both}
    yield "forward+backward", _time(both, 4 * budget_s)


def _run_products(size: tuple[int, int, int, int], budget_s: float) -> list[Row]:
    """Compare each pass with its bare matrix products; the ratio is time over time."""
    work = make_work(*size)
    bare = BareProducts(work)
    tape = rnn_forward(work.params, work.xs, work.h0)
    samples = _time(
        {
            "forward": lambda: rnn_forward(work.params, work.xs, work.h0),
            FLOOR: fewest_calls(work),
            "bare forward": bare.forward,
            "backward": lambda: rnn_backward(work.params, tape, work.dhs),
            "bare backward": bare.backward,
        },
        3 * budget_s,
    )
    against = [("forward", "forward"), (FLOOR, "forward"), ("backward", "backward")]
    return [
        compare(
            f"{what} over bare products, {_label(size)}",
            "µs",
            _microseconds(samples[what]),
            _microseconds(samples[f"bare {products}"]),
            PRODUCT_BARS.get(what),
        )
        for what, products in against
    ]


def _run_ragged(peers: list[str], budget_s: float) -> list[Row]:
    """Compare one ragged pass over 64 sequences with 64 single ones and a padded batch."""
    d, h = RAGGED_SIZES
    params = make_work(1, 1, d, h).params
    lengths = [k * 13 % 32 + 1 for k in range(64)]
    sequences = [make_work(1, t, d, h) for t in lengths]
    xs, h0 = [s.xs for s in sequences], [s.h0 for s in sequences]
    contestants: dict[str, Callable[[], Any]] = {
        "ours": lambda: rnn_forward_many(params, xs, h0),
        "64 single forwards": lambda: [
            rnn_forward(params, x, state) for x, state in zip(xs, h0, strict=True)
        ],
    }
    if "onnxruntime" in peers:
        feeds = _padded(sequences)
        session = onnx_session(params)
        contestants["onnxruntime on the padded batch"] = lambda: session.run(None, feeds)
    contestants[FLOOR] = fewest_ragged_calls(params, lengths)
    samples = _time(contestants, 4 * budget_s)
    bars = {
        "64 single forwards": RAGGED_SINGLES_BAR,
        "onnxruntime on the padded batch": RAGGED_ONNX_BAR,
    }
    return [
        compare(
            f"64 ragged sequences{suffix} / {peer}",
            "passes/s",
            rates(samples[who]),
            rates(samples[peer]),
            bar if who == "ours" else None,
        )
        for who, suffix in (("ours", ""), (FLOOR, f", {FLOOR}"))
        for peer, bar in bars.items()
        if peer in samples
    ]


def _padded(sequences: list[Work]) -> dict[str, Any]:
    """Return the sequences as one time-major batch with its lengths."""
    lengths = np.array([s.xs.shape[1] for s in sequences], np.int32)
    batch = np.zeros((lengths.max(), len(sequences), sequences[0].xs.shape[2]), np.float32)
    for number, sequence in enumerate(sequences):
        batch[: lengths[number], number] = sequence.xs[0]
    return {"X": batch, "H0": np.concatenate([s.h0 for s in sequences])[None], "lengths": lengths}


def _summarize(timings: AllTimings, peers: list[str]) -> list[Row]:
    """Return the geometric mean and the number of sizes won, a peer and a direction.

    Beside each of a forward pass stands, without a bar, what the fewest calls of NumPy would reach.
    """
    rows = []
    for (peer, what), limit in GEOMETRIC_BARS.items():
        if peer not in peers:
            continue
        samples = [one for (_, w), one in timings.items() if w == what]
        rows += _against(f"{what} / {peer}", [_ratio(one, peer) for one in samples], limit, peer)
        if what == "forward":
            floors = [_ratio(one, peer, FLOOR) for one in samples]
            rows += _against(f"{what}, {FLOOR} / {peer}", floors, None, peer)
    return rows


def _against(name: str, ratios: list[float], limit: float | None, peer: str) -> list[Row]:
    wins = sum(ratio > 1 for ratio in ratios)
    bars = (None, None) if limit is None else (Bar(limit), Bar(FASTER_AT[peer]))
    return [
        compare(f"{name}, geometric mean", "ratio", [geometric_mean(ratios)], [1.0], bars[0]),
        compare(f"{name}, faster at", "sizes", [wins], [1.0], bars[1]),
    ]


def _rows_by_size(timings: AllTimings, peers: list[str]) -> list[Row]:
    return [
        compare(
            f"{what} / {peer}, {_label(size)}",
            "passes/s",
            rates(samples["ours"]),
            rates(samples[peer]),
            Bar(1.0),
        )
        for (size, what), samples in timings.items()
        for peer in peers
        if peer in samples
    ]


def _size_table(timings: AllTimings, peers: list[str]) -> str:
    header = ["N T D H", f"{FLOOR} µs", "forward µs", *(f"/ {p}" for p in peers)]
    header.append("forward+backward µs")
    back_peers = [p for p in peers if p != "onnxruntime"]
    header += [f"/ {p}" for p in back_peers]
    lines = []
    for size in SIZES:
        forward, both = timings[size, "forward"], timings[size, "forward+backward"]
        lines.append(
            [
                " ".join(map(str, size)),
                f"{statistics.median(_microseconds(forward[FLOOR])):,.1f}",
                f"{statistics.median(_microseconds(forward['ours'])):,.1f}",
                *(f"{_ratio(forward, p):.2f}" for p in peers),
                f"{statistics.median(_microseconds(both['ours'])):,.1f}",
                *(f"{_ratio(both, p):.2f}" for p in back_peers),
            ]
        )
    return table(header, lines)


def _ratio(samples: Timings, peer: str, who: str = "ours") -> float:
    return statistics.median(samples[peer]) / statistics.median(samples[who])


def _microseconds(samples: list[float]) -> list[float]:
    return [sample * 1e6 for sample in samples]


def _label(size: tuple[int, ...]) -> str:
    return " ".join(f"{letter}{value}" for letter, value in zip("NTDH", size, strict=True))


def _blas() -> str:
    """Return NumPy's BLAS and the kernels it chose."""
    numpy_blas = [one for one in threadpool_info() if "numpy" in one["filepath"]]
    names = (f"{b['internal_api']} {b['version']} {b['architecture']}" for b in numpy_blas)
    return ", ".join(names) or "unknown BLAS"


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--peers", help="comma-separated; default: all that are installed")
    parser.add_argument("--seconds", type=float, default=130.0, help="about how long to measure")
    parser.add_argument("--output", type=Path, default=RESULTS / "engine.json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    if "--in-this-process" in sys.argv:
        raise SystemExit(measure(_parse([a for a in sys.argv[1:] if a != "--in-this-process"])))
    _parse(sys.argv[1:])  # Bad options end here, before a child is started.
    raise SystemExit(main())
