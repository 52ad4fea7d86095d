"""The compose files: who is reached from where, and what each service is bounded by."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from service.store.permissions import COMMANDS, keys_for

if TYPE_CHECKING:
    from pathlib import Path

SERVICES = ("secrets", "store", "timernn", "balancer", "prometheus", "grafana")


def test_only_the_balancer_and_the_pages_have_ports_of_the_host(compose: dict[str, Any]) -> None:
    """Replicas and store are reached by nobody but their neighbours."""
    ports = {name: each["ports"] for name, each in compose["services"].items() if "ports" in each}
    assert set(ports) == {"balancer", "prometheus", "grafana"}
    hosts = {port.rsplit(":", 2)[0] for each in ports.values() for port in each}
    assert hosts == {"127.0.0.1", "${TIMERNN_BIND:-127.0.0.1}"}


def test_replicas_and_store_have_no_route_out(compose: dict[str, Any]) -> None:
    """Each of their networks is internal."""
    networks = compose["networks"]
    for name in ("timernn", "store"):
        used = compose["services"][name]["networks"]
        assert all(networks[each]["internal"] for each in used), name


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_bounded(compose: dict[str, Any], name: str) -> None:
    """An init, a bound on memory, processes and logs, no right, no change of its files."""
    service = compose["services"][name]
    assert service["init"]
    assert service["read_only"]
    assert service["pids_limit"] <= 256
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["logging"]["options"] == {"max-size": "10m", "max-file": "3"}
    assert service["mem_limit"]


def test_the_grace_period_is_longer_than_the_drain(compose: dict[str, Any]) -> None:
    """No call in flight is cut off by a kill."""
    service = compose["services"]["timernn"]
    notice_s = float(service["environment"]["TIMERNN_DRAIN_NOTICE_S"])
    assert float(service["stop_grace_period"].removesuffix("s")) > notice_s + 20


def test_no_secret_stands_in_a_file(docker: Path) -> None:
    """Passwords and tokens come from the volume; neither URLs nor variables hold one."""
    for path in docker.glob("compose*.yaml"):
        text = path.read_text()
        assert not re.search(r"redis://[^@\s]*:[^@\s]*@", text)
        assert not re.search(r"(PASSWORD|TOKEN)\w*: (?!/)", text)


def test_the_store_s_user_has_the_rights_that_the_service_needs(docker: Path) -> None:
    """Those of service.store.permissions, and PING for the health check."""
    line = next(
        line
        for line in (docker / "valkey/start.sh").read_text().splitlines()
        if line.startswith("user timernn ")
    )
    words = line.split()
    needed = set(keys_for(waits=False, beats=True))
    assert {word[1:] for word in words if word.startswith("~")} == needed
    assert {word[1:] for word in words if word.startswith("+")} == {*COMMANDS, "ping"}
    assert "-@all" in words


def test_with_tls_nothing_is_insecure(docker: Path) -> None:
    """The second file takes back what the first one allows."""
    changes = yaml.safe_load((docker / "compose.tls.yaml").read_text())["services"]
    variables = changes["timernn"]["environment"]
    assert variables["TIMERNN_INSECURE"] == "false"
    assert {"TIMERNN_TLS_CERT", "TIMERNN_TLS_KEY", "TIMERNN_TOKENS"} <= set(variables)


def test_mtls_changes_what_the_balancer_asks_of_clients_alone(docker: Path) -> None:
    """The marked lines, taken in, demand a certificate of the deployment's authority."""
    text = (docker / "envoy/envoy.tls.yaml").read_text()
    (before,) = _listeners(text)
    (after,) = _listeners(text.replace("#mtls ", ""))
    assert "require_client_certificate" not in before
    assert after.pop("require_client_certificate")
    authority = {"trusted_ca": {"filename": "/run/timernn/ca.crt"}}
    assert after["common_tls_context"].pop("validation_context") == authority
    assert after == before
    changes = yaml.safe_load((docker / "compose.mtls.yaml").read_text())["services"]
    assert set(changes) == {"balancer"}


def _listeners(text: str) -> list[dict[str, Any]]:
    """Return how each listener of an Envoy configuration speaks TLS."""
    listeners = yaml.safe_load(text)["static_resources"]["listeners"]
    return [
        chain["transport_socket"]["typed_config"]
        for listener in listeners
        for chain in listener["filter_chains"]
    ]
