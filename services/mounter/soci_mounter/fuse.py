# SPDX-License-Identifier: Apache-2.0
"""The kernel's side: `FileSystem` as pyfuse3's operations. Nothing else of the mounter knows pyfuse3.

An exception that escapes an operation would leave its reader hanging for ever, so each one goes through a border that
turns whatever happens into an errno. Layers never change: the kernel may keep what it learned of them for ever. Only
the root directory changes, and there an entry lives a second.
"""
# ruff: noqa: D102  the operations mean what fuse(4) and pyfuse3 say

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import os
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import pyfuse3
import pyfuse3.asyncio

from soci.errors import NotFound, SociError, Unavailable
from soci_mounter import kernel, numbers
from soci_mounter.filesystem import BLOCK, NAME_MAX, Attributes, FileSystem

FOREVER = 365 * 24 * 3600.0
ROOT_TTL = 1.0
"""Seconds for which the kernel may keep an entry of a layer, and one of the root."""
REQUESTS = 4096
"""Requests answered at once. A read that waits for its bytes holds one: with few, a registry that is away would soon
keep the kernel from even looking at names."""
LAST_ANSWERS = 5.0
"""Seconds for operations under way to end when serving is cancelled."""
OPTIONS = frozenset(
    # `suid` and `dev`: the mount must allow what a folder of unpacked layers would; who may use what in a container
    # is decided by the mounts made from it.
    {"ro", "allow_other", "default_permissions", "suid", "dev", "fsname=soci", "subtype=soci"}
)

P = ParamSpec("P")
R = TypeVar("R")
Report = Callable[[str, BaseException], None]


def errno_of(error: BaseException) -> int:
    """The errno that a reader gets: an `OSError`'s own, ENOENT for `NotFound`, EIO for everything else."""
    if isinstance(error, OSError) and isinstance(error.errno, int) and error.errno > 0:
        return error.errno
    return errno.ENOENT if isinstance(error, NotFound) else errno.EIO


def border(
    operation: Callable[Concatenate[FuseOperations, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[FuseOperations, P], Coroutine[Any, Any, R]]:
    """Let nothing but `FUSEError` out of an operation; what no operation should raise is reported."""

    @functools.wraps(operation)
    async def guarded(self: FuseOperations, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await operation(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except BaseException as error:  # noqa: BLE001  a cancelled task's reader wants its answer, too
            if not isinstance(error, OSError | SociError):
                self.report(operation.__name__, error)
            raise pyfuse3.FUSEError(errno_of(error)) from None

    return guarded


async def _refuse(*_args: object) -> NoReturn:
    raise pyfuse3.FUSEError(errno.EROFS)


_REFUSED: Any = _refuse


def _entry(attributes: Attributes) -> pyfuse3.EntryAttributes:
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = pyfuse3.InodeT(attributes.ino)
    entry.st_mode = pyfuse3.ModeT(attributes.mode)
    entry.st_nlink = attributes.nlink
    entry.st_uid = attributes.uid
    entry.st_gid = attributes.gid
    entry.st_rdev = attributes.rdev
    entry.st_size = attributes.size
    entry.st_blksize = BLOCK
    entry.st_blocks = -(-attributes.size // BLOCK) * (BLOCK // 512)
    entry.st_atime_ns = entry.st_ctime_ns = entry.st_mtime_ns = attributes.mtime_ns
    # Entries of the root are the roots of layers, which come and go; the root's own attributes change with them.
    node = numbers.split(attributes.ino)[1]
    entry.entry_timeout = FOREVER if node else ROOT_TTL
    entry.attr_timeout = ROOT_TTL if attributes.ino == numbers.ROOT or node == numbers.STATE_FILE else FOREVER
    return entry


class FuseOperations(pyfuse3.Operations):
    """The operations of a read-only file system whose permissions the kernel checks."""

    def __init__(self, filesystem: FileSystem, report: Report) -> None:
        super().__init__()
        self._filesystem = filesystem
        self.report = report

    @border
    async def lookup(self, parent: int, name: bytes, _context: object) -> pyfuse3.EntryAttributes:
        found = self._filesystem.lookup(parent, name)
        if found is not None:
            return _entry(found)
        if parent == numbers.ROOT:
            raise pyfuse3.FUSEError(errno.ENOENT)  # it may be there the next moment
        absent = pyfuse3.EntryAttributes()
        absent.st_ino = pyfuse3.InodeT(0)  # the kernel keeps "there is none", as overlayfs asks it of every layer
        absent.entry_timeout = FOREVER
        return absent

    @border
    async def forget(self, _inodes: Sequence[tuple[int, int]]) -> None:
        """Nodes live as long as their layer; what the kernel forgets changes nothing."""

    @border
    async def getattr(self, ino: int, _context: object) -> pyfuse3.EntryAttributes:
        return _entry(self._filesystem.getattr(ino))

    @border
    async def readlink(self, ino: int, _context: object) -> bytes:
        return self._filesystem.readlink(ino)

    @border
    async def opendir(self, ino: int, _context: object) -> int:
        return self._filesystem.opendir(ino)

    @border
    async def readdir(self, handle: int, cookie: int, token: pyfuse3.ReaddirToken) -> None:
        for name, attributes, following in self._filesystem.readdir(handle, cookie):
            if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), _entry(attributes), following):
                return

    @border
    async def releasedir(self, handle: int) -> None:
        self._filesystem.releasedir(handle)

    @border
    async def open(self, ino: int, flags: int, _context: object) -> pyfuse3.FileInfo:
        handle = pyfuse3.FileHandleT(self._filesystem.open(ino, flags))
        said = numbers.split(ino)[1] == numbers.STATE_FILE  # its content changes
        return pyfuse3.FileInfo(fh=handle, keep_cache=not said, direct_io=said)

    @border
    async def read(self, handle: int, offset: int, length: int) -> bytes:
        try:
            return await self._filesystem.read(handle, offset, length)
        except NotFound:  # the registry's or the cache's: the file itself is there
            raise pyfuse3.FUSEError(errno.EIO) from None

    @border
    async def release(self, handle: int) -> None:
        self._filesystem.release(handle)

    @border
    async def flush(self, _handle: int) -> None:
        """Nothing was written."""

    @border
    async def fsync(self, _handle: int, _data_only: bool) -> None:  # noqa: FBT001
        """Nothing was written."""

    @border
    async def fsyncdir(self, _handle: int, _data_only: bool) -> None:  # noqa: FBT001
        """Nothing was written."""

    @border
    async def statfs(self, _context: object) -> pyfuse3.StatvfsData:
        numbers_of = self._filesystem.statfs()
        answer = pyfuse3.StatvfsData()
        for name in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail"):
            setattr(answer, f"f_{name}", getattr(numbers_of, f"f_{name}"))
        answer.f_namemax = NAME_MAX
        return answer

    @border
    async def getxattr(self, ino: int, name: bytes, _context: object) -> bytes:
        return self._filesystem.getxattr(ino, name)

    @border
    async def listxattr(self, ino: int, _context: object) -> list[bytes]:
        return self._filesystem.listxattr(ino)

    # The mount is read-only, so the kernel asks none of these; should it, this is the answer.
    setattr = mknod = mkdir = unlink = rmdir = symlink = rename = link = _REFUSED
    write = create = setxattr = removexattr = _REFUSED


class Connection:
    """The one FUSE mount of this process (pyfuse3 keeps it in globals)."""

    def __init__(self, filesystem: FileSystem, where: Path, state: Path, report: Report) -> None:
        """Mount ``filesystem`` at ``where``; ``state`` is a folder of ours."""
        self._state = state
        self._operations = FuseOperations(filesystem, report)
        self._where = where
        self.alive = False

    def mount(self) -> dict[str, bool]:
        """Mount at the directory, after detaching what a dead predecessor left there; says which limits were raised."""
        kernel.clear(self._where)
        try:
            self._where.mkdir(mode=0o711, parents=True, exist_ok=True)
            os.chmod(self._where, 0o711)  # noqa: PTH101, S103  mkdir's mode goes through the umask
            pyfuse3.asyncio.enable()
            logging.getLogger("pyfuse3").setLevel(logging.ERROR)
            pyfuse3.init(self._operations, str(self._where), set(OPTIONS))
        except (OSError, RuntimeError) as error:
            raise Unavailable(f"cannot mount FUSE at {self._where}: {error}") from error
        self.alive = True
        return kernel.tune(self._where, self._state / "fusectl")

    async def serve(self) -> None:
        """Answer the kernel until `stop`, then detach; raises `Unavailable` when the mount ends before."""
        main = asyncio.get_running_loop().create_task(pyfuse3.main(max_tasks=REQUESTS))
        try:
            await asyncio.shield(main)
        finally:
            ended_early = self.alive
            self.stop()
            await asyncio.wait([main], timeout=LAST_ANSWERS)
            kernel.clear(self._where)
            # A session that is closed under an operation would take the process down; its end closes it just as well.
            if main.done():
                pyfuse3.close(unmount=False)
        if ended_early:
            raise Unavailable(f"the FUSE mount at {self._where} was taken away")

    def stop(self) -> None:
        """Take no more questions: `serve` detaches the mount, so that a successor starts clean, and returns."""
        if self.alive:
            self.alive = False
            # A worker that the kernel has just woken cannot be woken again, and sees by itself that the end has come.
            with suppress(asyncio.InvalidStateError):
                pyfuse3.terminate()

    def hidden(self, name: str) -> None:
        """Have the kernel forget an entry of the root. Does not wait: the kernel may be asking us about it."""
        if self.alive:
            root = pyfuse3.InodeT(numbers.ROOT)
            pyfuse3.invalidate_entry_async(root, pyfuse3.FileNameT(os.fsencode(name)), ignore_enoent=True)
