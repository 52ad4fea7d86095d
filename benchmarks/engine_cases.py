"""What `benchmarks.engine_before` computes and times with the engines of two checkouts.

Each function takes the engine, the package itself, and uses only what both checkouts offer: the pure functions.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

SHAPES = ((3, 5), (17, 33), (16, 32), (50, 70))  # D, H: most are no multiples of 16
PARTS = ((1, 7), (3, 4), (2, 1))  # N, T of the chunks whose gradients are joined in a step
STEPS = 50
CHUNKS = 40
DTYPES = ("float32", "float64")

Call = Callable[[], object]


def make_params(engine: Any, d: int, h: int, dtype: str) -> Any:
    """Return seeded weights."""
    rng = np.random.default_rng(d * 1000 + h)
    shapes = ((d, h), (h, h), (h,))
    return engine.Params(*((rng.normal(size=s) * h**-0.5).astype(dtype) for s in shapes))


def digest(arrays: Iterable[Any]) -> str:
    """Return the sha256 of arrays in C order."""
    whole = hashlib.sha256()
    for array in arrays:
        whole.update(np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()


def train(engine: Any, optimizer: Any, params: Any, clip_norm: float, *, mean: bool) -> str:
    """Make 50 steps, each from the gradients of several chunks; return the digest of what came of it."""
    d, h = params.Wx.shape
    dtype = params.Wx.dtype
    rng = np.random.default_rng(1)
    moments = engine.init_moments(optimizer, params)
    norms = []
    for _ in range(STEPS):
        grads = []
        for n, t in PARTS:
            xs, h0, dhs = (rng.normal(size=s).astype(dtype) for s in ((n, t, d), (n, h), (n, t, h)))
            grads.append(engine.rnn_backward(params, engine.rnn_forward(params, xs, h0), dhs).grads)
        joined = engine.sum_grads(grads)
        if mean:
            joined = engine.scale_grads(joined, 1 / len(grads))
        joined, norm, _ = engine.clip_by_global_norm(joined, clip_norm)
        norms.append(norm)
        params, moments = engine.apply_update(optimizer, params, joined, moments)
    arrays = [params.Wx, params.Wh, params.b, *engine.moments_to_arrays(moments).values()]
    return digest([*arrays, np.array(norms)])


def stream(engine: Any, params: Any, *, ragged: bool) -> str:
    """Run 40 chunks, each from the state that the one before left; return the digest of all states."""
    d, h = params.Wx.shape
    dtype = params.Wx.dtype
    rng = np.random.default_rng(2)
    states = [np.zeros((n, h), dtype) for n in (1, 3, 2)]
    seen = []
    for k in range(CHUNKS):
        steps = [k % 5 + 1, (k * 3) % 7 + 1 if ragged else k % 5 + 1, k % 5 + 1]
        xs = [
            rng.normal(size=(len(s), t, d)).astype(dtype)
            for s, t in zip(states, steps, strict=True)
        ]
        if ragged:
            outputs = engine.rnn_forward_many(params, xs, states)
        else:
            outputs = [engine.rnn_forward(params, x, s).hs for x, s in zip(xs, states, strict=True)]
        states = [hs[:, -1].copy() for hs in outputs]
        seen += [*outputs, *states]
    return digest(seen)


def digests(engine: Any) -> dict[str, str]:
    """Return the digest of each proof by its name."""
    found = {}
    for (d, h), dtype in itertools.product(SHAPES, DTYPES):
        params = make_params(engine, d, h, dtype)
        where = f"D={d} H={h} {dtype}"
        for ragged in (False, True):
            found[f"{CHUNKS} chunks, {'ragged' if ragged else 'single'}, {where}"] = stream(
                engine, params, ragged=ragged
            )
        for kind, clip_norm, mean in itertools.product(
            engine.OPTIMIZERS, (0.0, 0.5), (False, True)
        ):
            options = f"{'MEAN' if mean else 'SUM'}, {'clipped' if clip_norm else 'not clipped'}"
            optimizer = replace(kind(), lr=0.01)
            found[f"{STEPS} steps, {kind.__name__}, {options}, {where}"] = train(
                engine, optimizer, params, clip_norm, mean=mean
            )
    return found


def make_cases(engine: Any) -> dict[str, Call]:
    """Return what is timed, by its name."""
    cases: dict[str, Call] = {}
    for n, t, d, h in (
        (1, 1, 32, 64),
        (1, 16, 32, 64),
        (1, 64, 256, 256),
        (4, 8, 32, 64),
        (8, 32, 64, 128),
    ):
        _add_passes(engine, cases, n, t, d, h)
    _add_ragged(engine, cases)
    for d, h in ((32, 64), (256, 256), (1024, 1024)):
        _add_steps(engine, cases, d, h)
    return cases


def _add_passes(engine: Any, cases: dict[str, Call], n: int, t: int, d: int, h: int) -> None:
    params = make_params(engine, d, h, "float32")
    rng = np.random.default_rng(3)
    xs, h0, dhs = (rng.normal(size=s).astype("f4") for s in ((n, t, d), (n, h), (n, t, h)))
    tape = engine.rnn_forward(params, xs, h0)
    size = f"N={n} T={t} D={d} H={h}"
    cases[f"forward, {size}"] = lambda: engine.rnn_forward(params, xs, h0)
    cases[f"backward, {size}"] = lambda: engine.rnn_backward(params, tape, dhs)
    cases[f"forward and its last state, {size}"] = _forward_with_state(engine, params, xs, h0)


def _forward_with_state(engine: Any, params: Any, xs: Any, h0: Any) -> Call:
    """Return what a server does for a chunk: by the network where there is one, else by functions."""
    if not hasattr(engine, "TanhNetwork"):
        return partial(_function_with_state, engine, params, xs, h0)
    network = engine.TanhNetwork(*params.Wx.shape)
    prepared = network.prepare(params)
    return lambda: network.forward(prepared, xs, (h0,), keep=False)


def _function_with_state(engine: Any, params: Any, xs: Any, h0: Any) -> Any:
    return engine.rnn_forward(params, xs, h0).hs[:, -1].copy()


def _add_ragged(engine: Any, cases: dict[str, Call]) -> None:
    params = make_params(engine, 32, 64, "float32")
    rng = np.random.default_rng(4)
    lengths = [k * 13 % 32 + 1 for k in range(64)]
    for name, steps in (("64 ragged sequences", lengths), ("64 equal sequences", [4] * 64)):
        xs = [rng.normal(size=(1, t, 32)).astype("f4") for t in steps]
        states = [np.zeros((1, 64), "f4") for _ in steps]
        cases[name] = partial(engine.rnn_forward_many, params, xs, states)
        cases[f"{name} and their last states"] = _many_with_states(engine, params, xs, states)


def _many_with_states(engine: Any, params: Any, xs: Any, states: Any) -> Call:
    if not hasattr(engine, "TanhNetwork"):
        return partial(_functions_with_states, engine, params, xs, states)
    network = engine.TanhNetwork(*params.Wx.shape)
    prepared = network.prepare(params)
    many = [(state,) for state in states]
    return lambda: network.forward_many(prepared, xs, many)


def _functions_with_states(engine: Any, params: Any, xs: Any, states: Any) -> Any:
    outputs = engine.rnn_forward_many(params, xs, states)
    tapes = [engine.Tape(*one) for one in zip(xs, states, outputs, strict=True)]
    return tapes, [tape.hs[:, -1].copy() for tape in tapes]


def _add_steps(engine: Any, cases: dict[str, Call], d: int, h: int) -> None:
    params = make_params(engine, d, h, "float32")
    rng = np.random.default_rng(5)
    xs, h0, dhs = (rng.normal(size=s).astype("f4") for s in ((1, 2, d), (1, h), (1, 2, h)))
    grads = engine.rnn_backward(params, engine.rnn_forward(params, xs, h0), dhs).grads
    size = f"D={d} H={h}"
    for kind in engine.OPTIMIZERS:
        moments = engine.init_moments(kind(), params)
        cases[f"{kind.__name__}, {size}"] = partial(
            engine.apply_update, kind(), params, grads, moments
        )
    cases[f"clipping, {size}"] = lambda: engine.clip_by_global_norm(grads, 1e-3)
    cases[f"sum of 3, {size}"] = lambda: engine.sum_grads([grads, grads, grads])
