"""The fault proxy as a process of its own, where the test's own interpreter is the bottleneck.

The parent writes one JSON command a line, the child answers each with its counts, and ends when
its standard input does, hence with its parent.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Self

from instruments.dialects import Dialect, GrpcDialect, RawDialect, RespDialect
from instruments.proxy import FaultProxy, Faults, Link

DIALECTS: dict[str, type[Dialect]] = {
    "raw": RawDialect,
    "resp": RespDialect,
    "grpc": GrpcDialect,
}


class ProxyProcess:
    """A `FaultProxy` in a child process, with the same names where it has them."""

    def __init__(self, upstream: str, *, dialect: str = "raw", seed: int = 0) -> None:
        """Start the child and wait until it listens.

        Args:
            upstream: `host:port` or `unix:/path`.
            dialect: A key of `DIALECTS`.
            seed: Decides every random draw.
        """
        root = Path(__file__).parents[1]
        command = [sys.executable, "-m", "instruments.proxy_process", upstream, dialect, str(seed)]
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(root)},
        )
        self.address = self._answer()["address"]

    def set(self, faults: Faults) -> None:
        """Let other faults hold from now on."""
        fields = dataclasses.asdict(faults)
        self._ask({"set": fields | {"only": sorted(faults.only)}})

    def drop_reply_after(self, requests: int = 0, *, count: int = 1) -> None:
        """Let `requests` more requests be, then lose the replies of the next `count`."""
        self._ask({"drop_reply_after": [requests, count]})

    def reset_all(self) -> None:
        """Reset the connections of the moment."""
        self._ask({"reset_all": True})

    def close_all(self) -> None:
        """Close the connections of the moment."""
        self._ask({"close_all": True})

    @property
    def counts(self) -> Counter[str]:
        """How often each thing happened."""
        return Counter(self._ask({}))

    def stop(self) -> None:
        """End the child and wait for it."""
        self._child.communicate()

    def __enter__(self) -> Self:
        """Give the running proxy."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(command) + "\n")
        self._child.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        answer: dict[str, Any] = json.loads(self._child.stdout.readline())
        return answer


def faults_from(fields: dict[str, Any]) -> Faults:
    """Read `Faults` from what `dataclasses.asdict` and JSON made of them."""
    links = {"up": Link(**fields["up"]), "down": Link(**fields["down"])}
    return Faults(**{**fields, **links, "only": frozenset(fields["only"])})


def _obey(proxy: FaultProxy, command: dict[str, Any]) -> None:
    if "set" in command:
        proxy.set(faults_from(command["set"]))
    if "drop_reply_after" in command:
        requests, count = command["drop_reply_after"]
        proxy.drop_reply_after(requests, count=count)
    if "reset_all" in command:
        proxy.reset_all()
    if "close_all" in command:
        proxy.close_all()


def _say(answer: object) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("upstream")
    parser.add_argument("dialect", choices=DIALECTS)
    parser.add_argument("seed", type=int)
    args = parser.parse_args()
    proxy = FaultProxy(args.upstream, dialect=DIALECTS[args.dialect], seed=args.seed)
    with proxy:
        _say({"address": proxy.address})
        for line in sys.stdin:
            _obey(proxy, json.loads(line))
            _say(proxy.counts)


if __name__ == "__main__":
    main()
