# SPDX-License-Identifier: Apache-2.0
"""containerd's socket where systemd holds it: calls through it, its life beyond ours, and what is refused."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from soci_proto.containerd.services.snapshots.v1 import snapshots_pb2 as pb
from soci_runtime.config import DEFAULT_ADDRESS
from soci_snapshotter import grpc_door, relay
from soci_snapshotter.relay import MOST_CONNECTIONS, relaying
from support.activation import holding, start_with
from support.snapshotter import READY_SECONDS, Calls, Process

LIMIT = 30.0


@pytest.fixture
def process(stack_folder: Callable[[], Path]) -> Iterator[Process]:
    """A snapshotter on a folder of its own, not started."""
    it = Process(stack_folder(), "--address", "fd://")
    try:
        yield it
    finally:
        it.close()


@contextmanager
def activated(process: Process, *sockets: socket.socket) -> Iterator[subprocess.Popen[str]]:
    """It runs with systemd's sockets until the block ends, then is told to stop and ends well."""
    running = start_with(process.command(), sockets)
    try:
        yield running
    finally:
        running.terminate()
        try:
            out, err = running.communicate(timeout=LIMIT)
        finally:
            running.kill()
            running.communicate()
    assert (running.returncode, err) == (0, ""), out


def ready(running: subprocess.Popen[str]) -> dict[str, Any]:
    assert running.stdout is not None
    for line in running.stdout:
        record: dict[str, Any] = json.loads(line)
        if record["msg"] == "ready":
            return record
    raise AssertionError(running.stderr and running.stderr.read())


# --- systemd's socket


def test_calls_through_systemds_socket(process: Process) -> None:
    """Calls, also with messages that need many pieces, are answered; the socket outlives us, ours does not."""
    path = process.folder / "systemd.sock"
    with holding(path) as held:
        path.chmod(0o666)
        with activated(process, held) as running, closing(Calls(path)) as calls:
            ready(running)
            labels = {"containerd.io/snapshot/x": "y" * 4000}
            for number in range(200):
                calls.prepare(f"k{number}", "", labels)
            assert sorted(info.name for info in calls.list()) == sorted(f"k{number}" for number in range(200))
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        assert not list(process.root.rglob("*.sock"))


def test_a_client_waits_for_the_next_process(process: Process) -> None:
    """A call made while nobody runs is answered by the one that starts then; so is the next after a restart."""
    path = process.folder / "systemd.sock"
    with holding(path) as held, ThreadPoolExecutor(1) as thread:
        for number in range(2):
            with closing(Calls(path)) as calls:
                early = thread.submit(calls.prepare, f"k{number}")
                with activated(process, held):
                    assert early.result(LIMIT)[0].type == "bind"


def test_a_call_under_way_is_answered_at_the_end(process: Process) -> None:
    """SIGTERM while a Prepare waits for the bus: the process ends in time, and the client has an answer or a status."""
    path = process.folder / "systemd.sock"
    remote = {
        "containerd.io/snapshot.ref": "sha256:" + "a" * 64,
        "containerd.io/snapshot/cri.image-ref": "r.example/i:1",
        "containerd.io/snapshot/cri.manifest-digest": "sha256:" + "b" * 64,
        "containerd.io/snapshot/cri.layer-digest": "sha256:" + "c" * 64,
    }
    with holding(path) as held, activated(process, held) as running, closing(Calls(path)) as calls:
        ready(running)
        call = calls.stub.Prepare.future(pb.PrepareSnapshotRequest(key="default/1/x", labels=remote))
        until_listed(calls, "default/1/x")
        running.send_signal(signal.SIGTERM)
        with suppress(grpc.RpcError):
            call.result(LIMIT)
        assert call.done()


def until_listed(calls: Calls, key: str) -> None:
    """Wait until a snapshot is there, and its Prepare therefore under way."""
    for _ in range(500):
        if key in {info.name for info in calls.list()}:
            return
    raise AssertionError(key)


def test_two_sockets_are_refused(process: Process) -> None:
    """Status 1, and one line that says so."""
    with holding(process.folder / "a") as one, holding(process.folder / "b") as two:
        running = start_with(process.command(), [one, two])
        out, err = running.communicate(timeout=READY_SECONDS)
    assert (running.returncode, err) == (1, "")
    (line,) = [json.loads(text) for text in out.splitlines()]
    assert "2 sockets" in line["error"]


def test_a_root_too_long_for_a_socket_is_refused(process: Process) -> None:
    """With systemd's socket ours is below the root, whose path must leave room."""
    process.root = process.folder / ("x" * 100)
    with holding(process.folder / "a") as one:
        running = start_with(process.command(), [one])
        out, _ = running.communicate(timeout=READY_SECONDS)
    assert running.returncode == 1
    assert "too long for a socket's path" in out


def test_no_socket_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where systemd passes none, the usual path is listened on, and the log says so."""
    for name in ("LISTEN_PID", "LISTEN_FDS"):
        monkeypatch.delenv(name, raising=False)
    assert grpc_door.place_of("fd://", tmp_path) == (DEFAULT_ADDRESS, None)
    assert "systemd passes no socket" in capsys.readouterr().out
    assert grpc_door.place_of("/x.sock", tmp_path) == ("/x.sock", None)


@pytest.mark.skipif(not Path("/usr/bin/systemd-socket-activate").exists(), reason="systemd is not installed")
def test_systemds_own_tool(process: Process) -> None:
    """systemd-socket-activate starts us with the first connection, and the call that made it is answered."""
    path = process.folder / "systemd.sock"
    words = ["systemd-socket-activate", f"--listen={path}", *process.command()]
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert running.stderr is not None
        assert b"Listening" in running.stderr.readline()
        with closing(Calls(path)) as calls:
            assert calls.prepare("k")[0].type == "bind"
    finally:
        running.terminate()
        out, _ = running.communicate(timeout=LIMIT)
    assert running.returncode == 0, out


# --- the relay alone


@contextmanager
def inside(folder: Path) -> Iterator[tuple[Path, list[socket.socket]]]:
    """A plain listening socket in the place of gRPC's."""
    path = folder / "inside"
    accepted: list[socket.socket] = []
    with holding(path) as listener:
        listener.settimeout(LIMIT)
        accepted.append(listener)
        try:
            yield path, accepted
        finally:
            for one in accepted[1:]:
                one.close()


async def test_ends_are_passed_on(tmp_path: Path) -> None:
    """Bytes arrive in order both ways, then each side's end, and no connection is kept."""
    with holding(tmp_path / "outside") as held, inside(tmp_path) as (path, (listener,)):
        held.settimeout(0)
        async with relaying(held, str(path)):
            reader, writer = await asyncio.open_unix_connection(tmp_path / "outside")
            served, _ = await asyncio.to_thread(listener.accept)
            sent = bytes(range(256)) * 8192
            writer.write(sent)
            writer.write_eof()
            got = bytearray()
            while piece := await asyncio.to_thread(served.recv, 1 << 20):
                got += piece
            assert got == sent
            served.sendall(b"answer")
            served.close()
            assert await reader.read() == b"answer"
            writer.close()


async def test_a_slow_reader_holds_the_sender_up(tmp_path: Path) -> None:
    """What nobody reads is not piled up here."""
    with holding(tmp_path / "outside") as held, inside(tmp_path) as (path, (listener,)):
        held.settimeout(0)
        async with relaying(held, str(path)):
            _, writer = await asyncio.open_unix_connection(tmp_path / "outside")
            served, _ = await asyncio.to_thread(listener.accept)
            sent = 0
            with suppress(TimeoutError):
                async with asyncio.timeout(LIMIT):
                    while sent < 64 << 20:
                        writer.write(bytes(1 << 16))
                        async with asyncio.timeout(0.5):
                            await writer.drain()
                        sent += 1 << 16
            assert sent < 8 << 20
            writer.transport.abort()
            served.close()


async def test_where_nobody_listens_inside(tmp_path: Path) -> None:
    """The client's connection ends, and the relay goes on."""
    with holding(tmp_path / "outside") as held:
        held.settimeout(0)
        async with relaying(held, str(tmp_path / "none")):
            for _ in range(2 * MOST_CONNECTIONS):
                reader, writer = await asyncio.open_unix_connection(tmp_path / "outside")
                async with asyncio.timeout(LIMIT):
                    assert await reader.read() == b""
                writer.close()


async def test_a_defect_ends_one_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong with it, the relay and the service go on."""
    real, broken = relay._pass_on, [1]

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if broken:
            broken.pop()
            raise RuntimeError("a defect")
        await real(reader, writer)

    monkeypatch.setattr(relay, "_pass_on", pass_on)
    with holding(tmp_path / "outside") as held, inside(tmp_path) as (path, (listener,)):
        held.settimeout(0)
        async with relaying(held, str(path)), asyncio.timeout(LIMIT):
            for answer in (b"", b"served"):
                reader, writer = await asyncio.open_unix_connection(tmp_path / "outside")
                served, _ = await asyncio.to_thread(listener.accept)
                with suppress(OSError):  # the broken one may be gone already
                    served.sendall(b"served")
                served.close()
                assert await reader.read() == answer
                writer.close()
