# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PTH101, PTH102  paths of descriptors, as bytes, which pathlib has not
"""Copy a layer's directory and give all of it other owners.

Everything else stays as it is: modes with their setuid bits, times, extended attributes, hard links, holes, whiteouts.
Symbolic links are never followed. No path is longer than a name: what images hold may be deeper than a path is long.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from soci.errors import LimitExceeded, SociError
from soci_snapshotter.directories import remove_directory
from soci_snapshotter.usage import ENTRIES_LIMIT

PIECE = 64 << 20
"""Bytes that the kernel copies before we look whether anybody still waits."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OLD = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Owners(Protocol):
    """Who owns a file now."""

    def of(self, uid: int, gid: int) -> tuple[int, int]:
        """The new owner and group."""
        ...


@dataclass(slots=True)
class _Level:
    """A directory under way: as which file to know it again, its attributes, and the names still to be copied."""

    name: bytes
    old: os.stat_result
    new: int  # inode of the copy
    directories: list[bytes]


def copy_layer(source: Path, target: Path, links: Path, owners: Owners, stopped: Callable[[], bool]) -> None:
    """Copy ``source`` to the new directory ``target``; ``links``, beside it, is used meanwhile for hard links.

    Raises OSError, `InvalidInput` for an owner that cannot be, `LimitExceeded` for more than `ENTRIES_LIMIT` entries.
    """
    os.mkdir(links, 0o700)
    os.mkdir(target, 0o700)
    old = new = aside = -1
    try:
        old, new, aside = (os.open(one, _DIRECTORY) for one in (source, target, links))
        _Copy(aside, owners, stopped).tree(old, new)
    finally:
        for descriptor in (old, new, aside):
            if descriptor >= 0:
                os.close(descriptor)
    remove_directory(links)


class _Copy:
    def __init__(self, aside: int, owners: Owners, stopped: Callable[[], bool]) -> None:
        self._aside = aside
        self._owners = owners
        self._stopped = stopped
        self._links: dict[tuple[int, int], bytes] = {}  # a file with several names → its copy's name in `aside`
        self._entries = 0

    def tree(self, old: int, new: int) -> None:
        """Copy all that is in the directory ``old`` to the directory ``new``, and then its attributes."""
        here, there = os.dup(old), os.dup(new)
        try:
            levels = [self._enter(b"", here, there)]
            while True:
                if levels[-1].directories:
                    name = levels[-1].directories.pop()
                    os.mkdir(name, 0o700, dir_fd=there)
                    here, there = _step(here, name), _step(there, name)
                    levels.append(self._enter(name, here, there))
                    continue
                done = levels.pop()
                self._attributes(done.old, _of(here), _of(there))
                if not levels:
                    return
                here, there = _step(here, b".."), _step(there, b"..")
                if (os.fstat(here).st_ino, os.fstat(there).st_ino) != (levels[-1].old.st_ino, levels[-1].new):
                    raise OSError(errno.ESTALE, "moved while it was copied", os.fsdecode(done.name))
        finally:
            os.close(here)
            os.close(there)

    def _enter(self, name: bytes, here: int, there: int) -> _Level:
        """Copy all but the directories in a directory; these are left to be gone through."""
        level = _Level(name, os.fstat(here), os.fstat(there).st_ino, [])
        for text in os.listdir(here):
            self._entries += 1
            if self._entries > ENTRIES_LIMIT:
                raise LimitExceeded(f"a layer of more than {ENTRIES_LIMIT} entries (ENTRIES_LIMIT)")
            if self._stopped():
                raise SociError("copying a layer was given up")
            one = os.fsencode(text)
            found = os.lstat(one, dir_fd=here)
            if stat.S_ISDIR(found.st_mode):
                if found.st_dev != level.old.st_dev:
                    raise OSError(errno.EXDEV, "another file system is mounted inside", text)
                level.directories.append(one)
            else:
                self._file(here, there, one, found)
        return level

    def _file(self, here: int, there: int, name: bytes, found: os.stat_result) -> None:
        key = (found.st_dev, found.st_ino)
        known = self._links.get(key)
        if known is not None:
            os.link(known, name, src_dir_fd=self._aside, dst_dir_fd=there, follow_symlinks=False)
            return
        if stat.S_ISREG(found.st_mode):
            self._regular(here, there, name, found.st_size)
        elif stat.S_ISLNK(found.st_mode):
            os.symlink(os.readlink(name, dir_fd=here), name, dir_fd=there)
        else:
            os.mknod(name, stat.S_IFMT(found.st_mode) | 0o600, found.st_rdev, dir_fd=there)
        self._attributes(found, _of(here, name), _of(there, name))
        if found.st_nlink > 1:
            self._links[key] = b"%d" % len(self._links)
            os.link(name, self._links[key], src_dir_fd=there, dst_dir_fd=self._aside, follow_symlinks=False)

    def _regular(self, here: int, there: int, name: bytes, size: int) -> None:
        old = os.open(name, _OLD, dir_fd=here)
        try:
            new = os.open(name, _NEW, 0o600, dir_fd=there)
            try:
                self._content(old, new, size)
            finally:
                os.close(new)
        finally:
            os.close(old)

    def _content(self, old: int, new: int, size: int) -> None:
        """Data goes from file to file within the kernel; holes stay holes."""
        os.ftruncate(new, size)
        at = 0
        while at < size:
            try:
                at = os.lseek(old, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return  # nothing but a hole is left
                raise
            end = os.lseek(old, at, os.SEEK_HOLE)
            while at < end:
                if self._stopped():
                    raise SociError("copying a layer was given up")
                moved = os.copy_file_range(old, new, min(end - at, PIECE), at, at)
                if moved == 0:
                    raise OSError(errno.ESTALE, "changed while it was copied")
                at += moved

    def _attributes(self, found: os.stat_result, old: bytes, new: bytes) -> None:
        """Owner, then mode and xattrs (a change of owner takes setuid bits and capabilities away), then times."""
        link = stat.S_ISLNK(found.st_mode)
        os.chown(new, *self._owners.of(found.st_uid, found.st_gid), follow_symlinks=False)
        if not link:
            os.chmod(new, stat.S_IMODE(found.st_mode))
        _xattrs(old, new)
        os.utime(new, ns=(found.st_atime_ns, found.st_mtime_ns), follow_symlinks=False)


def _of(directory: int, name: bytes = b".") -> bytes:
    """A path for calls that take no descriptor: the entry of an open directory, or that directory itself."""
    return b"/proc/self/fd/%d/%b" % (directory, name)


def _xattrs(old: bytes, new: bytes) -> None:
    try:
        names = os.listxattr(old, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return
        raise
    for name in names:
        os.setxattr(new, name, os.getxattr(old, name, follow_symlinks=False), follow_symlinks=False)


def _step(here: int, name: bytes) -> int:
    there = os.open(name, _DIRECTORY, dir_fd=here)
    os.close(here)
    return there
