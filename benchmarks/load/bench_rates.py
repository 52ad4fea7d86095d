"""Chunks a second and latency against the peers, one scenario at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.load.lab import Lab, Samples
from benchmarks.load.rows import Bar, Row, compare

OURS = "timernn"


@dataclass(frozen=True)
class Versus:
    """One comparison of a scenario.

    Attributes:
        peer: The server we are compared with.
        bar: What the ratio of rates must reach.
        latency_bar: What the ratio of p50 to (peer's p50 + one store round trip's p50) must reach.
    """

    peer: str
    bar: Bar | None = None
    latency_bar: Bar | None = None


@dataclass(frozen=True)
class Scenario:
    """One way of sending, the same for all servers.

    Attributes:
        title: For the tables.
        order: For the clients.
        against: Who takes part beside us.
        peer_orders: Where a peer is asked otherwise: it has no such way of sending.
    """

    title: str
    order: dict[str, Any]
    against: Sequence[Versus]
    peer_orders: dict[str, dict[str, Any]]


def _scenario(
    title: str,
    mode: str,
    sessions: int,
    *against: Versus,
    peer_orders: dict[str, dict[str, Any]] | None = None,
    **more: int,
) -> Scenario:
    order = {"mode": mode, "sessions": sessions, **more}
    return Scenario(title, order, against, peer_orders or {})


_MLSERVER_UNARY = {"mlserver": {"mode": "unary", "sessions": 64}}

SCENARIOS = {
    "stream-1": _scenario(
        "stream, 1 session", "stream", 1,
        Versus("echo", latency_bar=Bar(1.4, at_most=True)), Versus("afternoon", Bar(1.3)),
    ),
    "stream-16": _scenario(
        "stream, 16 sessions", "stream", 16, Versus("echo"), Versus("afternoon", Bar(3.0)),
    ),
    "stream-64": _scenario(
        "stream, 64 sessions", "stream", 64,
        Versus("echo", Bar(0.70)), Versus("afternoon", Bar(3.0)), Versus("mlserver", Bar(6.0)),
        peer_orders=_MLSERVER_UNARY,
    ),
    "pipelined-64": _scenario(
        "stream, 64 sessions, 4 chunks in flight each", "stream", 64,
        Versus("echo"), Versus("afternoon"), in_flight=4,
    ),
    "multiplexed-64": _scenario(
        "one stream for 64 sessions", "stream", 64,
        Versus("echo"), Versus("afternoon"), streams=1,
    ),
    "frames-64": _scenario(
        "4 frames of 64 sessions each", "frames", 256, Versus("echo", Bar(1.5)),
        peer_orders={"echo": {"mode": "stream", "sessions": 64}},
    ),
    "unary-1": _scenario(
        "unary, 1 client", "unary", 1,
        Versus("echo", latency_bar=Bar(1.4, at_most=True)), Versus("afternoon", Bar(1.3)),
    ),
    "unary-16": _scenario(
        "unary, 16 clients", "unary", 16,
        Versus("echo", Bar(0.75)), Versus("afternoon", Bar(1.8)), Versus("mlserver", Bar(2.3)),
    ),
    "unary-64": _scenario(
        "unary, 64 clients", "unary", 64,
        Versus("echo", Bar(0.75)), Versus("afternoon", Bar(1.8)), Versus("mlserver", Bar(2.3)),
    ),
}  # fmt: skip


# The bar of the first version: a slow design shows when client, server and store share one core.
ONE_CORE_SCENARIOS = {
    "one-core-stream": _scenario(
        "on one core: stream, 16 sessions", "stream", 16, Versus("afternoon", Bar(1.0)),
    ),
    "one-core-unary": _scenario(
        "on one core: unary, 16 clients", "unary", 16, Versus("afternoon"),
    ),
}  # fmt: skip


def run_scenario(lab: Lab, scenario: Scenario, *, with_ours: bool = True) -> list[Row]:
    """Measure one scenario: we and its peers take turns.

    Args:
        lab: Where.
        scenario: What.
        with_ours: False measures the peers alone, and compares nothing.
    """
    peers = [versus.peer for versus in scenario.against]
    if lab.mlserver is None:
        peers = [peer for peer in peers if peer != "mlserver"]
    servers = [OURS, *peers] if with_ours else peers
    measurements = {
        name: (lab.client(name), scenario.peer_orders.get(name, scenario.order)) for name in servers
    }
    if any(versus.latency_bar for versus in scenario.against):
        measurements["redis"] = (lab.client("redis"), {"mode": "unary", "sessions": 1})
    samples = lab.take_turns(scenario.title, measurements)
    if not with_ours:
        return []
    return [
        row
        for versus in scenario.against
        if versus.peer in samples
        for row in _rows(scenario, samples, versus)
    ]


def _rows(scenario: Scenario, samples: dict[str, Samples], versus: Versus) -> list[Row]:
    ours, peer = samples[OURS], samples[versus.peer]
    name = f"{scenario.title} / {versus.peer}"
    if versus.peer in scenario.peer_orders:
        name += f" {scenario.peer_orders[versus.peer]['mode']}"
    rows = [compare(name, "chunks/s", ours.values("rate"), peer.values("rate"), versus.bar)]
    if versus.latency_bar:
        roundtrip = samples["redis"].values("p50_us")
        limit = [a + b for a, b in zip(peer.values("p50_us"), roundtrip, strict=True)]
        name = f"{scenario.title}, p50 / {versus.peer} + one store round trip"
        rows.append(compare(name, "µs", ours.values("p50_us"), limit, versus.latency_bar))
    return rows
