# SPDX-License-Identifier: Apache-2.0
"""Unpack a layer blob into a directory, as containerd's overlay differ would have.

The directory is the upper side of an overlay: ``.wh.X`` becomes a 0/0 character device, ``.wh..wh..opq`` an opaque
mark. Directories that the layer implies without listing them take their attributes from the layers below, which need
not be here yet: `unpack_stream` says which they are, and `soci_snapshotter.settle` has the rest.

What a file costs is its creation, its bytes and what differs from what the kernel made of it: its directory is open
already, owner and mode are set where they are others, and no path is walked twice. Nothing outside the directory can
be reached (see `soci_snapshotter.parents`).
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from soci.digest import Digest, new_hash
from soci.errors import InvalidTar, LimitExceeded, Mismatch, Unsupported
from soci.oci import layer_compression
from soci.tar import Member, iter_members
from soci.toc import MAX_ENTRIES, Algorithm, TocEntry
from soci.ztoc import mtime_ns, xattrs
from soci_snapshotter import userxattr
from soci_snapshotter.directories import error_of, remove_tree
from soci_snapshotter.inflated import LAYER_BYTES, Blob, Inflated
from soci_snapshotter.parents import DIRECTORY, Parents, Parts
from soci_snapshotter.settle import Implied, settle

NAMES_BYTES = 256 << 20
"""Bytes of directory names kept until a layer is unpacked."""
IMPLIED_BYTES: Final = 16 << 20
"""Bytes of the names of directories that one layer implies."""
PATH_BYTES = 4096
"""Bytes of a path, as the kernel has it for those who unpack by path."""
LATEST_NS = (1 << 63) - 1
"""Times beyond this are unpacked as 1970, like those before it, as containerd does."""
EARLY_BYTES: Final = 1 << 18
"""Files from this size on are sent to the disk as soon as they are written: in the end all must be there."""
OPAQUE = b".wh..wh..opq"
WHITEOUT = b".wh."

# An image may not steer overlayfs. containerd leaves out the first too; lazy layers show neither.
_NOT_SET = (b"trusted.", b"user.overlay.")
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_SYNC_FILE_RANGE_WRITE: Final = 2


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A layer in its directory: bytes and members written, whether the layer lists the root directory itself, and
    the directories that it implies.
    """

    written: int
    entries: int
    root_listed: bool
    implied: Sequence[Implied]


def unpack(  # noqa: PLR0913  a layer, a place, and what is known of both
    blob: Path,
    target: Path,
    *,
    media_type: str,
    diff_id: Digest,
    lower: Sequence[Path],
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[int, int]:
    """Unpack ``blob`` into the empty directory ``target`` over ``lower``; bytes and entries written, all of them on
    disk. Raises as `unpack_stream`.
    """
    algorithm_of(media_type)  # before anything is looked for
    try:
        with blob.open("rb") as file:
            done = unpack_stream(file, target, media_type=media_type, diff_id=diff_id, stopped=stopped)
        settle(target, lower, done.implied)
        sync(target)
    except OSError as error:
        raise error_of(error, "the layer does not unpack") from error
    return done.written, done.entries


def unpack_stream(
    blob: Blob, target: Path, *, media_type: str, diff_id: Digest, stopped: Callable[[], bool] = lambda: False
) -> Unpacked:
    """Unpack ``blob`` into the empty directory ``target``; nothing is synced.

    Raises `Mismatch` where the uncompressed bytes are not ``diff_id``, and other `SociError`s for what does not
    unpack: the directory is then to be thrown away. Ends soon after ``stopped()`` is true.
    """
    compression = algorithm_of(media_type)
    digest = new_hash(diff_id)
    try:
        root = os.open(target, DIRECTORY)
        try:
            layer = _Layer(root)
            try:
                with Inflated(blob, digest, algorithm=compression, stopped=stopped) as stream:
                    written, entries = _unpack(stream, layer)
                    found = stream.finish()
            finally:
                layer.close()
        finally:
            os.close(root)
    except OSError as error:
        raise error_of(error, "the layer does not unpack") from error
    except (ValueError, OverflowError) as error:  # a zero byte in a name, an owner beyond 32 bits
        raise InvalidTar(f"the layer does not unpack: {error}") from error
    if found != diff_id.partition(":")[2]:
        raise Mismatch(f"the unpacked layer is {digest.name}:{found}, the image says {diff_id}")
    return Unpacked(written, entries, layer.root_listed, layer.implied())


def algorithm_of(media_type: str) -> Algorithm:
    """How a layer of this type is compressed; `Unsupported` for one that cannot be unpacked."""
    compression = layer_compression(media_type)
    if compression is None:
        raise Unsupported(f"a layer of type {media_type[:200]!r} cannot be unpacked here")
    return compression


def _unpack(stream: Inflated, layer: _Layer) -> tuple[int, int]:
    written = entries = 0
    for member in iter_members(stream.read):
        entries += 1
        if entries > MAX_ENTRIES:
            raise LimitExceeded(f"more than {MAX_ENTRIES} members in a layer (MAX_ENTRIES)")
        if member.entry.type == "reg" and member.entry.size > LAYER_BYTES:
            raise LimitExceeded(f"a file of {member.entry.size} bytes in a layer; {LAYER_BYTES} (LAYER_BYTES)")
        written += layer.put(member)
    layer.finish()
    return written, entries


@lru_cache(maxsize=1)
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return libc


def sync(target: Path) -> None:
    """Have the file system's data on disk: a snapshot that is committed is still whole after power was lost."""
    descriptor = os.open(target, DIRECTORY)
    try:
        if _libc().syncfs(descriptor) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(descriptor)


class _Layer:
    """The directory being filled. Directory times are set at the end, when nothing changes them any more."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._parents = Parents(root)
        self._times: dict[Parts, int] = {}
        self._names = 0
        self._implied: dict[Parts, bool] = {}  # and whether it was listed later on
        self._implied_names = 0
        self.root_listed = False

    def close(self) -> None:
        self._parents.close()

    def implied(self) -> tuple[Implied, ...]:
        """The directories that were implied, each before those below it."""
        return tuple(Implied(parts, listed=listed) for parts, listed in self._implied.items())

    def _remember(self, parts: Parts, when: int) -> None:
        if parts not in self._times:
            self._names += sum(map(len, parts))
            if self._names > NAMES_BYTES:
                raise LimitExceeded(f"directory names of more than {NAMES_BYTES} bytes in a layer (NAMES_BYTES)")
        self._times[parts] = when

    def put(self, member: Member) -> int:
        """One member of the tar; the bytes it holds."""
        entry = member.entry
        parts = split(entry.name)
        if not parts:
            if entry.type == "dir":
                self.root_listed = True
                _dress(self._root, entry)
                self._remember((), _time(entry))
            return 0
        name = parts[-1]
        if name == OPAQUE:
            os.setxattr(self._parents.open(parts[:-1], self._imply), userxattr.opaque(), b"y")
            return 0
        if name.startswith(WHITEOUT):
            _whiteout(self._parents.open(parts[:-1], self._imply), name[len(WHITEOUT) :])
            return 0
        if entry.type == "dir":
            self._directory(parts, entry)
            return 0
        return self._entry(parts, member)

    def _entry(self, parts: Parts, member: Member) -> int:
        entry, name = member.entry, parts[-1]
        parent = self._parents.open(parts[:-1], self._imply)
        self._times.pop(parts, None)
        if entry.type == "reg":
            return self._file(parent, parts, member)
        self._clear(parent, parts)
        match entry.type:
            case "symlink":
                os.symlink(entry.linkname, name, dir_fd=parent)
            case "hardlink":
                self._hardlink(parent, name, entry)
                return 0
            case "char" | "block":
                kind = stat.S_IFCHR if entry.type == "char" else stat.S_IFBLK
                os.mknod(name, kind | 0o600, os.makedev(entry.devmajor, entry.devminor), dir_fd=parent)
            case "fifo":
                os.mkfifo(name, 0o600, dir_fd=parent)
        _dress_by_name(parent, name, entry)
        return 0

    def _file(self, parent: int, parts: Parts, member: Member) -> int:
        entry, name = member.entry, parts[-1]
        mode = stat.S_IMODE(entry.mode) & 0o777  # set at once: the directory above it all is for root alone
        try:
            descriptor = os.open(name, _NEW, mode, dir_fd=parent)
        except FileExistsError:
            self._clear(parent, parts)
            descriptor = os.open(name, _NEW, mode, dir_fd=parent)
        size = 0
        try:
            for chunk in member.chunks():
                written = os.write(descriptor, chunk)
                if written < len(chunk):
                    _write_rest(descriptor, chunk, written)
                size += len(chunk)
            _dress(descriptor, entry)
            when = _time(entry)
            os.utime(descriptor, ns=(when, when))
            if size >= EARLY_BYTES:
                _libc().sync_file_range(descriptor, 0, 0, _SYNC_FILE_RANGE_WRITE)
        finally:
            os.close(descriptor)
        return size

    def _directory(self, parts: Parts, entry: TocEntry) -> None:
        parent = self._parents.open(parts[:-1], self._imply)
        name = parts[-1]
        try:
            os.mkdir(name, 0o755, dir_fd=parent)
            self._implied.pop(parts, None)
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode):
                self._clear(parent, parts)
                os.mkdir(name, 0o755, dir_fd=parent)
                self._implied.pop(parts, None)
            elif parts in self._implied:
                self._implied[parts] = True
        _dress(self._parents.open(parts), entry)
        self._remember(parts, _time(entry))

    def _hardlink(self, parent: int, name: bytes, entry: TocEntry) -> None:
        target = split(entry.linkname)
        if not target:
            raise InvalidTar(f"hard link {entry.name!r} to the root")
        here = os.dup(parent)  # opening another one may close it
        try:
            other = self._parents.open(target[:-1])
            os.link(target[-1], name, src_dir_fd=other, dst_dir_fd=here, follow_symlinks=False)
        finally:
            os.close(here)

    def _imply(self, parent: int, parts: Parts) -> None:
        """A directory that the layer implies: 0755 of root, until the layers below are asked."""
        os.mkdir(parts[-1], dir_fd=parent)
        os.chmod(_path(parent, parts[-1]), 0o755)  # noqa: S103  whatever the umask
        if parts not in self._implied:
            self._implied_names += sum(map(len, parts)) + len(parts)
            if self._implied_names > IMPLIED_BYTES:
                raise LimitExceeded(f"a layer implies directories of more than {IMPLIED_BYTES} bytes (IMPLIED_BYTES)")
        self._implied[parts] = False

    def _clear(self, parent: int, parts: Parts) -> None:
        """Take away what an earlier member put at this name."""
        name = parts[-1]
        try:
            found = os.lstat(name, dir_fd=parent)
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(found.st_mode):
            os.unlink(name, dir_fd=parent)
            return
        self._parents.forget(parts)
        remove_tree(parent, name)

    def finish(self) -> None:
        """Give directories their times."""
        for parts, when in self._times.items():
            with suppress(FileNotFoundError, NotADirectoryError):  # something else stands there by now
                os.utime(self._parents.open(parts), ns=(when, when))


def _whiteout(parent: int, hidden: bytes) -> None:
    if hidden in {b"", b".", b".."} or hidden.startswith(WHITEOUT):
        return  # aufs's own files; nothing is hidden by them
    with suppress(FileExistsError):  # a real entry of this layer stands there already
        os.mknod(hidden, stat.S_IFCHR, os.makedev(0, 0), dir_fd=parent)


def _write_rest(descriptor: int, chunk: bytes, written: int) -> None:
    view = memoryview(chunk)[written:]
    while view:
        view = view[os.write(descriptor, view) :]


def split(name: bytes) -> tuple[bytes, ...]:
    """The components of a member's name, cleaned: no empty ones, no dots, and ``..`` never above the root."""
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part in {b"", b"."}:
            continue
        if part == b"..":
            if parts:
                parts.pop()
        else:
            parts.append(part)
    length = sum(map(len, parts)) + len(parts)
    if length > PATH_BYTES:
        raise InvalidTar(f"a path of {length} bytes; {PATH_BYTES} are allowed")
    return tuple(parts)


def _path(parent: int, name: bytes) -> bytes:
    """``name`` in a directory that is open, for calls that take no descriptor."""
    return b"/proc/self/fd/%d/%b" % (parent, name)


def _dress(descriptor: int, entry: TocEntry) -> None:
    """Owner, then mode (a change of owner clears setuid), then xattrs, of a file or directory that is open."""
    found = os.fstat(descriptor)
    mode = stat.S_IMODE(entry.mode)
    if (found.st_uid, found.st_gid) != (entry.uid, entry.gid):
        os.chown(descriptor, _id(entry.uid), _id(entry.gid))
        os.chmod(descriptor, mode)
    elif stat.S_IMODE(found.st_mode) != mode:
        os.chmod(descriptor, mode)
    if entry.pax:
        _set_xattrs(descriptor, entry)


def _dress_by_name(parent: int, name: bytes, entry: TocEntry) -> None:
    """The same, and the time, of what is not to be opened."""
    path = _path(parent, name)
    os.chown(name, _id(entry.uid), _id(entry.gid), dir_fd=parent, follow_symlinks=False)
    if entry.type != "symlink":
        os.chmod(path, stat.S_IMODE(entry.mode))
    if entry.pax:
        _set_xattrs(path, entry)
    when = _time(entry)
    os.utime(name, ns=(when, when), dir_fd=parent, follow_symlinks=False)


def _time(entry: TocEntry) -> int:
    """When the member was changed, ns; containerd unpacks what is before 1970, or beyond 64 bits, as 1970."""
    when = mtime_ns(entry)
    return when if 0 <= when <= LATEST_NS else 0


def _id(number: int) -> int:
    return number - 2**32 if number >= 2**31 else number


def _set_xattrs(where: int | bytes, entry: TocEntry) -> None:
    for key, value in xattrs(entry).items():
        if key.startswith(_NOT_SET):
            continue
        try:
            if isinstance(where, int):
                os.setxattr(where, key, value)
            else:
                os.setxattr(where, key, value, follow_symlinks=False)
        except OSError as error:
            # what the file system or the kernel will not take is left out, as containerd leaves it out
            if error.errno not in {errno.EOPNOTSUPP, errno.EPERM}:
                raise
