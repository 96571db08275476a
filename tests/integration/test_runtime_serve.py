# SPDX-License-Identifier: Apache-2.0
"""A service as a process: signals, readiness, exit status, log on stdout, traces to a receiver of OTLP."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

LIMIT = 30.0
"""Seconds for a child, and for each word from it."""
LAUNCH = "ab" * 16

SERVICE = """
import asyncio
from soci.errors import BusUnavailable, SociError
from soci.launch import LaunchId
from soci_runtime.serve import service_command
from soci_runtime.tracing import step

async def run(config, process):
    how = config.node
    if how == "group":
        async def fail():
            raise BusUnavailable("NATS is away")
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            group.create_task(asyncio.sleep(60))
    if how == "defect":
        raise ZeroDivisionError("ours")
    if how == "steps":
        with step("prepare", None, launch=LaunchId("ab" * 16), layer="l", nothing=None) as prepare:
            with step("mount", prepare) as mount:
                pass
        try:
            with step("fetch", mount, size=7):
                raise SociError("failed")
        except SociError:
            pass
        with step("alone", None):
            pass
    process.ready(node=how)
    if how != "steps":
        await process.stopping.wait()
    if how == "late":
        raise SociError("could not tidy up")

service_command("soci-test", run, address=True)()
"""


def start(*words: str, **environment: str) -> subprocess.Popen[str]:
    """The service above; ``--node`` says what it does."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "SOCI", "NATS"))}
    return subprocess.Popen(
        [sys.executable, "-c", SERVICE, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean | environment,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, list[dict[str, Any]], str]:
    """Exit status, log and stderr of a process that ends."""
    try:
        out, err = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
        process.wait(LIMIT)
    return process.returncode, [json.loads(line) for line in out.splitlines()], err


def wait_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    line = json.loads(process.stdout.readline())
    assert (line["msg"], line["service"]) == ("ready", "soci-test"), line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_well(number: signal.Signals) -> None:
    """Once it is ready, either signal ends it with 0, and nothing is written on stderr."""
    process = start("--node", "plain")
    wait_ready(process)
    process.send_signal(number)
    status, log, err = finish(process)
    assert (status, err) == (0, "")
    assert [(line["msg"], line["signal"]) for line in log] == [("stopping", number.name)]


def test_an_error_on_the_way_out_is_an_error() -> None:
    """A service that cannot end well says so, and its status is 1."""
    process = start("--node", "late")
    wait_ready(process)
    process.send_signal(signal.SIGTERM)
    status, log, _ = finish(process)
    assert status == 1
    assert [line["msg"] for line in log] == ["stopping", "cannot go on"]


def test_one_error_out_of_a_task_group_is_its_text() -> None:
    """Status 1 and one line with the text, no traceback."""
    status, log, err = finish(start("--node", "group"))
    assert (status, err) == (1, "")
    assert [(line["level"], line["error"], line["error_type"]) for line in log] == [
        ("error", "NATS is away", "BusUnavailable")
    ]
    assert "exception" not in log[0]


def test_a_defect_is_one_line_with_its_traceback() -> None:
    """Status 1 and still one line, in which the traceback is a value."""
    status, log, err = finish(start("--node", "defect"))
    assert (status, err) == (1, "")
    assert len(log) == 1
    assert "ZeroDivisionError: ours" in log[0]["exception"]


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["--config", "/nowhere/x.toml"], 1, "soci-test: /nowhere/x.toml"),
        (["--node", "a.b"], 1, "soci-test: --node: 'a.b'"),
        (["--address", "relative"], 1, "soci-test: --address: 'relative'"),
        (["--log-level", "loud"], 2, "loud"),
    ],
)
def test_wrong_settings_are_told_on_stderr(words: list[str], status: int, says: str) -> None:
    """Before anything is begun, in one line of plain words (what click refuses has its usage beside it)."""
    found, log, err = finish(start(*words))
    assert (found, log) == (status, [])
    assert says in err
    assert "Traceback" not in err
    assert status == 2 or err.count("\n") == 1


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_systemd_is_told(tmp_path: Path, kind: str) -> None:
    """READY once it serves, STOPPING when it was told to stop, to a socket with a path or an abstract name."""
    address = str(tmp_path / "n.sock") if kind == "path" else f"@soci-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address.replace("@", "\0"))
        systemd.settimeout(LIMIT)
        process = start("--node", "plain", NOTIFY_SOCKET=address)
        try:
            assert systemd.recv(100) == b"READY=1"
            process.send_signal(signal.SIGTERM)
            assert systemd.recv(100) == b"STOPPING=1"
        finally:
            status, log, _ = finish(process)
    assert status == 0
    assert [line["msg"] for line in log] == ["ready", "stopping"]


def test_a_watchdog_hears_that_the_loop_turns() -> None:
    """Signs of life come for as long as the service runs, and none where systemd does not watch this process."""
    for variable, watched in (("WATCHDOG_USEC", True), ("WATCHDOG_PID", False)):
        address = f"@soci-watch-{os.getpid()}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            systemd.bind(address.replace("@", "\0"))
            systemd.settimeout(LIMIT)
            environment = {"WATCHDOG_USEC": "200000", variable: "200000"}
            process = start("--node", "plain", NOTIFY_SOCKET=address, **environment)
            try:
                told = [systemd.recv(100) for _ in range(4 if watched else 1)]
                process.send_signal(signal.SIGTERM)
                while told[-1] != b"STOPPING=1":
                    told.append(systemd.recv(100))
            finally:
                finish(process)
        assert (b"WATCHDOG=1" in told) is watched
        assert b"READY=1" in told


def test_the_file_is_spoken_of_in_the_log(tmp_path: Path) -> None:
    """Unknown keys are one warning, a key without effect one line at info; ``--strict`` refuses to start."""
    file = tmp_path / "c.toml"
    file.write_text("mount_timeout_sek = 5\n[fuse]\nattr_timeout = 7\n")
    process = start("--node", "late", "--config", str(file))
    assert process.stdout is not None
    first, second, third = (json.loads(process.stdout.readline()) for _ in range(3))
    process.send_signal(signal.SIGTERM)
    finish(process)
    assert (first["level"], first["keys"]) == ("warning", ["mount_timeout_sek (is mount_timeout_sec meant?)"])
    assert (second["level"], second["key"]) == ("info", "fuse.attr_timeout")
    assert third["msg"] == "ready"
    status, log, err = finish(start("--strict", "--config", str(file)))
    assert (status, log) == (1, [])
    assert err == f"soci-test: {file}: no setting: mount_timeout_sek (is mount_timeout_sec meant?)\n"


class Receiver(ThreadingHTTPServer):
    """Takes traces by OTLP over HTTP."""

    def __init__(self, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = status
        self.requests: list[ExportTraceServiceRequest] = []
        self.lock = threading.Lock()

    def spans(self) -> dict[str, Any]:
        """By name."""
        found: dict[str, Any] = {}
        for request in self.requests:
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    found |= {span.name: span for span in scope.spans}
        return found


class Handler(BaseHTTPRequestHandler):
    """Keeps what is posted."""

    server: Receiver

    def do_POST(self) -> None:
        """One export."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        with self.server.lock:
            self.server.requests.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Be quiet."""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A running receiver."""
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(LIMIT)


def test_steps_arrive_with_their_launch_and_parents(receiver: Receiver) -> None:
    """All steps are sent before the process ends; trace id is the launch id, parents are linked, failures marked."""
    endpoint = f"http://127.0.0.1:{receiver.server_port}"
    status, _, err = finish(start("--node", "steps", OTEL_EXPORTER_OTLP_ENDPOINT=endpoint))
    assert (status, err) == (0, "")
    spans = receiver.spans()
    assert set(spans) == {"prepare", "mount", "fetch", "alone"}
    assert {spans[name].trace_id.hex() for name in ("prepare", "mount", "fetch")} == {LAUNCH}
    assert spans["prepare"].parent_span_id == b""
    assert spans["mount"].parent_span_id == spans["prepare"].span_id
    assert spans["fetch"].parent_span_id == spans["mount"].span_id
    assert spans["alone"].trace_id.hex() != LAUNCH
    assert spans["alone"].parent_span_id == b""
    assert {item.key: item.value.string_value for item in spans["prepare"].attributes} == {"layer": "l"}
    assert {item.key: item.value.int_value for item in spans["fetch"].attributes} == {"size": 7}
    assert [spans[name].status.code for name in ("prepare", "mount", "fetch")] == [0, 0, 2]
    about = receiver.requests[0].resource_spans[0].resource.attributes
    facts = {item.key: item.value.string_value for item in about}
    assert (facts["service.name"], facts["service.namespace"], facts["host.name"]) == ("soci-test", "sociable", "steps")


def test_a_receiver_that_is_away_does_not_hold_the_end_up() -> None:
    """Traces are lost then; the process ends well all the same."""
    status, log, _ = finish(start("--node", "steps", OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9"))
    assert status == 0
    assert [line["msg"] for line in log] == ["ready"]
