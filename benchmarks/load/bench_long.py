"""What changes with time and with the number of sessions: growth and soak."""

from benchmarks.load.bench_rates import OURS
from benchmarks.load.lab import Lab
from benchmarks.load.processes import Child
from benchmarks.load.rows import Bar, Row, compare
from benchmarks.load.workload import SMALL

FEW_SESSIONS = 1_000
MANY_SESSIONS = {False: 20_000, True: 1_000_000}
OPENED_AT_ONCE = 20_000
ROUNDS = 2
STREAMS = 16

SOAK_SECONDS = {False: 60, True: 600}
SOAK_SLICES = 10
SOAK_SHARE = 0.8


def growth(lab: Lab) -> list[Row]:
    """Compare latency among many live sessions with latency among few, and weigh a session."""
    many = MANY_SESSIONS[lab.plan.is_long]
    client = lab.client(OURS)
    fill_sessions(lab, client, FEW_SESSIONS)
    before = {mode: _latencies(lab, client, mode, FEW_SESSIONS) for mode in ("stream", "roam")}
    session_bytes = weigh_sessions(lab, client, FEW_SESSIONS, many)
    after = {mode: _latencies(lab, client, mode, many) for mode in ("stream", "roam")}
    limit = 1.5 * 2 * 4 * SMALL.hidden + 200
    span = f"{FEW_SESSIONS:,} → {many:,} sessions"
    at_most = Bar(1.15, at_most=True)
    return [
        compare(f"{span}: p50, {STREAMS} of them", "µs", after["stream"], before["stream"], at_most),
        compare(f"{span}: p50, any of them", "µs", after["roam"], before["roam"], at_most),
        compare(
            f"{span}: store bytes a session / (1.5 states + 200)", "bytes", [session_bytes], [limit],
            Bar(1.0, at_most=True),
        ),
    ]  # fmt: skip


def fill_sessions(lab: Lab, client: Child, count: int) -> None:
    """Open sessions up to a number and send each two chunks, so that its record is complete.

    A client that acknowledges what it got leaves the state before its last chunk and the one after.
    """
    lab.prepare(client, mode="open", sessions=count)
    lab.prepare(client, mode="touch", sessions=count, rounds=ROUNDS)


def weigh_sessions(lab: Lab, client: Child, few: int, many: int) -> float:
    """Return what a session costs the store in bytes altogether, where `few` are filled already."""
    bytes_before = _store_bytes(lab)
    for count in range(few, many, OPENED_AT_ONCE):
        lab.prepare(client, mode="open", sessions=count)
    fill_sessions(lab, client, many)
    return (_store_bytes(lab) - bytes_before) / (many - few)


def _latencies(lab: Lab, client: Child, mode: str, count: int) -> list[float]:
    order = {"mode": mode, "sessions": STREAMS if mode == "stream" else count, "streams": STREAMS}
    title = f"{mode}, {STREAMS} streams, {count:,} live sessions"
    samples = lab.take_turns(title, {OURS: (client, order)})
    return samples[OURS].values("p50_us")


def _store_bytes(lab: Lab) -> int:
    with lab.store.client() as store:
        return int(store.info("memory")["used_memory"])


def soak(lab: Lab) -> list[Row]:
    """Run at 80 % of full load and compare the end with the beginning: memory and p99.

    Full load comes first: what it warms up is no leak.
    """
    client, server = lab.client(OURS), lab.server(OURS)
    order = {"mode": "stream", "sessions": STREAMS}
    full = lab.measure("soak, full load", OURS, client, **order)["rate"]
    paced = {
        "mode": "paced",
        "sessions": STREAMS,
        "rate": SOAK_SHARE * full,
        "seconds": SOAK_SECONDS[lab.plan.is_long] / SOAK_SLICES,
    }
    resident, tails = [], []
    for _ in range(SOAK_SLICES):
        tails.append(lab.measure("soak, 80 % load", OURS, client, **paced)["p99_us"])
        resident.append(server.resident_bytes() / 2**20)
    span = f"soak {SOAK_SECONDS[lab.plan.is_long]} s"
    return [
        compare(f"{span}: memory, last / first tenth", "MiB", resident[-1:], resident[:1],
                Bar(1.02, at_most=True)),
        compare(f"{span}: p99, last / first tenth", "µs", tails[-1:], tails[:1],
                Bar(1.2, at_most=True)),
    ]  # fmt: skip
