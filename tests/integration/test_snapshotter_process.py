# SPDX-License-Identifier: Apache-2.0
"""The snapshotter as a process: one a root, its socket, its database, its end, and clients that go away."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import grpc
import pytest

from soci_proto.containerd.services.snapshots.v1 import snapshots_pb2 as pb
from support.snapshotter import Calls, Process, code_of

pytestmark = pytest.mark.root

WAIT_SECONDS = 20.0
DIGEST = "sha256:" + "a" * 64
REMOTE = {
    "containerd.io/snapshot.ref": DIGEST,
    "containerd.io/snapshot/cri.image-ref": "docker.io/library/redis:7",
    "containerd.io/snapshot/cri.manifest-digest": DIGEST,
    "containerd.io/snapshot/cri.layer-digest": DIGEST,
}


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait at most `WAIT_SECONDS` for something to become true."""
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


@pytest.fixture
def process(stack_folder: Callable[[], Path]) -> Iterator[Process]:
    """One that is not started yet."""
    made = Process(stack_folder())
    yield made
    made.close()


@pytest.fixture
def calls(process: Process) -> Iterator[Calls]:
    process.start()
    made = Calls(process.socket)
    yield made
    made.close()


def lines(text: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def refusal(process: Process) -> str:
    """Start one that cannot run: it ends with status 1 and one line that says why, without a traceback."""
    done = process.run_to_its_end()
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    (line,) = [line for line in lines(done.stdout) if line["level"] == "error"]
    return line["error"]


def test_a_second_one_on_the_same_root(process: Process, calls: Calls) -> None:
    """It ends and names the folder; the first goes on, on its socket."""
    assert f"another snapshotter runs on {process.root}" in refusal(process)
    process.socket = process.folder / "other.sock"
    assert f"another snapshotter runs on {process.root}" in refusal(process)
    calls.prepare("k")


def test_a_second_one_on_the_same_socket(process: Process, calls: Calls) -> None:
    """A socket on which somebody listens is not taken away, whatever the root."""
    process.root = process.folder / "other"
    assert f"another process listens on {process.socket}" in refusal(process)
    calls.prepare("k")


def test_a_stale_socket_is_taken_over(process: Process) -> None:
    """After a kill the socket is still there; the next one serves on it, and knows all snapshots."""
    process.start()
    with closing(Calls(process.socket)) as calls:
        calls.prepare("k")
        calls.commit("n", "k")
    process.kill()
    assert process.socket.is_socket()
    process.start()
    with closing(Calls(process.socket)) as calls:
        assert calls.stat("n").kind == pb.COMMITTED
        assert calls.prepare("above", "n")
    assert stat.S_IMODE(process.socket.stat().st_mode) == 0o660


def test_a_file_in_place_of_the_socket(process: Process) -> None:
    """A file that is no socket stays, and is named."""
    process.socket.write_text("precious")
    assert str(process.socket) in refusal(process)
    assert process.socket.read_text() == "precious"


def test_the_end(process: Process, calls: Calls) -> None:
    """SIGTERM ends it with status 0; its socket is gone, its snapshots are not."""
    calls.prepare("k")
    assert process.stop() == 0
    assert not process.socket.exists()
    process.start()
    with closing(Calls(process.socket)) as again:
        assert again.stat("k").kind == pb.ACTIVE


def test_folders_are_roots_alone(process: Process, calls: Calls) -> None:
    """Programs in images are setuid: nobody else gets at them."""
    calls.prepare("k")
    for folder in (process.root, process.root / "snapshotter", process.snapshots):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("spoil", ["garbage", "bolt", "newer", "inside"])
def test_a_damaged_database_is_named(process: Process, spoil: str) -> None:
    """It ends with the file's path, and leaves the file as it is."""
    path = process.root / "snapshotter/metadata.db"
    path.parent.mkdir(parents=True)
    if spoil in {"garbage", "bolt"}:
        path.write_bytes(os.urandom(40_000) if spoil == "garbage" else b"\0" * 16 + b"\xed\xda\x0c\xed" + bytes(32_000))
    elif spoil == "newer":
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA user_version = 77")
            database.execute("CREATE TABLE later (x)")
    else:
        process.start()
        with closing(Calls(process.socket)) as calls:
            for number in range(40):
                calls.prepare(f"k{number}", "", {"l": "x" * 3000})
        process.stop()
        damaged = bytearray(path.read_bytes())
        damaged[8192 : len(damaged) // 2] = b"\xa5" * (len(damaged) // 2 - 8192)
        path.write_bytes(damaged)
    before = path.read_bytes()
    assert str(path) in refusal(process)
    assert path.read_bytes() == before


def test_a_root_that_cannot_be(process: Process) -> None:
    """A file where the root should be is named, without a traceback."""
    process.root.write_text("a file")
    assert str(process.root) in refusal(process)


def test_the_client_goes_away(process: Process, calls: Calls) -> None:
    """A Prepare whose client hangs up while a layer is looked for leaves no snapshot, and its key is free."""
    asked = pb.PrepareSnapshotRequest(key="default/1/x", labels=REMOTE)
    call = calls.stub.Prepare.future(asked)
    until(lambda: [info.name for info in calls.list()] == ["default/1/x"], "the snapshot is there meanwhile")
    call.cancel()
    until(lambda: calls.list() == [], "the snapshot is gone again")
    calls.prepare("default/1/x")
    assert process.daemon is not None
    assert process.daemon.returncode is None


def test_a_deadline_of_the_client(calls: Calls) -> None:
    """So does one whose time is over."""
    asked = pb.PrepareSnapshotRequest(key="default/1/x", labels=REMOTE)
    with pytest.raises(grpc.RpcError) as told:
        calls.stub.Prepare(asked, timeout=0.5)
    assert told.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    until(lambda: calls.list() == [], "the snapshot is gone again")


def test_the_bus_is_away(process: Process) -> None:
    """A remote Prepare is answered within mount_timeout, deferred, with the reason in the log; the next layers do not
    wait for the bus again.
    """
    settings = process.folder / "config.toml"
    settings.write_text("mount_timeout_sec = 1\n")
    process.flags = ("--config", str(settings))
    process.start()
    with closing(Calls(process.socket)) as calls:
        assert [one.type for one in calls.prepare("default/1/x", "", REMOTE)] == ["bind"]
        assert code_of(lambda: calls.prepare("no-namespace", "", REMOTE)) == "FAILED_PRECONDITION"
        for number in (2, 3):
            calls.prepare(f"default/{number}/x", "", REMOTE)
    assert process.daemon is not None
    told = [line for line in lines(process.daemon.output()) if line["msg"] == "layer"]
    assert [(line["mode"], line["defer-snapshot-runtime"]) for line in told] == [("defer", "true")] * 3
    assert all("NATS is away" in line["error"] for line in told)
    assert ["as it was a moment ago" in line["error"] for line in told] == [False, True, True]


def test_stopping_during_a_call(process: Process, calls: Calls) -> None:
    """SIGTERM while a Prepare waits: the process ends with status 0; the snapshot is there if that was answered."""
    call = calls.stub.Prepare.future(pb.PrepareSnapshotRequest(key="default/1/x", labels=REMOTE))
    until(lambda: calls.list() != [], "the call is under way")
    assert process.daemon is not None
    os.kill(process.daemon.pid, signal.SIGTERM)
    until(lambda: process.daemon is not None and process.daemon.returncode is not None, "it ends")
    assert process.daemon.returncode == 0
    answered = code_of(lambda: call.result(WAIT_SECONDS)) == "OK"
    process.start()
    with closing(Calls(process.socket)) as again:
        assert [info.name for info in again.list()] == (["default/1/x"] if answered else [])


def test_a_database_that_was_moved_away(process: Process) -> None:
    """The numbers of directories that are still there are not given again; Cleanup frees them."""
    process.start()
    with closing(Calls(process.socket)) as calls:
        for number in range(3):
            calls.prepare(f"k{number}")
    process.stop()
    for file in (process.root / "snapshotter").glob("metadata.db*"):
        file.unlink()
    (process.snapshots / "2/fs/old").touch()
    process.start()
    with closing(Calls(process.socket)) as calls:
        (mount,) = calls.prepare("new")
        assert Path(mount.source).parent.name == "4"
        assert (process.snapshots / "2/fs/old").exists()
        calls.cleanup()
    assert [path.name for path in process.snapshots.iterdir()] == ["4"]
