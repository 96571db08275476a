# SPDX-License-Identifier: Apache-2.0
"""soci_dev.processes and soci_dev.leftovers: child processes, and only what is ours is ended."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from soci.errors import DeadlineExceeded, InvalidInput, Unavailable
from soci_dev.leftovers import (
    file_system_of,
    mounts_below,
    parse_mountinfo,
    remove_tree,
    shims_of,
    start_time,
    unmount_below,
)
from soci_dev.processes import Daemon, end_recorded, free_port, says_ready
from soci_dev.stack import Stack, clean_stale

DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(50)"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Daemon]]:
    running: list[Daemon] = []

    def run(code: str) -> Daemon:
        daemon = Daemon("child", [sys.executable, "-c", code], tmp_path / "child.log", os.environ, tmp_path)
        running.append(daemon)
        return daemon

    yield run
    for daemon in running:
        daemon.kill()


def test_mountinfo() -> None:
    """Escaped paths are restored, and optional fields before the dash do not shift the type."""
    text = (
        "36 35 98:0 / /a\\040b rw,noatime master:1 propagate_from:2 - ext4 /dev/root rw\n"
        "37 36 0:5 / /plain rw - tmpfs none rw\nnonsense\n"
    )
    assert [(str(mount.path), mount.type) for mount in parse_mountinfo(text)] == [("/a b", "ext4"), ("/plain", "tmpfs")]


def test_file_system_of_proc() -> None:
    """The type is that of the nearest mount above."""
    assert file_system_of(Path("/proc/self")) == "proc"


@pytest.mark.parametrize(
    ("line", "ready"),
    [
        ('{"level":"info","msg":"ready","time":"…"}', True),
        ('{"msg": "ready"}', True),
        ('{"msg":"getting ready"}', False),
        ('{"msg":"x","what":"ready"}', False),
        ('not JSON "ready"', False),
        ('["ready"]', False),
    ],
)
def test_says_ready(*, line: str, ready: bool) -> None:
    """Only a JSON record whose message is exactly ready counts."""
    assert says_ready(line) is ready


def test_wait_tells_of_an_early_end(start: Callable[[str], Daemon]) -> None:
    """A daemon that ends before it is ready is reported with its status and its own words."""
    daemon = start("import sys; print('no such thing'); sys.exit(3)")
    with pytest.raises(Unavailable, match=r"(?s)status 3.*no such thing"):
        daemon.wait(daemon.said_ready, "ready", 20)


def test_wait_has_a_limit(start: Callable[[str], Daemon]) -> None:
    """A daemon that never gets ready is given up at the limit."""
    daemon = start("import time; time.sleep(50)")
    with pytest.raises(DeadlineExceeded, match="not ready"):
        daemon.wait(daemon.said_ready, "ready", 0.1)


def test_ready_line_of_an_earlier_process_does_not_count(start: Callable[[str], Daemon], tmp_path: Path) -> None:
    """After a restart with the same log, the old ready line is not taken for the new one."""
    (tmp_path / "child.log").write_text('{"msg":"ready"}\n')
    assert not start("import time; time.sleep(50)").said_ready()


def test_stop_kills_the_deaf(start: Callable[[str], Daemon]) -> None:
    """SIGKILL follows when SIGTERM is ignored."""
    daemon = start(DEAF)
    daemon.wait(lambda: "deaf" in daemon.output(), "deaf", 20)
    assert daemon.stop(grace_s=0.1) == -9


def test_recorded_processes_end_only_if_they_are_the_same(start: Callable[[str], Daemon], tmp_path: Path) -> None:
    """A recorded pid that now belongs to another process (another start time) is left alone."""
    other, ours = start("import time; time.sleep(50)"), start("import time; time.sleep(50)")
    record = tmp_path / "pids"
    record.write_text(f"{other.pid} {other.started + 1} a\n{ours.pid} {ours.started} b\nrubbish\n")
    end_recorded(record)
    assert other.returncode is None
    assert ours.returncode == -15
    assert not record.exists()


@pytest.mark.root
def test_trees_with_mounts_go(tmp_path: Path) -> None:
    """Mounts on mounts below a folder are detached before it is deleted, and what they show is not deleted."""
    shown, folder = tmp_path / "shown", tmp_path / "a folder"
    shown.mkdir()
    (shown / "precious").write_text("kept")
    (folder / "sub").mkdir(parents=True)
    for source in ("tmpfs", "tmpfs"):
        subprocess.run(["mount", "-t", "tmpfs", source, folder / "sub"], check=True)
    (folder / "sub/deep").mkdir()
    subprocess.run(["mount", "--bind", shown, folder / "sub/deep"], check=True)
    try:
        assert [mount.path.name for mount in mounts_below(folder)] == ["deep", "sub", "sub"]
        remove_tree(folder)
    finally:
        unmount_below(folder)
    assert not folder.exists()
    assert (shown / "precious").read_text() == "kept"


def test_start_time_of_the_gone() -> None:
    """A pid that nobody has gives None."""
    assert start_time(2**22 + 1) is None


def test_shims_of_a_socket(start: Callable[[str], Daemon], tmp_path: Path) -> None:
    """A shim is found by its own containerd's address alone."""
    shim = tmp_path / "containerd-shim-test"
    shim.symlink_to(sys.executable)
    daemon = Daemon(
        "shim",
        [shim, "-c", "import time; time.sleep(50)", "-address", "/x/c.sock"],
        tmp_path / "log",
        os.environ,
        tmp_path,
    )
    try:
        assert shims_of(Path("/x/c.sock")) == [daemon.pid]
        assert shims_of(Path("/x/c.sock2")) == []
    finally:
        daemon.kill()


def test_ports_are_given_once() -> None:
    """No port is handed out twice in one process."""
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) == 50


def test_long_folder_is_refused(tmp_path: Path) -> None:
    """A folder whose sockets would not fit in sun_path is refused with the reason."""
    with pytest.raises(InvalidInput, match="too long"):
        Stack(tmp_path / ("x" * 90))


def test_stale_folders_are_cleaned(tmp_path: Path) -> None:
    """What a crashed owner left in a folder goes; a folder in use stays."""
    old = tmp_path / "t-old"
    old.mkdir()
    (old / "left").write_text("over")
    with Stack(tmp_path / "t-used", registries=0, services=(), containerd=False) as used:
        clean_stale(tmp_path, "t-")
        assert not old.exists()
        assert (used.folder / "lock").exists()
        assert used.daemons["nats"].returncode is None
    assert not used.folder.exists()
