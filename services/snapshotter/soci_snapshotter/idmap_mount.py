# SPDX-License-Identifier: Apache-2.0
"""Id-mapped bind mounts: a directory shown elsewhere with other owners by the kernel itself (Linux 5.12 and later).

The map is a user namespace's, so one is made for the moment, by a process that does nothing else. The mount is
read-only: layers are, and whoever should ever delete through it would be refused.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from soci.idmap import IdMap

OVERLAY_SINCE = (5, 19)
"""The kernel whose overlayfs first takes id-mapped lower layers."""
NAMESPACE_TIMEOUT = 10.0
"""Seconds in which the process with the new user namespace must be there, and gone again."""
STACKED = 8
"""Mounts on one directory of ours before we give up."""

# numbers of all architectures
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442
_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_IDMAP = 1, 0x100000
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_FIRST_PID_NAMESPACE = "pid:[4026531836]"
# Waits in a user namespace of its own until its standard input ends.
_WAITER = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
failed = libc.unshare(0x10000000)
os.write(1, b"%d\\n" % (ctypes.get_errno() if failed else 0))
sys.stdin.read()
"""

_libc = ctypes.CDLL(None, use_errno=True)


class Maps(Protocol):
    """Maps of users and of groups."""

    @property
    def uids(self) -> IdMap:
        """Of users."""
        ...

    @property
    def gids(self) -> IdMap:
        """Of groups."""
        ...


def overlay_takes(release: str) -> bool:
    """Does overlayfs of this kernel (``uname -r``) take id-mapped lower layers?"""
    found = re.match(r"(\d+)\.(\d+)", release)
    return found is not None and (int(found[1]), int(found[2])) >= OVERLAY_SINCE


def seen_outside(folder: Path, mountinfo: str, first: str, pids: str) -> bool:
    """Does containerd see what is mounted in ``folder`` by us? Not where we are in a mount namespace of our own.

    ``mountinfo`` and ``first`` are what this process and process 1 see of mounts, ``pids`` is our pid namespace: 1 is
    the machine's only in the first of these. A mount has one number in one mount namespace, and another in the next.
    A mount namespace of our own will do where the folder's mount is shared: the kernel hands on what is mounted there.
    """
    lines = [line.split(" ") for line in mountinfo.splitlines()]
    if pids == _FIRST_PID_NAMESPACE and {words[0] for words in lines} & set(re.findall(r"^\d+", first, re.MULTILINE)):
        return True
    holder = max(
        (words for words in reversed(lines) if folder.is_relative_to(_unescape(words[4]))),
        key=lambda words: len(_unescape(words[4])),  # of mounts on one directory the last, which hides the others
        default=["-"],
    )
    return any(word.startswith("shared:") for word in holder[: holder.index("-")])


def mounts_are_seen(folder: Path) -> bool:
    """As `seen_outside`, for this process."""
    try:
        first, pids = _mountinfo("1"), os.readlink("/proc/self/ns/pid")  # noqa: PTH115
    except OSError:  # not allowed to look: then it is not ours
        first, pids = "", ""
    return seen_outside(folder.resolve(), _mountinfo(), first, pids)


def is_mounted(place: Path) -> bool:
    """Is something mounted exactly at ``place``?"""
    place = place.parent.resolve() / place.name  # the kernel tells of mounts by their real paths
    return any(_path(line) == place for line in _mountinfo().splitlines())


def bind(source: Path, target: Path, maps: Maps) -> None:
    """Show the directory ``source`` at the directory ``target``, read-only, with mapped owners.

    Raises OSError where kernel, file system or rights do not allow it; nothing is mounted then.
    """
    with _user_namespace(maps) as namespace:
        flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC
        tree = _call(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(source), flags)
        try:
            wanted = struct.pack("=QQQQ", _MOUNT_ATTR_IDMAP | _MOUNT_ATTR_RDONLY, 0, 0, namespace)
            _call(_SYS_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, wanted, ctypes.c_size_t(len(wanted)))
            _call(_SYS_MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)
        finally:
            os.close(tree)


def unbind(place: Path) -> None:
    """Take away what is mounted at ``place``, whoever uses it; nothing there is success. Raises OSError."""
    for _ in range(STACKED):
        if not is_mounted(place):
            return
        if _libc.umount2(os.fsencode(place), _MNT_DETACH | _UMOUNT_NOFOLLOW) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(place))
    raise OSError(errno.EBUSY, f"more than {STACKED} mounts", str(place))


@contextmanager
def _user_namespace(maps: Maps) -> Iterator[int]:
    """A descriptor of a user namespace with these maps."""
    waiter = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _WAITER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert waiter.stdout is not None  # noqa: S101  it was asked for
        said = waiter.stdout.readline()
        if said != b"0\n":
            number = int(said or errno.EAGAIN)
            raise OSError(number, f"no user namespace can be made: {os.strerror(number)}")
        for name, ids in (("uid_map", maps.uids), ("gid_map", maps.gids)):
            descriptor = os.open(f"/proc/{waiter.pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(descriptor, ids.text(" ", "\n").encode())  # the kernel takes it in one piece or not at all
            finally:
                os.close(descriptor)
        namespace = os.open(f"/proc/{waiter.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        _end(waiter)
    try:
        yield namespace
    finally:
        os.close(namespace)


def _end(waiter: subprocess.Popen[bytes]) -> None:
    waiter.kill()
    for pipe in (waiter.stdin, waiter.stdout):
        if pipe is not None:
            pipe.close()
    waiter.wait(NAMESPACE_TIMEOUT)


def _call(number: int, *arguments: object) -> int:
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        failed = ctypes.get_errno()
        raise OSError(failed, os.strerror(failed))
    return result


def _mountinfo(process: str = "self") -> str:
    return Path(f"/proc/{process}/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")


def _path(line: str) -> Path:
    return Path(_unescape(line.split(" ", 5)[4]))


def _unescape(text: str) -> str:
    """Undo the octal escapes of /proc/self/mountinfo (proc(5)): blanks and backslashes of paths."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
