"""What a chunk costs each process: the server, its client and the store."""

import psutil

from benchmarks.load.bench_rates import OURS, Scenario
from benchmarks.load.lab import Lab
from benchmarks.load.processes import Child, processor_s

WARM_UP_S = 0.5


def weigh(
    lab: Lab, scenario: Scenario, name: str, *, server: Child, client: Child, of: str = OURS
) -> dict[str, float]:
    """Measure once.

    Args:
        lab: Of the processes.
        scenario: What the client does.
        name: Of the measurement, for the log.
        server: The server.
        client: Its client.
        of: Whose server it is, if the scenario asks it otherwise than ours.

    Returns:
        rate (chunks/s), server_us, server_system_us, client_us, store_us (microseconds of processor time
        a chunk) and batch (chunks a commit).
    """
    pids = {"server": server.process.pid, "client": client.process.pid, "store": lab.store.pid}
    order = scenario.peer_orders.get(of, scenario.order)
    # Opening and warming up must not be measured, and the divisor must be all chunks that were measured.
    lab.measure("warm-up", name, client, **order, seconds=WARM_UP_S, warmup_s=0)
    before, kernel_s = _processor_s(pids), psutil.Process(pids["server"]).cpu_times().system
    calls = _script_calls(lab)
    result = lab.measure(scenario.title, name, client, **order, warmup_s=0)
    calls = _script_calls(lab) - calls
    after = _processor_s(pids)
    kernel_s = psutil.Process(pids["server"]).cpu_times().system - kernel_s
    # Beyond the rate: of each session what was under way at the deadline.
    chunks = result["rate"] * lab.plan.seconds + order["sessions"] * order.get("in_flight", 1)
    return {
        "rate": result["rate"],
        **{f"{each}_us": 1e6 * (after[each] - before[each]) / chunks for each in pids},
        "server_system_us": 1e6 * kernel_s / chunks,
        "batch": chunks / calls if calls else 0.0,
    }


def _processor_s(pids: dict[str, int]) -> dict[str, float]:
    return {name: processor_s(pid) for name, pid in pids.items()}


def _script_calls(lab: Lab) -> int:
    with lab.store.client() as store:
        return int(store.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"])
