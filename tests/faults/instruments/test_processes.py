import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from instruments.processes import Child, ServiceProcess, free_port, wait_until

READY = "print('ready', flush=True); input"
SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
ORPHAN = """
import os, signal, sys
from instruments.processes import Child
child = Child([sys.executable, "-c", "import time; time.sleep(600)"]).start()
print(child.pid, child.dir, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def is_running(pid: int) -> bool:
    """Return whether a process runs, zombies not counted."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


def test_a_child_is_killed_and_starts_again() -> None:
    """A killed child reports its signal; its log starts again with the next process."""
    with Child(SLEEP) as child:
        first = child.pid
        child.wait_for_line("up")
        child.kill()
        assert child.wait() == -signal.SIGKILL
        child.start()
        child.wait_for_line("up")
        assert child.log.count("up") == 1
        assert child.pid != first


def test_a_paused_child_is_alive_and_does_nothing() -> None:
    """SIGSTOP leaves the process in state T until SIGCONT."""
    with Child(SLEEP) as child:
        child.wait_for_line("up")
        stat = Path(f"/proc/{child.pid}/stat")
        child.pause()
        wait_until("the stop", lambda: ") T " in stat.read_text())
        assert child.is_alive
        child.resume()
        wait_until("the start", lambda: ") T " not in stat.read_text())


def test_terminate_returns_the_exit_code() -> None:
    """A child that handles SIGTERM says how it ended."""
    code = (
        "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7));"
        "print('up', flush=True); signal.pause()"
    )
    with Child([sys.executable, "-c", code]) as child:
        child.wait_for_line("up")
        assert child.terminate() == 7


def test_close_takes_grandchildren_and_the_directory() -> None:
    """Nothing of a killed child's family is left after close."""
    code = (
        "import subprocess, sys, time;"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        "print('has', p.pid, flush=True); time.sleep(600)"
    )
    child = Child([sys.executable, "-c", code]).start()
    grandchild = int(child.wait_for_line(r"has (\d+)")[1])
    child.kill()
    assert is_running(grandchild)
    child.close()
    wait_until("the grandchild's end", lambda: not is_running(grandchild))
    assert not child.dir.exists()


def test_a_child_that_dies_early_is_reported_with_its_log() -> None:
    """Waiting for a line of a dead process fails at once and shows why it died."""
    with (
        Child([sys.executable, "-c", "raise SystemExit('bad flag')"]) as child,
        pytest.raises(RuntimeError, match="bad flag"),
    ):
        child.wait_for_line("up")


def test_nothing_outlives_a_killed_test_run() -> None:
    """The reaper ends the children of a process that was killed without a chance to clean up."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, "-c", ORPHAN], env=env, capture_output=True, text=True, check=False
    )
    pid, directory = run.stdout.split()
    wait_until("the reaper", lambda: not is_running(int(pid)) and not Path(directory).exists())


def test_wait_until_gives_up_in_time() -> None:
    """What never happens is named in the error."""
    with pytest.raises(TimeoutError, match="godot"):
        wait_until("godot", lambda: False, timeout_s=0.03)


def test_memory_of_a_child_is_read() -> None:
    """A Python process takes at least a megabyte."""
    with Child(SLEEP) as child:
        child.wait_for_line("up")
        assert child.rss_bytes() > 1 << 20


def test_free_ports_can_be_bound() -> None:
    """Ten ports in a row are free and below the kernel's own range."""
    assert all(15000 <= free_port() < 32000 for _ in range(10))


def test_a_replica_is_ready_when_it_says_so() -> None:
    """The ready line names the address that was asked for."""
    replica = ServiceProcess("redis://127.0.0.1:1", env={"EXTRA": "seen"})
    assert replica.command[1:3] == ["serve", "--listen"]
    code = "import os, time; print('timernn ready on', os.environ['AT'], flush=True)"
    replica.command = [sys.executable, "-c", code + "; time.sleep(600)"]
    replica.env["AT"] = replica.address
    with replica:
        assert replica.is_alive
