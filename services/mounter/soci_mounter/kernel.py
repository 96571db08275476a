# SPDX-License-Identifier: Apache-2.0
"""The few system calls and kernel files that the mounter needs beside FUSE itself."""

from __future__ import annotations

import ctypes
import errno
import os
import re
from pathlib import Path

from soci.errors import FailedPrecondition

MNT_DETACH = 2  # umount2(2)
UMOUNT_NOFOLLOW = 8
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8  # mount(2)
MAX_STACKED = 64  # dead mounts piled on one directory before we give up
# Requests for read-ahead that the kernel keeps with us at once, over all layers. Its default of 12 would let a dozen
# reads that wait for one slow registry hold up every other layer's read-ahead.
MAX_BACKGROUND = 4096
READ_AHEAD_KIB = 1024  # the longest single read that the kernel's read-ahead asks for
EROFS_READ_AHEAD_KIB = 512  # the same of an EROFS mount: with its 128 a large file that is here is read half as fast
_BDI = Path("/sys/class/bdi")

_libc = ctypes.CDLL(None, use_errno=True)


def detach(path: Path) -> bool:
    """Take the top mount off ``path``, at once, whoever uses it: umount2(2) with MNT_DETACH. False: none there."""
    if _libc.umount2(os.fsencode(path), MNT_DETACH | UMOUNT_NOFOLLOW) == 0:
        return True
    number = ctypes.get_errno()
    if number in {errno.EINVAL, errno.ENOENT}:
        return False
    raise FailedPrecondition(f"cannot unmount {path}: {os.strerror(number)}")


def give_back() -> None:
    """Give memory that is free back to the kernel: malloc_trim(3), where the C library has it. Takes milliseconds."""
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(0)


def has_file_system(name: str) -> bool:
    """Whether the kernel knows a file system, or loads its module at the first mount."""
    known = Path("/proc/filesystems").read_text(encoding="ascii").split()
    modules = Path("/lib/modules") / os.uname().release / "kernel/fs" / name
    return name in known or modules.is_dir()


def _unescape(text: str) -> str:
    """Undo the octal escapes of /proc/self/mountinfo (proc(5)): blanks and backslashes of paths."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def mounted_at(path: Path, mountinfo: str | None = None) -> list[tuple[str, str]]:
    """``(device number, type)`` of every mount exactly at ``path``, oldest first. See `mounts_at`."""
    return [(device, kind) for device, kind, _ in mounts_at(path, mountinfo)]


def mounts_at(path: Path, mountinfo: str | None = None) -> list[tuple[str, str, str]]:
    """``(device number, type, source)`` of every mount exactly at ``path``, oldest first.

    Reads /proc/self/mountinfo and not the path itself: a FUSE mount whose server is gone answers ENOTCONN to stat,
    and one whose server hangs would make us hang too.
    """
    if mountinfo is None:
        mountinfo = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    found = []
    for line in mountinfo.splitlines():
        fields, _, rest = line.partition(" - ")
        words = fields.split(" ")
        if len(words) >= 5 and _unescape(words[4]) == str(path):
            kind, source = (*rest.split(" "), "")[:2]
            found.append((words[2], kind, _unescape(source)))
    return found


def clear(path: Path) -> int:
    """Detach everything that is mounted at ``path``, dead or alive; returns how many mounts there were."""
    for count in range(MAX_STACKED):
        if not mounted_at(path) or not detach(path):
            return count
    raise FailedPrecondition(f"more than {MAX_STACKED} mounts on {path}; unmount them by hand")


def tune(path: Path, scratch: Path) -> dict[str, bool]:
    """Raise the connection's limits of requests in flight and of read-ahead; says which of them took.

    The files are root's, and a container may have them read-only: the defaults then stay, slower but right. Where
    nobody has mounted the kernel's file system of FUSE connections it is mounted at ``scratch`` for the moment.
    """
    mounts = mounted_at(path)
    if not mounts:
        return {}
    device = mounts[-1][0]
    minor = device.partition(":")[2]
    took = {"read_ahead_kb": _write(_BDI / device / "read_ahead_kb", READ_AHEAD_KIB)}
    connection = Path("/sys/fs/fuse/connections") / minor
    mounted = not connection.exists() and _mount_fusectl(scratch)
    if mounted:
        connection = scratch / minor
    took["congestion_threshold"] = _write(connection / "congestion_threshold", MAX_BACKGROUND * 3 // 4)
    took["max_background"] = _write(connection / "max_background", MAX_BACKGROUND)
    if mounted:
        clear(scratch)
    return took


def erofs_devices() -> frozenset[str]:
    """The names under which the kernel keeps the read-ahead of each EROFS mount from a file.

    It numbers them, and tells of no mount which is its own: a new one is found by looking before and after.
    """
    try:
        return frozenset(entry.name for entry in _BDI.iterdir() if entry.name.startswith("erofs-"))
    except OSError:
        return frozenset()


def tune_erofs(before: frozenset[str]) -> bool:
    """Raise the read-ahead of the mount that came since ``before``; False where that cannot be, or who came is unclear.

    The file may be read-only in a container: then large files are read more slowly, but right.
    """
    new = erofs_devices() - before
    return len(new) == 1 and _write(_BDI / next(iter(new)) / "read_ahead_kb", EROFS_READ_AHEAD_KIB)


def _mount_fusectl(where: Path) -> bool:
    try:
        where.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return False
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    failed: int = _libc.mount(b"fusectl", os.fsencode(where), b"fusectl", ctypes.c_ulong(flags), None)
    return not failed


def _write(file: Path, value: int) -> bool:
    try:
        file.write_text(str(value), encoding="ascii")
    except OSError:
        return False
    return True
