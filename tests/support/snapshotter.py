# SPDX-License-Identifier: Apache-2.0
"""A snapshotter as a process of its own, its calls over gRPC, and its mounts made with mount(2)."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from soci_dev.processes import Daemon, free_port
from soci_proto.containerd.services.snapshots.v1 import snapshots_pb2 as pb
from soci_proto.containerd.services.snapshots.v1 import snapshots_pb2_grpc as rpc

READY_SECONDS = 30.0
CALL_SECONDS = 30.0
MOUNT_SECONDS = 20.0
MS_RDONLY, MS_BIND, MS_REC, MS_REMOUNT = 1, 4096, 16384, 32
OPTIONS_BYTES = 4095
"""What mount(2) takes of options: a page, with its zero."""
GC_ROOT = "containerd.io/gc.root"


class Process:
    """``python -m soci_snapshotter`` on a folder, with no NATS to be found."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.folder = folder
        self.root = folder / "root"
        self.socket = folder / "s.sock"
        self.snapshots = self.root / "snapshotter/snapshots"
        self.flags = flags
        self.daemon: Daemon | None = None
        # as a stack locks its folder: other sessions clean away those that nobody holds
        self._lock = (folder / "lock").open("a")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        """End it, if it runs, and remove its folder."""
        if self.daemon is not None:
            self.daemon.stop()
        shutil.rmtree(self.folder)
        self._lock.close()

    def command(self) -> list[str]:
        nats = f"nats://127.0.0.1:{free_port()}"
        words = ["--root", str(self.root), "--address", str(self.socket), "--nats-url", nats, "--node", "test"]
        return [sys.executable, "-m", "soci_snapshotter", *words, *self.flags]

    def start(self) -> Daemon:
        self.daemon = Daemon("snapshotter", self.command(), self.folder / "log", os.environ, self.folder)
        self.daemon.wait(self.daemon.said_ready, "ready", READY_SECONDS)
        return self.daemon

    def kill(self) -> None:
        assert self.daemon is not None
        self.daemon.kill()

    def stop(self) -> int:
        assert self.daemon is not None
        return self.daemon.stop()

    def run_to_its_end(self) -> subprocess.CompletedProcess[str]:
        """Start one that is expected to end by itself."""
        return subprocess.run(self.command(), capture_output=True, text=True, check=False, timeout=READY_SECONDS)


class Calls:
    """The ten calls of one snapshotter. ``prefix`` keeps the names of one test to itself."""

    def __init__(self, socket: Path, snapshotter: str = "", namespace: str = "") -> None:
        limit = ("grpc.max_receive_message_length", 16 << 20)
        self.channel = grpc.insecure_channel(f"unix:{socket}", options=[limit])
        self.stub: Any = rpc.SnapshotsStub(self.channel)
        self.snapshotter = snapshotter
        self.metadata = (("containerd-namespace", namespace),) if namespace else ()
        self.labels = {GC_ROOT: "2026"} if namespace else {}  # containerd collects what nobody holds

    def close(self) -> None:
        self.channel.close()

    def _call(self, method: str, message: Any) -> Any:
        return getattr(self.stub, method)(message, timeout=CALL_SECONDS, metadata=self.metadata)

    def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> Sequence[Any]:
        labels = {**self.labels, **(labels or {})}
        asked = pb.PrepareSnapshotRequest(snapshotter=self.snapshotter, key=key, parent=parent, labels=labels)
        return list(self._call("Prepare", asked).mounts)

    def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> Sequence[Any]:
        labels = {**self.labels, **(labels or {})}
        asked = pb.ViewSnapshotRequest(snapshotter=self.snapshotter, key=key, parent=parent, labels=labels)
        return list(self._call("View", asked).mounts)

    def mounts(self, key: str) -> Sequence[Any]:
        return list(self._call("Mounts", pb.MountsRequest(snapshotter=self.snapshotter, key=key)).mounts)

    def commit(self, name: str, key: str, labels: Mapping[str, str] | None = None, parent: str = "") -> None:
        labels = {**self.labels, **(labels or {})}
        asked = pb.CommitSnapshotRequest(snapshotter=self.snapshotter, name=name, key=key, labels=labels, parent=parent)
        self._call("Commit", asked)

    def remove(self, key: str) -> None:
        self._call("Remove", pb.RemoveSnapshotRequest(snapshotter=self.snapshotter, key=key))

    def stat(self, key: str) -> Any:
        return self._call("Stat", pb.StatSnapshotRequest(snapshotter=self.snapshotter, key=key)).info

    def update(self, name: str, labels: Mapping[str, str], *paths: str) -> Any:
        asked = pb.UpdateSnapshotRequest(snapshotter=self.snapshotter)
        asked.info.name = name
        asked.info.labels.update(labels)
        asked.update_mask.paths.extend(paths)
        return self._call("Update", asked).info

    def batches(self, *filters: str) -> Iterator[list[Any]]:
        asked = pb.ListSnapshotsRequest(snapshotter=self.snapshotter, filters=filters)
        for message in self._call("List", asked):
            yield list(message.info)

    def list(self, *filters: str) -> list[Any]:
        return [info for batch in self.batches(*filters) for info in batch]

    def usage(self, key: str) -> tuple[int, int]:
        found = self._call("Usage", pb.UsageRequest(snapshotter=self.snapshotter, key=key))
        return found.size, found.inodes

    def cleanup(self) -> None:
        self._call("Cleanup", pb.CleanupRequest(snapshotter=self.snapshotter))

    def own(self, info: Any) -> dict[str, str]:
        """A snapshot's labels, without those that keep containerd from collecting it."""
        return {key: value for key, value in info.labels.items() if key != GC_ROOT}


def code_of(call: Callable[[], object]) -> str:
    """The status with which a call ends, ``OK`` where it succeeds."""
    try:
        call()
    except grpc.RpcError as error:
        return str(error.code().name)  # the error is a call, too
    return "OK"


def mount(source: str, target: Path, kind: str, options: Sequence[str]) -> None:
    """One of containerd's mounts, made with mount(2); OSError where the kernel refuses."""
    if sum(map(len, options)) + len(options) > OPTIONS_BYTES:
        _mount_from_common_folder(source, target, kind, list(options))
        return
    flags = 0
    data = []
    for option in options:
        known = {"ro": MS_RDONLY, "rw": 0, "bind": MS_BIND, "rbind": MS_BIND | MS_REC}.get(option)
        if known is None:
            data.append(option)
        else:
            flags |= known
    _mount(source, target, kind, flags, ",".join(data))
    if flags & MS_BIND and flags & MS_RDONLY:  # the kernel takes read-only of a bind only in a second step
        _mount(source, target, kind, MS_BIND | MS_REMOUNT | MS_RDONLY, "")


def _mount(source: str, target: Path, kind: str, flags: int, data: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    words = [os.fsencode(word) for word in (source, str(target), kind)]
    if libc.mount(*words, ctypes.c_ulong(flags), data.encode()) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def _mount_from_common_folder(source: str, target: Path, kind: str, options: list[str]) -> None:
    """As containerd does it with long options: from the layers' common folder, by relative paths."""
    place = next(index for index, option in enumerate(options) if option.startswith("lowerdir="))
    lower = options[place].removeprefix("lowerdir=").split(":")
    common = os.path.commonpath(lower)
    options[place] = "lowerdir=" + ":".join(os.path.relpath(one, common) for one in lower)
    words = json.dumps([source, str(target), kind, options])
    script = (
        "import json, os, sys; from pathlib import Path; from support.snapshotter import mount;"
        "source, target, kind, options = json.loads(sys.argv[1]); os.chdir(sys.argv[2]);"
        "mount(source, Path(target), kind, options)"
    )
    path = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
    subprocess.run(
        [sys.executable, "-c", script, words, common],
        check=True,
        timeout=MOUNT_SECONDS,
        env=os.environ | {"PYTHONPATH": path},
    )


def unmount(target: Path) -> None:
    subprocess.run(["umount", "-l", str(target)], check=True, timeout=MOUNT_SECONDS)


@contextmanager
def mounted(mounts: Sequence[Any]) -> Iterator[Path]:
    """The mounts of one snapshot, on a folder of their own while the block runs."""
    target = Path(tempfile.mkdtemp(prefix="snapshot-"))
    made = 0
    try:
        for one in mounts:
            mount(one.source, target, one.type, one.options)
            made += 1
        yield target
    finally:
        for _ in range(made):
            unmount(target)
        target.rmdir()
