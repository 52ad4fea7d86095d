"""The alert rules and the dashboard: of metrics that exist, and answered by a real Prometheus."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml

import timernn
from instruments.processes import Child, ServiceProcess, free_port, wait_until
from service.metrics.families import FAMILIES, Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="prometheus is not installed (`make operate` does)",
)
# Without TLS and without tokens there is nothing to show.
MAY_BE_EMPTY = {"Days until the certificate ends", "Logins"}
# Suffixes that Prometheus gives to the series of a histogram.
SERIES = {"_bucket": {"le"}, "_sum": set(), "_count": set()}
ADDED = {"instance", "job"}


@pytest.fixture(scope="session")
def panels(docker: Path) -> list[tuple[str, str]]:
    """Title and expression of each query of the dashboard."""
    dashboard = json.loads((docker / "grafana/timernn.json").read_text())
    return [
        (panel["title"], target["expr"])
        for panel in dashboard["panels"]
        for target in panel["targets"]
    ]


def labels_of(name: str) -> set[str]:
    """Return the labels of a series; fail if there is no such metric."""
    for suffix, added in SERIES.items():
        family = FAMILIES.get(name.removesuffix(suffix))
        if name.endswith(suffix) and family is not None and family.kind is Kind.HISTOGRAM:
            return set(family.labels) | added
    assert name in FAMILIES, name
    assert FAMILIES[name].kind is not Kind.HISTOGRAM, name
    return set(FAMILIES[name].labels)


def test_each_query_names_metrics_and_labels_that_exist(
    panels: list[tuple[str, str]], alerts: dict[str, str]
) -> None:
    """A renamed metric would leave a panel empty and an alert silent."""
    for where, expression in [*panels, *alerts.items()]:
        names = re.findall(r"\b(?:timernn|grpc)_\w+(?=[\[{ )]|$)", expression)
        names = [name for name in names if name != "grpc_code"]
        known: set[str] = set().union(*map(labels_of, names)) | ADDED
        used = {
            label.strip()
            for group in re.findall(r"by \(([^)]*)\)", expression)
            for label in group.split(",")
        }
        used |= set(re.findall(r"(\w+)=~?\"", expression))
        assert names or "up{" in expression, where
        assert used <= known, where


@needs_prometheus
def test_the_rules_are_well_formed(docker: Path) -> None:
    """By Prometheus' own tool."""
    command = ["promtool", "check", "rules", str(docker / "prometheus/alerts.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def prometheus(store_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus that reads a server in use."""
    folder = tmp_path_factory.mktemp("prometheus")
    metrics = f"127.0.0.1:{free_port()}"
    scrape = {"job_name": "timernn", "static_configs": [{"targets": [metrics]}]}
    config = {"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [
        *("prometheus", f"--config.file={folder}/prometheus.yml"),
        *(f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}"),
    ]
    with (
        ServiceProcess(store_url, "--metrics-listen", metrics) as server,
        Child(command, name="prometheus"),
    ):
        use(server.address)
        wait_until("it has read the server", lambda: ask(address, "up == 1"))
        use(server.address)
        applied = "rate(timernn_chunks_applied_total[1m]) > 0 and timernn_sessions > 0"
        wait_until("it has read the server again", lambda: ask(address, applied))
        yield address


def use(address: str) -> None:
    """Train a step, and ask for what is not there."""
    with timernn.connect(address) as client:
        client.create_model("seen", input_size=2, hidden_size=3, exist_ok=True)
        with client.session("seen", train=True) as session:
            outputs = session.forward(np.ones((1, 4, 2)))
            session.backward(outputs)
            session.update()
        with pytest.raises(timernn.Error):
            client.get_weights("unseen")
        client.session("seen").forward(np.ones((1, 4, 2)))  # it stays open


def ask(address: str, expression: str) -> Any:
    """Return what a query finds."""
    query = urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(f"http://{address}/api/v1/query?{query}", timeout=30) as response:
        answer = json.load(response)
    assert answer["status"] == "success", answer
    return answer["data"]["result"]


@needs_prometheus
def test_each_panel_shows_something(prometheus: str, panels: list[tuple[str, str]]) -> None:
    """For a server that trains, with Grafana's interval filled in."""
    empty = {
        title
        for title, expression in panels
        if not ask(prometheus, expression.replace("$__rate_interval", "1m"))
    }
    assert empty <= MAY_BE_EMPTY


@needs_prometheus
def test_no_alert_is_raised_by_a_healthy_server(prometheus: str, alerts: dict[str, str]) -> None:
    """Each expression can be evaluated, and none of them finds anything; but start and load take time."""
    raised = {name for name, expression in alerts.items() if ask(prometheus, expression)}
    assert raised <= {"TimernnSlowOperations", "TimernnSlowStore", "TimernnBusyEventLoop"}


@needs_prometheus
def test_a_replica_that_is_gone_raises_an_alert(prometheus: str, alerts: dict[str, str]) -> None:
    """The expression finds a server that stopped answering, once the condition is turned round."""
    assert ask(prometheus, alerts["TimernnReplicaDown"].replace("== 0", "== 1"))
    assert ask(prometheus, alerts["TimernnNoReplica"].replace("== 1", "== 7"))


def test_each_alert_stands_in_the_docs(alerts: dict[str, str]) -> None:
    """With what to do about it."""
    text = (Path(__file__).resolve().parents[2] / "docs/deployment.md").read_text()
    assert {name for name in alerts if f"`{name}`" not in text} == set()
