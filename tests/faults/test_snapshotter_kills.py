# SPDX-License-Identifier: Apache-2.0
"""The snapshotter killed under load, again and again: what it answered holds, and nothing is half there."""

from __future__ import annotations

import random
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import grpc
import pytest

from soci_proto.containerd.services.snapshots.v1 import snapshots_pb2 as pb
from soci_proto.containerd.types.mount_pb2 import Mount as MountMessage
from soci_snapshotter.store import SnapshotStore
from support.snapshotter import Calls, Process

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

KILLS = 20
WORKERS = 4
MOST_CALLS = 120
"""Answered calls before a kill, at most."""
WAIT_SECONDS = 30.0
KINDS = {pb.ACTIVE: "active", pb.VIEW: "view", pb.COMMITTED: "committed"}

Table = dict[str, tuple[str, str]]
"""Name to kind and parent."""


@pytest.fixture
def process(stack_folder: Callable[[], Path]) -> Iterator[Process]:
    made = Process(stack_folder())
    made.start()
    yield made
    made.close()


class Answers:
    """Counts answered calls, so that the kill comes after so many."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0

    def add(self) -> None:
        with self._changed:
            self._count += 1
            self._changed.notify_all()

    def wait_for(self, more: int) -> None:
        with self._changed:
            target = self._count + more
            assert self._changed.wait_for(lambda: self._count >= target, WAIT_SECONDS)


class Worker:
    """Makes, commits and removes snapshots of its own, and knows what must be there."""

    def __init__(self, number: int, answers: Answers) -> None:
        self.prefix = f"w{number}-"
        self.source = random.Random(number)
        self.answers = answers
        self.table: Table = {}
        self.maybe: Table = {}  # the table, had the call under way succeeded
        self.serial = 0

    def run(self, socket: Path) -> None:
        """Call until the service is gone."""
        with closing(Calls(socket)) as calls:
            try:
                while True:
                    self.step(calls)
                    self.table = self.maybe
                    self.answers.add()
            except grpc.RpcError as error:
                gone = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
                if error.code() not in gone:
                    raise

    def step(self, calls: Calls) -> None:
        active = [name for name, (kind, _) in self.table.items() if kind == "active"]
        parents = {parent for _, parent in self.table.values()}
        free = [name for name in self.table if name not in parents]
        choice = self.source.random()
        if active and choice < 0.35:
            key, self.serial = self.source.choice(active), self.serial + 1
            name = f"{self.prefix}n{self.serial}"
            parent = self.table[key][1]
            self.maybe = {**{one: row for one, row in self.table.items() if one != key}, name: ("committed", parent)}
            calls.commit(name, key)
        elif free and choice < 0.35 + 0.05 * len(free):
            name = self.source.choice(free)
            self.maybe = {one: row for one, row in self.table.items() if one != name}
            calls.remove(name)
        else:
            self.serial += 1
            key = f"{self.prefix}k{self.serial}"
            committed = [name for name, (kind, _) in self.table.items() if kind == "committed"]
            parent = self.source.choice([*committed, ""])
            kind = self.source.choice(["active", "active", "view"])
            self.maybe = {**self.table, key: (kind, parent)}
            (calls.prepare if kind == "active" else calls.view)(key, parent)

    def settle(self, found: Table) -> None:
        """All answered calls hold; the one under way happened, or did not."""
        own = {name: row for name, row in found.items() if name.startswith(self.prefix)}
        assert own in (self.table, self.maybe)
        self.table = self.maybe = own


def check_rebuild(process: Process) -> None:
    """The log on disk, folded anew, gives the table on disk."""
    with tempfile.TemporaryDirectory() as folder:
        for file in (process.root / "snapshotter").glob("metadata.db*"):
            shutil.copy(file, folder)
        with closing(SnapshotStore(Path(folder) / "metadata.db")) as store:
            before = store.all()
            store.rebuild()
            assert store.all() == before
            assert len({one.id for one in before}) == len(before)


def numbers_of(process: Process) -> set[str]:
    path = process.root / "snapshotter/metadata.db"
    with closing(sqlite3.connect(path)) as database:
        return {str(number) for (number,) in database.execute("SELECT id FROM snapshots")}


def test_kills(process: Process) -> None:
    """After each of `KILLS` kills no answered call is lost, none is half done, and Cleanup leaves nothing over."""
    source = random.Random(99)
    answers = Answers()
    workers = [Worker(number, answers) for number in range(WORKERS)]
    for _ in range(KILLS):
        with ThreadPoolExecutor(WORKERS) as threads:
            running = [threads.submit(worker.run, process.socket) for worker in workers]
            try:
                answers.wait_for(source.randrange(1, MOST_CALLS))
            finally:
                process.kill()
            for one in running:
                one.result(WAIT_SECONDS)
        check_rebuild(process)
        process.start()
        with closing(Calls(process.socket)) as calls:
            infos = calls.list()
            for worker in workers:
                worker.settle({info.name: (KINDS[info.kind], info.parent) for info in infos})
            for info in infos:
                if info.kind != pb.COMMITTED:
                    check_directories(calls.mounts(info.name)[0])
            calls.cleanup()
        assert {path.name for path in process.snapshots.iterdir()} == numbers_of(process)


def check_directories(mount: MountMessage) -> None:
    """Every directory that a mount names is there."""
    words = dict(option.partition("=")[::2] for option in mount.options)
    places = [mount.source] if mount.type == "bind" else words["lowerdir"].split(":")
    places += [words[key] for key in ("upperdir", "workdir") if key in words]
    for place in places:
        assert Path(place).is_dir(), place
