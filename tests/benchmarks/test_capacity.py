"""The arithmetic of capacity, and the simulation that checks it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benchmarks.capacity import main
from benchmarks.load.costs import MAX_BATCH, Costs, Fleet, TripCosts, plan, trip_count
from benchmarks.load.fleet import simulate

if TYPE_CHECKING:
    from pathlib import Path

JOINED = TripCosts((1, 64), (60.0, 180.0), (40.0, 480.0))
APART = TripCosts((1, 64), (60.0, 500.0), (30.0, 800.0))
COSTS = Costs(
    lone_us=400.0,
    full_us=110.0,
    full_batch=40.0,
    joined=JOINED,
    apart=APART,
    session_bytes=1_000.0,
)
FLEET = Fleet(workers=12, masters=3)
MOST = FLEET.workers * COSTS.most(FLEET.seen)


def test_a_batch_costs_what_was_measured() -> None:
    """The line through both measurements gives them back."""
    assert COSTS.server_us(1) == pytest.approx(400.0)
    assert COSTS.server_us(40) == pytest.approx(40 * 110.0)


def test_one_master_gets_one_trip() -> None:
    """However large the batch."""
    assert trip_count(64, 1) == 1.0


def test_trips_are_the_distinct_masters_of_a_batch() -> None:
    """Three chunks on four masters, all 64 cases."""
    cases = np.stack(np.meshgrid(*[range(4)] * 3), axis=-1).reshape(-1, 3)
    distinct = [len(set(case)) for case in cases.tolist()]
    assert trip_count(3, 4) == pytest.approx(np.mean(distinct))


def test_an_idle_worker_computes_lone_chunks() -> None:
    """Nothing gathers, and it is busy for what a lone chunk costs."""
    point = COSTS.point(rate=1.0)
    assert point.batch == pytest.approx(1.0, rel=1e-3)
    assert point.busy == pytest.approx(400e-6, rel=1e-3)


def test_batches_grow_with_the_load() -> None:
    """The fuller a worker, the larger its batches and the cheaper a commit for the store."""
    points = [COSTS.point(rate) for rate in (500.0, 2_000.0, 5_000.0, 8_000.0)]
    assert [one.batch for one in points] == sorted(one.batch for one in points)
    assert [one.store_us for one in points] == sorted(
        (one.store_us for one in points), reverse=True
    )


def test_batches_are_a_distribution() -> None:
    """Probabilities of 1 to MAX_BATCH chunks, which the chain keeps."""
    state = COSTS.batches(6_000.0, masters=5)
    assert state.shape == (MAX_BATCH,)
    assert state.sum() == pytest.approx(1.0)
    assert state.min() >= 0


@pytest.mark.parametrize("routed", [False, True])
def test_a_plan_keeps_to_its_headroom(*, routed: bool) -> None:
    """Workers and masters are loaded to the share that was asked for; a worker less were too few."""
    fleet = plan(COSTS, 300_000.0, 0.6, routed=routed)
    most = COSTS.most(fleet.seen)
    assert (fleet.workers - 1) * most < 300_000.0 / 0.6 <= fleet.workers * most
    assert 0 < fleet.masters_busy(COSTS, 300_000.0) <= 0.6


def test_sending_sessions_by_slot_saves_workers_and_masters() -> None:
    """A round trip then carries all of a batch."""
    anywhere, by_slot = (plan(COSTS, 1e6, 0.6, routed=routed) for routed in (False, True))
    assert by_slot.workers < anywhere.workers
    assert by_slot.masters < anywhere.masters


def test_a_seed_gives_one_outcome() -> None:
    """The same twice, another with another seed."""
    one, same, other = (
        simulate(COSTS, FLEET, 0.5 * MOST, chunks=5_000, seed=seed) for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other


@pytest.mark.parametrize("load", [0.2, 0.6, 0.9])
def test_what_is_offered_is_answered_while_it_fits(load: float) -> None:
    """Neither more nor less, after the start."""
    seen = simulate(COSTS, FLEET, load * MOST, chunks=40_000)
    assert seen.rate == pytest.approx(load * MOST, rel=0.03)


def test_no_fleet_answers_more_than_it_can() -> None:
    """Twice what the workers can take: they are all busy, and that is all that comes out."""
    seen = simulate(COSTS, FLEET, 2 * MOST, chunks=80_000)
    assert seen.rate <= MOST * 1.01
    assert seen.rate >= MOST * 0.95
    assert seen.workers_busy == pytest.approx(1.0, abs=0.01)


def test_a_full_master_bounds_the_fleet() -> None:
    """One store that takes fewer chunks than the workers send."""
    fleet = Fleet(workers=40, masters=1)
    store = 1e6 / (APART.store(MAX_BATCH) / MAX_BATCH)
    assert store < 40 * COSTS.most(1)
    seen = simulate(COSTS, fleet, 40 * COSTS.most(1), chunks=80_000)
    assert seen.masters_busy == pytest.approx(1.0, abs=0.01)
    assert seen.rate <= store * 1.01


@pytest.mark.parametrize("fleet", [FLEET, Fleet(12, 3, routed=True), Fleet(4, 0)])
def test_littles_law_holds(fleet: Fleet) -> None:
    """Chunks in flight are rate times latency, counted apart."""
    rate = 0.6 * fleet.workers * COSTS.most(fleet.seen)
    seen = simulate(COSTS, fleet, rate, chunks=60_000)
    assert seen.in_flight == pytest.approx(seen.rate * seen.mean_us / 1e6, rel=0.05)


@pytest.mark.parametrize("load", [0.3, 0.6])
@pytest.mark.parametrize("masters", [0, 3, 12])
def test_the_arithmetic_tells_what_is_seen(masters: int, load: float) -> None:
    """Batches and how busy workers and masters are, chunk by chunk as by the chain."""
    fleet = Fleet(12, masters)
    rate = load * fleet.workers * COSTS.most(fleet.seen)
    seen = simulate(COSTS, fleet, rate, chunks=60_000)
    point = COSTS.point(rate / fleet.workers, fleet.seen)
    assert seen.batch == pytest.approx(point.batch, rel=0.05)
    assert seen.workers_busy == pytest.approx(point.busy, rel=0.03)
    assert seen.masters_busy == pytest.approx(fleet.masters_busy(COSTS, rate), rel=0.05)


def measured() -> dict[str, Any]:
    """What a run of benchmarks.where leaves behind, in small."""
    figures = {"rate": 1e3, "server_us": 400.0, "client_us": 100.0, "store_us": 50.0, "batch": 1.0}
    busy = figures | {"server_us": 100.0, "batch": 32.0}
    scenarios = {"stream-64": busy, "frames-64": busy, "unary-16": busy, "stream-1": figures}
    trips = [
        {"joined": joined, "per_trip": size, "server_us": 60.0 / size, "store_us": 40.0 / size}
        for joined in (True, False)
        for size in (1, 64)
    ]
    return {
        "machine": {"processor": "a", "cores": 2, "python": "3", "packages": {}, "store": "s"},
        "command": "measure",
        "processes": [
            {"scenario": name, "server": "timernn", "results": [one]}
            for name, one in scenarios.items()
        ],
        "trips": trips,
        "session_bytes": 1024.0,
    }


def test_the_command_prints_what_the_target_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plan for the target, with the sessions that a GiB holds."""
    where, service = tmp_path / "where.json", tmp_path / "service.json"
    where.write_text(json.dumps(measured()))
    service.write_text(json.dumps({"measurements": [], "results": []}))
    assert main(["--target", "20000", "--where", str(where), "--service", str(service)]) == 0
    printed = capsys.readouterr().out
    assert "| 20,000 " in printed
    assert "1,048,576 sessions of 1,024 bytes" in printed


def test_the_command_says_what_has_to_run_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without figures there is nothing to reckon with."""
    assert main(["--where", str(tmp_path / "where.json")]) == 2
    assert "run python -m benchmarks" in capsys.readouterr().err
