"""The files of a deployment, parsed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

DOCKER = Path(__file__).resolve().parents[2] / "docker"


def read(name: str) -> list[dict[str, Any]]:
    """Return the documents of a YAML file below docker/."""
    return [*yaml.safe_load_all((DOCKER / name).read_text())]


@pytest.fixture(scope="session")
def docker() -> Path:
    """The folder of the deployment's files."""
    return DOCKER


@pytest.fixture(scope="session")
def compose() -> dict[str, Any]:
    """The plain compose file."""
    return read("compose.yaml")[0]


@pytest.fixture(scope="session")
def kubernetes() -> dict[str, dict[str, Any]]:
    """What is deployed on Kubernetes, by kind."""
    documents = [*read("kubernetes/timernn.yaml"), *read("kubernetes/servicemonitor.yaml")]
    return {document["kind"]: document for document in documents}


@pytest.fixture(scope="session")
def alerts() -> dict[str, str]:
    """The expressions of the alert rules, by name."""
    groups = read("prometheus/alerts.yml")[0]["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}
