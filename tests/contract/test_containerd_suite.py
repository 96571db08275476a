# SPDX-License-Identifier: Apache-2.0
"""containerd's own test suite for snapshotters, run against ours by containerd's own proxy client.

The suite is Go and comes with Debian's containerd; ``suite/snapshots`` runs it on a socket. It is run on ours, on ours
inside containerd, and, as the control, on containerd's overlayfs served by ``suite/overlayserver``. What is skipped
there may be skipped for ours, and nothing else.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from soci.errors import NotFound
from soci_dev.golang import go_program
from soci_dev.processes import Daemon
from soci_dev.stack import Stack
from support.snapshotter import Process

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]  # the first run on a machine builds the Go programs

RUN_SECONDS = 120.0
READY_SECONDS = 30.0
TOP = "TestSnapshotter"
NAMES = (
    *("Basic", "StatActive", "StatComitted", "TransitivityTest", "PreareViewFailingtest", "Update", "Remove", "Walk"),
    *("LayerFileupdate", "RemoveDirectoryInLowerLayer", "Chown", "DirectoryPermissionOnCommit"),
    *("RemoveIntermediateSnapshot", "DeletedFilesInChildSnapshot", "MoveFileFromLowerLayer", "Rename"),
    *("ViewReadonly", "StatInWalk", "CloseTwice", "RootPermission", "128LayersMount"),
)
"""The suite's tests, as containerd spells them."""
RESULT = re.compile(rf"^ *--- (PASS|FAIL|SKIP): {TOP}/(\S+) ", re.MULTILINE)


@dataclass(frozen=True)
class Run:
    """The suite, run once: the result of each test, and all it printed."""

    results: dict[str, str]
    output: str

    def said(self, name: str) -> str:
        """What was printed while that test ran."""
        sections = re.split(r"^(?==== )", self.output, flags=re.MULTILINE)
        return "".join(one for one in sections if re.match(rf"=== \w+ +{TOP}/{re.escape(name)}$", one.split("\n")[0]))


def run_suite(socket: Path, name: str, work: Path) -> Run:
    work.mkdir()
    environment = os.environ | {"SNAPSHOTTER_SOCKET": str(socket), "SNAPSHOTTER_NAME": name, "TMPDIR": str(work)}
    done = subprocess.run(
        [go_program("snapshots"), "-test.v", f"-test.timeout={RUN_SECONDS:.0f}s"],
        env=environment,
        cwd=work,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        timeout=RUN_SECONDS + 10,
    )
    return Run({test: result for result, test in RESULT.findall(done.stdout)}, done.stdout)


@contextmanager
def overlay_served(folder: Path) -> Iterator[Path]:
    """containerd's overlayfs snapshotter on a socket; its path."""
    socket = folder / "o.sock"
    words = [str(go_program("overlayserver")), str(folder / "root"), str(socket)]
    daemon = Daemon("overlayserver", words, folder / "log", os.environ, folder)
    try:
        daemon.wait(socket.exists, "listening", READY_SECONDS)
        yield socket
    finally:
        daemon.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def runs(
    stack_folder: Callable[[], Path], make_stack: Callable[..., Stack], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Run]:
    """Runs the suite on the snapshotter of that name, once."""

    @cache
    def run(which: str) -> Run:
        work = tmp_path_factory.mktemp("suite") / "work"  # on the machine's own file system: overlay goes on it
        if which == "overlayfs":
            with overlay_served(stack_folder()) as socket:
                return run_suite(socket, "", work)
        if which == "sociable-in-containerd":
            stack = make_stack(registries=0, services=("snapshotter",))
            return run_suite(stack.containerd_address, "sociable", work)
        process = Process(stack_folder())
        try:
            process.start()
            made = run_suite(process.socket, "", work)
            assert process.stop() == 0
            return made
        finally:
            process.close()

    return run


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", ["sociable", "sociable-in-containerd", "overlayfs"])
def test_suite(runs: Callable[[str], Run], which: str, name: str) -> None:
    """Each test of containerd's suite passes; one that containerd skips for its own snapshotter is skipped for ours."""
    run, control = runs(which), runs("overlayfs")
    allowed = {"PASS", "SKIP"} if control.results.get(name) == "SKIP" else {"PASS"}
    assert run.results.get(name, "did not run") in allowed, run.said(name) or run.output


@pytest.mark.parametrize("which", ["sociable", "sociable-in-containerd", "overlayfs"])
def test_the_suite_is_whole(runs: Callable[[str], Run], which: str) -> None:
    """Every test of the suite has a row above, so that none is forgotten when containerd adds some."""
    run = runs(which)
    assert set(run.results) == set(NAMES), run.output
    passed = sum(result == "PASS" for result in run.results.values())
    print(f"{which}: {passed} passed of {len(run.results)}")  # noqa: T201


def test_go_programs_that_are_none() -> None:
    """A program that nobody wrote is not found; the others are not built again for it."""
    built = go_program("snapshots").stat().st_mtime_ns
    with pytest.raises(NotFound, match="no Go program none"):
        go_program("none")
    assert go_program("snapshots").stat().st_mtime_ns == built
