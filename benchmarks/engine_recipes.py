"""The ways to put a forward pass into NumPy calls: those the engine takes, and those it does not.

Run as ``python -m benchmarks.engine_recipes``, about a minute. Each way is timed in turn with the engine on one core
and one thread; ``x engine`` is its time over the engine's: above 1 is slower. Then the same for single products: ways to
call one, where its matrix begins in memory, a transposed one. It is where the figures in ``rnn_engine/README.md`` come from.
"""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from benchmarks.engine_peers import make_work
from benchmarks.harness import interleave, one_thread_environment, pin_to_one_core
from benchmarks.load.rows import table
from rnn_engine import forward, rnn_forward
from rnn_engine.arrays import CACHE_LINE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.engine_peers import Work
    from rnn_engine import Array

    Way = Callable[[Work], Array]
    Size = tuple[int, int, int, int]

BUDGET_S = 2.0
SMALL_PRODUCT = 10**6
"""Multiplications up to which OpenBLAS multiplies without packing, on processors with AVX-512."""


def with_limit(limit: int) -> Way:
    """Return the engine's pass with another border between small and large inputs of one row."""

    def way(work: Work) -> Array:
        forward.SMALL_INPUT_BYTES, kept = limit, forward.SMALL_INPUT_BYTES
        hs = rnn_forward(work.params, work.xs, work.h0).hs
        forward.SMALL_INPUT_BYTES = kept
        return hs

    return way


def by_scipy(work: Work) -> Array:
    """Let SciPy's sgemv add the product to the inputs' part: two calls a step."""
    from scipy.linalg.blas import sgemv  # type: ignore[import-untyped]  # noqa: PLC0415

    hs, h, WhT, tanh = _inputs(work)[:, 0], work.h0[0], work.params.Wh.T, np.tanh
    for row in hs:
        sgemv(1.0, WhT, h, 1.0, row, 0, 1, 0, 1, 0, 1)
        tanh(row, row)
        h = row
    return hs[None]


def by_late_bias(work: Work) -> Array:
    """Add the bias in a pass of its own instead of taking it along in the product."""
    n, t, d = work.xs.shape
    zs = np.ascontiguousarray(work.xs.swapaxes(0, 1)).reshape(t * n, d).dot(work.params.Wx)
    zs += work.params.b
    return _batch(work, zs.reshape(t, n, -1))


def by_joined_rows(work: Work) -> Array:
    """Take rows [h, x, 1] for a batch as well."""
    (n, t, _), h = work.xs.shape, work.params.hidden_size
    rows = np.empty((t, n, len(work.params.joined)), work.xs.dtype)
    rows[..., h:-1] = work.xs.swapaxes(0, 1)
    rows[..., -1] = 1
    hs = np.empty((t, n, h), rows.dtype)
    state = work.h0
    for row, out in zip(rows, hs, strict=True):
        row[:, :h] = state
        row.dot(work.params.joined, out)
        np.tanh(out, out)
        state = out
    return hs.swapaxes(0, 1)


def by_slabs(work: Work) -> Array:
    """Cut every product into slabs of rows that are small to OpenBLAS."""
    n, t, _ = work.xs.shape
    rows = forward.time_major_rows(work.xs)
    zs = np.empty((t * n, work.params.hidden_size), rows.dtype)
    _multiply_in_slabs(rows, work.params.input_part, zs)
    return _batch(work, zs.reshape(t, n, -1), _multiply_in_slabs)


def _multiply_in_slabs(rows: Array, matrix: Array, out: Array) -> None:
    height = max(1, SMALL_PRODUCT // matrix.size)
    for start in range(0, len(rows), height):
        rows[start : start + height].dot(matrix, out[start : start + height])


def _inputs(work: Work) -> Array:
    n, t, _ = work.xs.shape
    rows = forward.time_major_rows(work.xs)
    zs: Array = rows.dot(work.params.input_part)
    return zs.reshape(t, n, -1)


def _batch(work: Work, hs: Array, multiply: Callable[[Array, Array, Array], Any] = np.dot) -> Array:
    h, z = work.h0, np.empty_like(work.h0)
    for rows in hs:
        multiply(h, work.params.Wh, z)
        np.add(rows, z, rows)
        np.tanh(rows, rows)
        h = rows
    return hs.swapaxes(0, 1)


ROW_SMALL, ROW_MIDDLE, ROW_BORDER = (1, 16, 32, 64), (1, 64, 64, 128), (1, 64, 96, 128)
ROW_LARGE = (1, 64, 256, 256)
BATCHES = [(8, 32, 64, 128), (64, 16, 32, 64), (20, 35, 100, 100), (64, 64, 256, 256)]
WAYS: list[tuple[str, Way, list[Size]]] = [
    ("product of the inputs first", with_limit(0), [ROW_SMALL, ROW_MIDDLE, ROW_BORDER]),
    ("rows [h, x, 1]", with_limit(sys.maxsize), [ROW_LARGE]),
    ("SciPy adds in the product", by_scipy, [ROW_SMALL, ROW_MIDDLE, ROW_LARGE]),
    ("bias in a pass of its own", by_late_bias, BATCHES),
    ("rows [h, x, 1]", by_joined_rows, BATCHES),
    ("products in slabs", by_slabs, [BATCHES[-1], (64, 64, 512, 512)]),
]


CALLS = 200  # products a sample: one alone is too short for the clock


def products() -> list[tuple[str, str, Callable[[], Any], Callable[[], Any]]]:
    """Return what is compared (name, sizes), and the engine's product and the other one."""
    found: list[tuple[str, str, Callable[[], Any], Callable[[], Any]]] = []
    for h in (64, 128):
        row, out, matrix = (make_block(*shape) for shape in ((1, h), (1, h), (h, h)))
        bound, transposed, v, z = matrix.T.dot, matrix.T, row[0], out[0]
        ours = partial(bound, v, z)
        found += [
            (
                "np.dot, not the bound method",
                f"1x{h} {h}x{h}",
                ours,
                partial(np.dot, transposed, v, z),
            ),
            ("np.matmul", f"1x{h} {h}x{h}", ours, partial(np.matmul, transposed, v, z)),
        ]
    for inputs, h in ((32, 64), (64, 128), (256, 256)):
        row, out = make_block(1, h + inputs + 1), make_block(1, h)
        matrices = [make_block(h + inputs + 1, h, offset) for offset in (0, 16)]
        ours, theirs = (partial(matrix.T.dot, row[0], out[0]) for matrix in matrices)
        found.append(
            (
                "16 bytes beside a cache line",
                f"1x{h + inputs + 1} {h + inputs + 1}x{h}",
                ours,
                theirs,
            )
        )
    for n, h in ((8, 128), (20, 100), (64, 256), (64, 512)):
        rows, out, matrix = make_block(n, h), make_block(n, h), make_block(h, h)
        other = make_block(h, h)
        ours, theirs = partial(rows.dot, matrix, out), partial(rows.dot, other.T, out)
        found.append(("a transposed matrix", f"{n}x{h} {h}x{h}", ours, theirs))
    return found


def make_block(rows: int, columns: int, offset: int = 0) -> Array:
    """Return random float32 numbers, (rows, columns), so many bytes after a cache line's border."""
    size = 4 * rows * columns
    memory = np.empty(size + 2 * CACHE_LINE_BYTES, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE_BYTES + offset
    block: Array = memory[start : start + size].view(np.float32).reshape(rows, columns)
    block[:] = np.random.default_rng(0).standard_normal(block.shape)
    return block


def _many(call: Callable[[], Any]) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(CALLS):
            call()

    return calls


def measure() -> None:
    """Check that every way computes the same, time them, print the tables."""
    pin_to_one_core()
    print(_passes())
    print("\n" + _products())


def _products() -> str:
    lines = []
    for name, sizes, ours, theirs in tqdm(products(), unit="product"):
        samples = interleave(
            {"ours": _many(ours), "theirs": _many(theirs)},
            budget_s=BUDGET_S,
            clock=time.process_time,
        )
        ratio = median(b / a for a, b in zip(samples["ours"], samples["theirs"], strict=True))
        cells = [f"{median(one) * 1e6 / CALLS:,.2f}" for one in samples.values()]
        lines.append([name, sizes, *cells, f"{ratio:.2f}"])
    return table(["product", "sizes", "engine µs", "this way µs", "x engine"], lines)


def _passes() -> str:
    lines = []
    cases = [(name, way, size) for name, way, sizes in WAYS for size in sizes]
    for name, way, size in tqdm(cases, unit="way"):
        work = make_work(*size)
        expected = rnn_forward(work.params, work.xs, work.h0).hs
        np.testing.assert_allclose(way(work), expected, rtol=5e-3, atol=5e-4)
        ours, theirs = _time(work, way)
        ratio = median(b / a for a, b in zip(ours, theirs, strict=True))
        lines.append([name, " ".join(map(str, size)), *_cells(ours, theirs), f"{ratio:.2f}"])
    return table(["way", "N T D H", "engine µs", "this way µs", "x engine"], lines)


def _time(work: Work, way: Way) -> tuple[list[float], list[float]]:
    samples = interleave(
        {
            "engine": lambda: rnn_forward(work.params, work.xs, work.h0),
            "way": lambda: way(work),
        },
        budget_s=BUDGET_S,
        clock=time.process_time,
    )
    return samples["engine"], samples["way"]


def _cells(*samples: list[float]) -> list[str]:
    return [f"{median(sample) * 1e6:,.1f}" for sample in samples]


if __name__ == "__main__":
    if sys.argv[1:] == ["--in-this-process"]:
        measure()
    else:
        # A child, since libraries read their thread settings when they are loaded.
        command = [sys.executable, "-m", "benchmarks.engine_recipes", "--in-this-process"]
        code = subprocess.run(command, env=one_thread_environment(), check=False).returncode  # noqa: S603
        raise SystemExit(code)
