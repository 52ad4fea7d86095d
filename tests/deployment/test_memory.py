"""What a replica may take fits into its container: the kernel ends what takes more."""

from __future__ import annotations

from typing import Any

import pytest

from service.cli.options import parse_bytes
from service.settings import MIB, Settings

# Of docs/operations.md, "Limits".
PROCESS_BYTES = 100 * MIB
WINDOW_BYTES = MIB // 2  # what the client of a call that waits may send unasked
COPIES = 8  # messages that are parsed, computed and encoded at the moment
STEP = 10  # times the weights of the model that is stepped


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

    def limit(name: str) -> int:
        return setting(f"limit_{name}", getattr(settings.limits, name))

    caches = 2 * setting("session_cache_bytes", settings.session_cache_bytes)
    caches += setting("weights_cache_bytes", settings.weights_cache_bytes)
    requests = limit("request_bytes_in_flight") * 3 // 2
    requests += limit("operations_in_flight") * WINDOW_BYTES + COPIES * limit("message_bytes")
    assert PROCESS_BYTES + caches + requests + STEP * limit("weights_bytes") <= there
