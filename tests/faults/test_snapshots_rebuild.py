# SPDX-License-Identifier: Apache-2.0
"""``soci snapshots`` beside a running snapshotter: nobody is disturbed, and a spoiled table is mended under load."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from support.snapshotter import Calls, Process, code_of

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

REBUILDS = 15
WORKERS = 3
RUN_SECONDS = 60.0


@pytest.fixture
def process(stack_folder: Callable[[], Path]) -> Iterator[Process]:
    made = Process(stack_folder())
    try:
        made.start()
        yield made
    finally:
        made.close()


def soci(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "soci_cli", "--root", str(root), "snapshots", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=RUN_SECONDS)


def told(root: Path, *words: str) -> Any:
    """What a command that must succeed prints with ``--json``."""
    done = soci(root, *words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def work(socket: Path, number: int, stop: threading.Event) -> int:
    """Make, relabel, commit and remove snapshots until told to stop; the number of calls, all of which succeed."""
    count = 0
    with closing(Calls(socket)) as calls:
        while not stop.is_set():
            key, name = f"k{number}-{count}", f"n{number}-{count}"
            calls.prepare(key)
            calls.update(key, {"l": str(count)}, "labels.l")
            calls.commit(name, key)
            if count % 3:
                calls.remove(name)
            calls.cleanup()
            count += 5
    return count


def test_a_rebuild_beside_the_service(process: Process) -> None:
    """However often the log is folded while calls are made, none of them fails, and the table is always right."""
    stop = threading.Event()
    with ThreadPoolExecutor(WORKERS) as threads:
        running = [threads.submit(work, process.socket, number, stop) for number in range(WORKERS)]
        try:
            rebuilds = [told(process.root, "rebuild") for _ in range(REBUILDS)]
        finally:
            stop.set()
        made = sum(one.result() for one in running)
    assert [one["wrong"] for one in rebuilds] == [[]] * REBUILDS
    assert rebuilds[-1]["events"] > rebuilds[0]["events"] > 0
    assert made > 0
    with closing(Calls(process.socket)) as calls:
        assert {info.name for info in calls.list()} == {one["name"] for one in told(process.root, "ls")}


def test_a_spoiled_table_is_mended_beside_the_service(process: Process) -> None:
    """What is wrong in the table is told and mended, and the running service sees it at once."""
    with closing(Calls(process.socket)) as calls:
        calls.prepare("lost", "", {"a": "1"})
        calls.prepare("wrong", "", {"a": "1"})
        calls.prepare("right")
        with closing(sqlite3.connect(process.root / "snapshotter/metadata.db")) as database, database:
            database.execute("DELETE FROM snapshots WHERE name = 'lost'")
            database.execute("UPDATE snapshots SET labels = '{}' WHERE name = 'wrong'")
        assert code_of(lambda: calls.stat("lost")) == "NOT_FOUND"
        done = soci(process.root, "rebuild")
        assert done.returncode == 0
        assert "was missing" in done.stdout
        assert "labels '{}' is now" in done.stdout
        assert done.stderr == "3 events folded: 2 rows of the table were wrong, and are mended\n"
        for name in ("lost", "wrong"):
            assert calls.own(calls.stat(name)) == {"a": "1"}
        assert soci(process.root, "rebuild").stderr == "3 events folded: the table was right\n"


def test_a_database_that_is_held(process: Process) -> None:
    """Where somebody holds the database for long, a rebuild ends with an error after a while and changes nothing."""
    with closing(Calls(process.socket)) as calls:
        calls.prepare("k")
        with closing(sqlite3.connect(process.root / "snapshotter/metadata.db", isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            done = soci(process.root, "rebuild")
            assert len(told(process.root, "ls")) == 1  # a look needs no lock
            database.execute("ROLLBACK")
        assert done.returncode == 1
        assert "locked" in done.stderr
        assert calls.stat("k").name == "k"


def test_ls_and_log(process: Process) -> None:
    """Snapshots with kind and mode, and what happened to each, also to those that are gone, with or without service."""
    with closing(Calls(process.socket)) as calls:
        calls.prepare("k1")
        calls.commit("base", "k1")
        calls.view("v", "base")
        calls.prepare("gone\n", "base")
        calls.remove("gone\n")
    for running in (True, False):
        listed = [(one["name"], one["kind"], one["mode"], one["parent"]) for one in told(process.root, "ls")]
        assert listed == [("base", "committed", "local", ""), ("v", "view", "", "base")]
        happened = [(one["what"], one["name"]) for one in told(process.root, "log", "base")]
        assert happened == [("prepared", "k1"), ("committed", "base")]
        assert [one["what"] for one in told(process.root, "log", "-n", "2")] == ["prepared", "removed"]
        shown = soci(process.root, "log").stdout.splitlines()
        assert len(shown) == 6
        assert "gone?" in shown[-1]
        assert len(soci(process.root, "ls").stdout.splitlines()) == 3
        if running:
            assert process.stop() == 0
    done = soci(process.root / "none", "ls")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("soci: there are no snapshots: ")
