"""What a replica may take fits into its container: the kernel ends what takes more."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from service.cli.options import parse_bytes
from service.memory_bound import memory_bound_bytes
from service.settings import MIB, Settings


@pytest.fixture
def replica(request: pytest.FixtureRequest) -> tuple[dict[str, str], int]:
    """The variables of a replica, and the bytes that its container may use."""
    if request.param == "compose":
        service = request.getfixturevalue("compose")["services"]["timernn"]
        return service["environment"], bytes_of(service["mem_limit"])
    spec = request.getfixturevalue("kubernetes")["Deployment"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    variables = {each["name"]: each.get("value", "") for each in container["env"]}
    return variables, bytes_of(container["resources"]["limits"]["memory"])


def bytes_of(size: str) -> int:
    """Return a size as Compose or Kubernetes writes it, 2g or 2Gi."""
    return parse_bytes(size.rstrip("gGi")) * 1024 * MIB


@pytest.mark.parametrize("replica", ["compose", "kubernetes"], indirect=True)
def test_the_most_that_a_replica_takes_fits_into_its_container(
    replica: tuple[dict[str, str], int],
) -> None:
    """Full caches, a flood of requests with slow senders, and a step of the largest model, at once."""
    variables, there = replica
    settings = Settings()

    def setting(name: str, default: Any) -> int:
        return parse_bytes(variables.get(f"TIMERNN_{name.upper()}", str(default)))

    limits = {
        name: setting(f"limit_{name}", value) for name, value in asdict(settings.limits).items()
    }
    caches = 2 * setting("session_cache_bytes", settings.session_cache_bytes)
    caches += setting("weights_cache_bytes", settings.weights_cache_bytes)
    assert memory_bound_bytes(caches, limits) <= there
