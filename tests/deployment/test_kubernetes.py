"""The files for Kubernetes: valid, restricted, and patient."""

from __future__ import annotations

import json
from typing import Any

import pytest

from service.cli.options import LIMITS_HELP, SETTINGS_HELP
from service.metrics.families import FAMILIES, Kind

CUSTOM = "ServiceMonitor"  # its schema comes with the Prometheus operator


def container(kubernetes: dict[str, Any]) -> Any:
    """Return the container of the Deployment."""
    (found,) = kubernetes["Deployment"]["spec"]["template"]["spec"]["containers"]
    return found


@pytest.mark.parametrize("version", ["1.29", "1.33"])
def test_the_files_are_what_kubernetes_takes(kubernetes: dict[str, Any], version: str) -> None:
    """By its own schemas, unknown fields refused."""
    validate = pytest.importorskip("kubernetes_validate", reason="`make operate` installs it")
    for kind, document in kubernetes.items():
        if kind != CUSTOM:
            validate.validate(document, version, strict=True)


def test_the_pod_is_restricted(kubernetes: dict[str, Any]) -> None:
    """All that the pod security standard `restricted` asks for, and a root that cannot be written."""
    pod = kubernetes["Deployment"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert container(kubernetes)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert all({"secret", "emptyDir"} & set(volume) for volume in pod["volumes"])


def test_the_grace_period_is_longer_than_the_drain(kubernetes: dict[str, Any]) -> None:
    """The time before SIGTERM counts too."""
    pod, values = kubernetes["Deployment"]["spec"]["template"]["spec"], variables(kubernetes)
    before_s = float(container(kubernetes)["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > before_s + float(values["TIMERNN_DRAIN_S"])


def test_a_store_that_is_down_restarts_no_pod(kubernetes: dict[str, Any]) -> None:
    """Liveness asks for the process, readiness for the store too, both on the health port."""
    found = container(kubernetes)
    port = int(variables(kubernetes)["TIMERNN_HEALTH_LISTEN"].rpartition(":")[2])
    assert found["livenessProbe"]["grpc"] == {"port": port, "service": "liveness"}
    assert found["startupProbe"]["grpc"] == {"port": port, "service": "liveness"}
    assert found["readinessProbe"]["grpc"] == {"port": port}


def test_each_variable_is_an_option(kubernetes: dict[str, Any]) -> None:
    """A misspelt one would be ignored."""
    known = {*SETTINGS_HELP, *(f"limit_{name}" for name in LIMITS_HELP)}
    assert {name.removeprefix("TIMERNN_").lower() for name in variables(kubernetes)} <= known


def test_no_password_stands_in_a_variable(kubernetes: dict[str, Any]) -> None:
    """It is mounted as a file; the URL comes from a secret as well."""
    assert "value" not in env(kubernetes)["TIMERNN_REDIS_URL"]
    assert variables(kubernetes)["TIMERNN_REDIS_PASSWORD_FILE"].startswith("/etc/timernn/store/")
    assert "redis://:" not in json.dumps(kubernetes)


def test_the_autoscaler_follows_a_gauge_of_load(kubernetes: dict[str, Any]) -> None:
    """The metric exists, and at least two replicas run."""
    spec = kubernetes["HorizontalPodAutoscaler"]["spec"]
    (metric,) = spec["metrics"]
    assert FAMILIES[metric["pods"]["metric"]["name"]].kind is Kind.GAUGE
    assert spec["minReplicas"] >= 2
    assert "replicas" not in kubernetes["Deployment"]["spec"]


def test_a_client_sees_each_replica(kubernetes: dict[str, Any]) -> None:
    """The Service is headless, and all selectors are the pods' labels."""
    labels = kubernetes["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert kubernetes["Service"]["spec"]["clusterIP"] == "None"
    assert kubernetes["Service"]["spec"]["selector"] == labels
    for kind, place in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        assert kubernetes[kind]["spec"][place] == {"matchLabels": labels}


def test_prometheus_finds_the_metrics_port_and_logs_in(kubernetes: dict[str, Any]) -> None:
    """By the Service's labels and the name of its port, over TLS and with a token from a secret."""
    (endpoint,) = kubernetes[CUSTOM]["spec"]["endpoints"]
    service = kubernetes["Service"]
    labels = service["metadata"]["labels"].items()
    assert kubernetes[CUSTOM]["spec"]["selector"]["matchLabels"].items() <= labels
    assert endpoint["port"] in {each["name"] for each in service["spec"]["ports"]}
    assert endpoint["scheme"] == "https"
    assert {"name", "key"} == set(endpoint["authorization"]["credentials"])


def test_the_network_policy_opens_the_ports_that_are_served(kubernetes: dict[str, Any]) -> None:
    """Each port of the Service to somebody, never to everybody, and nothing beside them."""
    spec = kubernetes["NetworkPolicy"]["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert all(rule["from"] and rule["ports"] for rule in spec["ingress"])
    assert all(rule["to"] and rule["ports"] for rule in spec["egress"])
    opened = {port["port"] for rule in spec["ingress"] for port in rule["ports"]}
    assert opened == {each["port"] for each in kubernetes["Service"]["spec"]["ports"]}


def test_ports_have_the_names_by_which_they_are_meant(kubernetes: dict[str, Any]) -> None:
    """A Service's target is a port of the container, at the number that the variables give it."""
    numbers = {each["name"]: each["containerPort"] for each in container(kubernetes)["ports"]}
    for port in kubernetes["Service"]["spec"]["ports"]:
        assert numbers[port["targetPort"]] == port["port"]
    listens = {"grpc": "LISTEN", "health": "HEALTH_LISTEN", "metrics": "METRICS_LISTEN"}
    found = variables(kubernetes)
    for name, number in numbers.items():
        assert found[f"TIMERNN_{listens[name]}"].endswith(f":{number}")


def test_an_update_takes_no_replica_before_another_is_ready(kubernetes: dict[str, Any]) -> None:
    """Nor does a node that is drained take more than one."""
    strategy = kubernetes["Deployment"]["spec"]["strategy"]["rollingUpdate"]
    assert (strategy["maxUnavailable"], strategy["maxSurge"]) == (0, 1)
    assert kubernetes["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1


def env(kubernetes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the container's variables as they are declared."""
    return {each["name"]: each for each in container(kubernetes)["env"]}


def variables(kubernetes: dict[str, Any]) -> dict[str, str]:
    """Return the values of the variables; empty where a secret has it."""
    return {name: each.get("value", "") for name, each in env(kubernetes).items()}
