# SPDX-License-Identifier: Apache-2.0
"""Clears away what a private stack leaves behind: containers, shims, processes, mounts; and nothing else.

Everything is found by what belongs to the stack alone: its folder, its containerd socket, its namespace, the pids it
wrote down together with their start times.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from soci.errors import FailedPrecondition, SociError
from soci_dev.tools import find

RUNC_ROOT: Final = Path("/run/containerd/runc")
"""Where containerd's runc shim keeps container state, a folder a namespace, unless told otherwise."""

_MNT_DETACH: Final = 2  # umount2(2)
_KILL_WAIT_S: Final = 5.0
_RUNC_TIMEOUT_S: Final = 20
_UNMOUNT_ROUNDS: Final = 3
_SHIM: Final = re.compile(r"containerd-shim.*")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of ``/proc/self/mountinfo`` (proc_pid_mountinfo(5)): where, and which file system type."""

    path: Path
    type: str


def parse_mountinfo(text: str) -> list[Mount]:
    r"""The mounts in the order the kernel lists them; octal escapes (``\040``) undone."""
    mounts = []
    for line in text.splitlines():
        front, dash, back = line.partition(" - ")
        fields = front.split(" ")
        if dash and len(fields) >= 5:
            mounts.append(Mount(Path(_unescape(fields[4])), back.split(" ")[0]))
    return mounts


def mounts_below(folder: Path) -> list[Mount]:
    """Mounts at or below ``folder``, the ones to unmount first coming first."""
    every = parse_mountinfo(Path("/proc/self/mountinfo").read_text())
    below = [mount for mount in every if mount.path == folder or folder in mount.path.parents]
    below.reverse()  # of two mounts on one path the later one goes first; sorting keeps that order
    return sorted(below, key=lambda mount: -len(mount.path.parts))


def file_system_of(folder: Path) -> str:
    """The type of the file system that holds ``folder`` (``ext4``, ``overlay``…)."""
    real = folder.resolve()
    every = parse_mountinfo(Path("/proc/self/mountinfo").read_text())
    holding = [mount for mount in every if mount.path == real or mount.path in real.parents]
    # The last mounted of the longest path is the one that is seen.
    return max(enumerate(holding), key=lambda item: (len(item[1].path.parts), item[0]))[1].type if holding else ""


def unmount_below(folder: Path) -> list[Path]:
    """Detach every mount at or below ``folder``; returns the paths that are still mounted after that."""
    libc = ctypes.CDLL(None, use_errno=True)
    for _ in range(_UNMOUNT_ROUNDS):  # a round can uncover mounts that were stacked on one another
        for mount in mounts_below(folder):
            libc.umount2(os.fsencode(mount.path), _MNT_DETACH)
        if not mounts_below(folder):
            return []
    return [mount.path for mount in mounts_below(folder)]


def remove_tree(folder: Path) -> None:
    """Delete ``folder``; raises `FailedPrecondition` rather than delete through a mount that would not go."""
    left = unmount_below(folder)
    if left:
        raise FailedPrecondition(f"still mounted, so not deleted: {', '.join(map(str, left))}")
    shutil.rmtree(folder, ignore_errors=True)


def start_time(pid: int) -> int | None:
    """When process ``pid`` started, in clock ticks since boot (proc_pid_stat(5) field 22); None if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name in parentheses may hold blanks and parentheses
    return None if fields[0] in "ZX" else int(fields[19])


def stop_process(pid: int, started: int, grace_s: float) -> None:
    """SIGTERM, then SIGKILL after ``grace_s``, to the process that had ``pid`` when it started at ``started``."""
    for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, _KILL_WAIT_S)):
        if start_time(pid) != started:
            return
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        end = time.monotonic() + wait_s
        while start_time(pid) == started and time.monotonic() < end:
            time.sleep(0.02)


def kill_containers(namespaces: list[str], runc_root: Path = RUNC_ROOT) -> None:
    """Delete by force every container that runc knows in ``namespaces``, which the stack alone uses."""
    for namespace in namespaces:
        home = runc_root / namespace
        for container in sorted(home.iterdir()) if home.is_dir() else []:
            command = [str(find("runc")), "--root", str(home), "delete", "--force", container.name]
            try:
                subprocess.run(command, check=False, capture_output=True, timeout=_RUNC_TIMEOUT_S)
            except (OSError, subprocess.TimeoutExpired, SociError):
                continue
        shutil.rmtree(home, ignore_errors=True)


def shims_of(containerd_socket: Path) -> list[int]:
    """Pids of the shims that answer to the containerd at ``containerd_socket``."""
    pids = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if _SHIM.fullmatch(Path(words[0]).name) and ("-address", str(containerd_socket)) in pairwise(words):
            pids.append(int(entry.name))
    return pids


def kill_shims(containerd_socket: Path) -> None:
    """End the shims of one containerd; they outlive it on purpose, so nobody else would."""
    for pid in shims_of(containerd_socket):
        started = start_time(pid)
        if started is not None:
            stop_process(pid, started, grace_s=0.5)


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
