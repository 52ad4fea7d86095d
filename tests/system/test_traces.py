"""A server as a process that sends its traces by OTLP."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from instruments.processes import ServiceProcess, wait_until
from timernn.v1.model_service_pb2 import CreateModelRequest, ModelSpec
from timernn.v1.model_service_pb2_grpc import ModelServiceStub

if TYPE_CHECKING:
    import pytest


def test_spans_reach_a_collector(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call with its round trips, under the name of the service, the last ones at the end."""
    received: list[Any] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Keep quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{collector.server_port}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        with ServiceProcess(store_url, "--traces") as process:
            with grpc.insecure_channel(process.address) as channel:
                stub: Any = ModelServiceStub(channel)
                spec = ModelSpec(model_id="traced", input_size=2, hidden_size=3)
                stub.CreateModel(CreateModelRequest(spec=spec), timeout=30)
            assert process.terminate() == 0
        wait_until("the spans", lambda: bool(received))
        collector.shutdown()
    (resource,) = {each.SerializeToString(): each for each in _resources(received)}.values()
    names = {each.key: each.value.string_value for each in resource.attributes}
    assert names["service.name"] == "timernn"
    spans = [span for request in received for span in _spans(request)]
    (call,) = [span for span in spans if span.name == "timernn.v1.ModelService/CreateModel"]
    children = [span.name for span in spans if span.parent_span_id == call.span_id]
    assert "create_model" in children


def _resources(requests: list[Any]) -> list[Any]:
    return [each.resource for request in requests for each in request.resource_spans]


def _spans(request: Any) -> list[Any]:
    return [
        span
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
