# SPDX-License-Identifier: Apache-2.0
"""One trace a launch: what each service did for it, under the launch's id, as a collector receives it."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from support import lazy

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

ARRIVE_SECONDS = 30.0
"""Services send their steps in batches, every five seconds unless told otherwise."""


class Collector:
    """What an OTLP collector was sent: (service, step) pairs."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, Any]] = []
        self.address = ""

    def of(self, launch: str) -> list[tuple[str, Any]]:
        """The steps of one trace."""
        return [(service, step) for service, step in self.steps if step.trace_id.hex() == launch]


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a port of 127.0.0.1 that speaks OTLP over HTTP."""
    collector = Collector()

    class Door(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                names = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
                for scope in resource.scope_spans:
                    collector.steps += [(names["service.name"], step) for step in scope.spans]
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Door)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    collector.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_launch_is_one_trace_across_all_services(make_stack: Callable[..., Stack], tmp_path: Path) -> None:
    """Prepare, mount, miss and fetch are steps of the trace whose id is the launch's, each below another step of it."""
    with collecting() as collector:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.address, "OTEL_BSP_SCHEDULE_DELAY": "500"}
        stack = make_stack(environment=environment)
        with Proxy(stack.registry) as proxy:
            reference = lazy.push(lazy.seeded_image(tmp_path), proxy, "traced")
            lazy.build_index(stack, reference)
            lazy.good(lazy.soci(stack, "run", "--plain-http", reference))
        (launched,) = lazy.launches(stack, reference)
        wanted = {
            ("soci-snapshotter-grpc", "prepare"),
            ("soci-snapshotter-grpc", "mount"),
            ("soci-mounter", "mount"),
            ("soci-mounter", "miss"),
            ("soci-fetcher", "find-index"),
            ("soci-fetcher", "fetch"),
        }
        deadline = time.monotonic() + ARRIVE_SECONDS
        while wanted - {(service, step.name) for service, step in collector.of(launched["id"])}:
            assert time.monotonic() < deadline, collector.of(launched["id"])
            time.sleep(0.1)
        while True:  # a step may come before the one that it is below: each service sends its own, in its own time
            steps = {step.span_id: step for _, step in collector.of(launched["id"])}
            above = {step.parent_span_id for step in steps.values()} - set(steps)
            if len(above) == 1:
                break
            assert time.monotonic() < deadline, "all hang below the one place where the launch began"
            time.sleep(0.1)
        misses = [step for step in steps.values() if step.name == "miss"]
        assert any(step.parent_span_id in {miss.span_id for miss in misses} for step in steps.values())
        for name in stack.daemons:
            if name.startswith(("fetcher", "mounter", "snapshotter", "indexer")):
                assert stack.stop(name) == 0, "services end in order while a collector is there"
