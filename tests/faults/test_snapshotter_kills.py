# SPDX-License-Identifier: Apache-2.0
"""The snapshotter killed under load, again and again: what it answered holds, and nothing is half there."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import grpc
import pytest

from soci_dev.processes import says_ready
from soci_proto.containerd.services.snapshots.v1 import snapshots_pb2 as pb
from soci_proto.containerd.types.mount_pb2 import Mount as MountMessage
from soci_snapshotter.labels import NAMESPACE
from soci_snapshotter.store import SnapshotStore
from support.snapshotter import Calls, code_of, mounted

pytestmark = [pytest.mark.root, pytest.mark.timeout(400)]

KILLS = 200
WORKERS = 4
MOST_CALLS = 60
"""Answered calls before a kill, at most."""
MOUNTS_ASKED = 8
"""Snapshots whose mounts are asked for after a restart; the first one is mounted. Directories are looked at for all."""
WAIT_SECONDS = 30.0
KINDS = {pb.ACTIVE: "active", pb.VIEW: "view", pb.COMMITTED: "committed"}

Row = tuple[str, str, dict[str, str]]
"""Kind, parent, labels."""
Table = dict[str, Row]
Call = Callable[[Calls], object]

FORKS = """
import os, sys
import uvloop
from soci_snapshotter.__main__ import main
for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        main()
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""
"""Starts the service once for each line it reads: what takes a start's time, the imports, is done but once."""


class Process:
    """The service's own ``main`` in a process that can be killed and started quickly.

    It has a real NATS, so that its log is published and trimmed, but nobody is there to ask for layers.
    """

    def __init__(self, folder: Path, nats_url: str) -> None:
        self.folder = folder
        self.root = folder / "root"
        self.socket = folder / "s.sock"
        self.snapshots = self.root / "snapshotter/snapshots"
        self._lock = (folder / "lock").open("a")  # other sessions clean away folders that nobody holds
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._log = folder / "log"
        words = [str(self._log), "--root", str(self.root), "--address", str(self.socket)]
        words += ["--nats-url", nats_url, "--node", "kills"]
        self._parent = subprocess.Popen(
            [sys.executable, "-c", FORKS, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
        )
        self._child = 0

    def start(self) -> None:
        begun = self._log.stat().st_size if self._log.exists() else 0
        self._child = int(self._said("start\n"))
        end = time.monotonic() + WAIT_SECONDS
        while not (self._log.exists() and any(map(says_ready, self._log_from(begun).splitlines()))):
            assert time.monotonic() < end, self._log_from(begun)
            time.sleep(0.005)

    def kill(self) -> None:
        os.kill(self._child, signal.SIGKILL)  # it is its parent's to wait for, so the number is still its own
        assert self._said("") == "ended"
        self._child = 0

    def close(self) -> None:
        if self._child:
            self.kill()
        assert self._parent.stdin
        assert self._parent.stdout
        self._parent.stdin.close()
        self._parent.wait(WAIT_SECONDS)
        self._parent.stdout.close()
        shutil.rmtree(self.folder)
        self._lock.close()

    def _said(self, word: str) -> str:
        assert self._parent.stdin
        assert self._parent.stdout
        self._parent.stdin.write(word)
        self._parent.stdin.flush()
        return self._parent.stdout.readline().strip()

    def _log_from(self, begun: int) -> str:
        with self._log.open("rb") as file:
            file.seek(begun)
            return file.read().decode(errors="replace")


@pytest.fixture
def process(stack_folder: Callable[[], Path], nats_url: str) -> Iterator[Process]:
    made = Process(stack_folder(), nats_url)
    try:
        made.start()
        yield made
    finally:
        made.close()


class Answers:
    """Counts answered calls, so that the kill comes after so many."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.count = 0

    def add(self) -> None:
        with self._changed:
            self.count += 1
            self._changed.notify_all()

    def wait_for(self, more: int) -> None:
        with self._changed:
            target = self.count + more
            assert self._changed.wait_for(lambda: self.count >= target, WAIT_SECONDS)


class Worker:
    """Makes all kinds of calls on snapshots of its own, and knows what must be there."""

    def __init__(self, number: int, answers: Answers) -> None:
        self.prefix = f"w{number}-"
        self.source = random.Random(number)
        self.answers = answers
        self.made: Counter[str] = Counter()
        self.table: Table = {}
        self.maybe: Table = {}  # the table, had the call under way succeeded
        self.under_way: Call | None = None  # where it changes something
        self.serial = 0

    def run(self, socket: Path) -> None:
        """Call until the service is gone."""
        with closing(Calls(socket)) as calls:
            try:
                while True:
                    self.step(calls)
                    self.answers.add()
            except grpc.RpcError as error:
                gone = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
                if error.code() not in gone:
                    raise

    def step(self, calls: Calls) -> None:
        active = [name for name, row in self.table.items() if row[0] == "active"]
        parents = {row[1] for row in self.table.values()}
        free = [name for name in self.table if name not in parents]
        choice = self.source.random()
        if active and choice < 0.25:
            self.commit(calls, self.source.choice(active))
        elif free and choice < 0.25 + 0.04 * min(len(free), 10):
            name = self.source.choice(free)
            self.change("Remove", calls, lambda calls: calls.remove(name), name, None)
        elif choice < 0.75 or not self.table:
            self.make(calls)
        elif choice < 0.83:
            name, value = self.source.choice(list(self.table)), self.next("v")
            kind, parent, labels = self.table[name]
            row = (kind, parent, {**labels, "l": value})
            self.change("Update", calls, lambda calls: calls.update(name, {"l": value}, "labels.l"), name, row)
        elif choice < 0.98:
            self.look(calls, self.source.choice(list(self.table)))
        else:
            self.made["Cleanup"] += 1
            calls.cleanup()

    def next(self, what: str) -> str:
        self.serial += 1
        return f"{self.prefix}{what}{self.serial}"

    def commit(self, calls: Calls, key: str) -> None:
        name, labels = self.next("n"), {"c": str(self.serial)}
        row = ("committed", self.table[key][1], labels)
        self.change("Commit", calls, lambda calls: calls.commit(name, key, labels), name, row, without=key)

    def make(self, calls: Calls) -> None:
        parent = self.source.choice([*(name for name, row in self.table.items() if row[0] == "committed"), ""])
        match self.source.choice(["Prepare", "Prepare", "remote Prepare", "View"]):
            case "Prepare":
                key, row = self.next("k"), ("active", parent, {"p": "1"})
                self.change("Prepare", calls, lambda calls: calls.prepare(key, parent, {"p": "1"}), key, row)
            case "View":
                key = self.next("v")
                self.change("View", calls, lambda calls: calls.view(key, parent), key, ("view", parent, {}))
            case what:  # nobody can say how the layer comes: the answer is mounts
                key, digest = f"default/{self.serial}/{self.next('r')}", "sha256:" + f"{self.serial:064x}"
                images = {f"cri.{name}-digest": digest for name in ("manifest", "layer")}
                labels = {f"containerd.io/snapshot/{name}": value for name, value in images.items()}
                labels |= {"containerd.io/snapshot.ref": digest, "containerd.io/snapshot/cri.image-ref": "a.test/b:1"}
                row = ("active", parent, {**labels, NAMESPACE: "default"})
                self.change(what, calls, lambda calls: calls.prepare(key, parent, labels), key, row)

    def change(self, what: str, calls: Calls, call: Call, name: str, row: Row | None, *, without: str = "") -> None:
        """A call after which ``name`` has that row (None: is gone), and nobody is called ``without`` any more."""
        self.made[what] += 1
        self.under_way = call
        self.maybe = {one: known for one, known in self.table.items() if one not in {name, without}}
        if row is not None:
            self.maybe[name] = row
        call(calls)
        self.table, self.under_way = self.maybe, None

    def look(self, calls: Calls, name: str) -> None:
        """Calls that change nothing: to look at a snapshot, and to be refused."""
        what = self.source.choice(["Mounts", "Stat", "refused Prepare", "refused Commit"])
        self.made[what] += 1
        kind, _, labels = self.table[name]
        match what:
            case "Mounts" if kind != "committed":
                check_directories(calls.mounts(name)[0])
            case "refused Prepare":
                refused(lambda: calls.prepare(self.next("none"), self.prefix + "nobody"), grpc.StatusCode.NOT_FOUND)
            case "refused Commit":
                refused(lambda: calls.commit(name, name), grpc.StatusCode.ALREADY_EXISTS)
            case _:
                assert dict(calls.stat(name).labels) == labels

    def settle(self, calls: Calls, found: Table) -> bool:
        """All answered calls hold. The one under way happened, or did not and can be made again; which?"""
        own = {name: row for name, row in found.items() if self.prefix in name}
        happened = False
        if self.under_way is not None:
            assert own in (self.table, self.maybe)
            happened = own == self.maybe
            if not happened:
                self.under_way(calls)
            self.table, self.under_way = self.maybe, None
        else:
            assert own == self.table
        return happened


def refused(call: Callable[[], object], status: grpc.StatusCode) -> None:
    try:
        call()
    except grpc.RpcError as error:
        if error.code() != status:
            raise
    else:
        pytest.fail("the call was not refused")


def check_rebuild(process: Process) -> None:
    """The log on disk, folded anew, gives the table on disk."""
    with tempfile.TemporaryDirectory() as folder:
        for file in (process.root / "snapshotter").glob("metadata.db*"):
            shutil.copy(file, folder)
        with closing(SnapshotStore(Path(folder) / "metadata.db")) as store:
            assert store.rebuild().wrong == ()
            before = store.all()
            assert len({one.id for one in before}) == len(before)


def kinds_of(process: Process) -> dict[str, str]:
    """Number to kind, as the table has it."""
    path = process.root / "snapshotter/metadata.db"
    with closing(sqlite3.connect(path)) as database:
        return {str(number): kind for number, kind in database.execute("SELECT id, kind FROM snapshots")}


def check_directories(mount: MountMessage) -> None:
    """Every directory that a mount names is there."""
    words = dict(option.partition("=")[::2] for option in mount.options)
    places = [mount.source] if mount.type == "bind" else words["lowerdir"].split(":")
    places += [words[key] for key in ("upperdir", "workdir") if key in words]
    for place in places:
        assert Path(place).is_dir(), place


def check_all(process: Process, workers: list[Worker], source: random.Random) -> int:
    """After a restart: the table, the directories, the mounts; how many calls under way had happened."""
    with closing(Calls(process.socket)) as calls:
        infos = calls.list()
        for number, kind in kinds_of(process).items():
            assert (process.snapshots / number / "fs").is_dir()
            assert kind != "active" or (process.snapshots / number / "work").is_dir()
        usable = [info for info in infos if info.kind != pb.COMMITTED]
        source.shuffle(usable)
        for info in usable[:MOUNTS_ASKED]:
            check_directories(calls.mounts(info.name)[0])
        for chosen in usable[:1]:
            with mounted(calls.mounts(chosen.name)) as top:
                if chosen.kind == pb.ACTIVE:
                    (top / "written").write_text("x")
                assert os.access(top, os.R_OK)
        table = {info.name: (KINDS[info.kind], info.parent, dict(info.labels)) for info in infos}
        happened = sum(worker.settle(calls, table) for worker in workers)
        calls.cleanup()
        assert {path.name for path in process.snapshots.iterdir()} == set(kinds_of(process))
        assert code_of(lambda: calls.stat("nobody")) == "NOT_FOUND"
    return happened


def test_kills(process: Process) -> None:
    """After each of `KILLS` kills no answered call is lost, none is half done, and Cleanup leaves nothing over."""
    source = random.Random(99)
    answers = Answers()
    workers = [Worker(number, answers) for number in range(WORKERS)]
    happened = 0
    begun = time.monotonic()
    for _ in range(KILLS):
        with ThreadPoolExecutor(WORKERS) as threads:
            running = [threads.submit(worker.run, process.socket) for worker in workers]
            try:
                answers.wait_for(source.randrange(1, MOST_CALLS))
                time.sleep(source.random() * 0.003)
            finally:
                process.kill()
            for one in running:
                one.result(WAIT_SECONDS)
        check_rebuild(process)
        process.start()
        happened += check_all(process, workers, source)
    made: Counter[str] = sum((worker.made for worker in workers), Counter())
    print(  # noqa: T201
        f"{KILLS} kills in {time.monotonic() - begun:.0f} s: {made.total()} calls made, {answers.count} answered,"
        f" {happened} done and not answered; {dict(made)}"
    )
