"""Two servers never share an address, in whichever order and form they are started."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from instruments.processes import ServiceProcess, wait_until

WILDCARD = "0.0.0.0"  # noqa: S104 - refused before anybody could connect
WORKERS = ("--workers", "2")


def start_another(listen: str, store_url: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Start a server that is expected to refuse; return what it said."""
    program = str(Path(sys.executable).with_name("timernn"))
    command = [program, "serve", "--listen", listen, "--redis-url", store_url, "--insecure"]
    command += options
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("first", [(), WORKERS], ids=["one process", "workers"])
@pytest.mark.parametrize("second", [(), WORKERS], ids=["then one process", "then workers"])
def test_a_second_server_on_a_port_is_refused(
    store_url: str, first: tuple[str, ...], second: tuple[str, ...]
) -> None:
    """One line, exit code 1, and no connection that reaches it."""
    with ServiceProcess(store_url, *first) as running:
        # With a wildcard it would take the connections of every address.
        listen = running.address.replace("127.0.0.1", WILDCARD) if second else running.address
        refused = start_another(listen, store_url, *second)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert f"timernn: cannot listen on {listen}: Address already in use" in refused.stderr


def test_a_port_is_free_after_its_workers_were_killed(store_url: str) -> None:
    """Nothing that a killed supervisor held outlives it."""
    with ServiceProcess(store_url, *WORKERS) as running:
        running.signal(signal.SIGKILL)
        running.wait()
        # Its workers read the end of their pipes and go.
        wait_until("the port to be free", lambda: _is_started(running))
        assert running.is_alive


def _is_started(process: ServiceProcess) -> bool:
    try:
        process.start()
    except RuntimeError:
        return False
    return True


def test_a_socket_that_is_listened_on_is_not_taken_over(store_url: str, tmp_path: Path) -> None:
    """A second server on the path is refused; what a killed one left there is no hindrance."""
    listen = f"unix:{tmp_path / 's'}"
    with ServiceProcess(store_url) as running:
        running.command[running.command.index("--listen") + 1] = listen
        running.terminate()
        ready = f"timernn ready on {listen}"
        running.wait_ready = lambda timeout_s=15.0: running.wait_for_line(ready, timeout_s)  # type: ignore[method-assign,assignment]
        running.start()
        refused = start_another(listen, store_url)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "Address already in use" in refused.stderr
        running.kill()
        running.start()
