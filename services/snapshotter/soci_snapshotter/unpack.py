# SPDX-License-Identifier: Apache-2.0
"""Unpack a layer blob into a snapshot's directory, as containerd's overlay differ would have.

The directory is the upper side of an overlay: ``.wh.X`` becomes a 0/0 character device, ``.wh..wh..opq`` an opaque
mark, and directories that the layer implies take their attributes from the layers below.

Nothing outside the directory can be reached: each step of a path is opened relative to its parent's descriptor with
O_NOFOLLOW, so neither ``..`` nor a symlink that the layer planted leads out.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from soci.digest import Digest, new_hash
from soci.errors import InvalidTar, LimitExceeded, Mismatch, Unsupported
from soci.oci import layer_compression
from soci.tar import Member, iter_members
from soci.toc import MAX_ENTRIES, TocEntry
from soci.ztoc import mtime_ns, xattrs
from soci_snapshotter.directories import error_of, remove_tree
from soci_snapshotter.inflated import LAYER_BYTES, Inflated

NAMES_BYTES = 256 << 20
"""Bytes of directory names kept until a layer is unpacked."""
PATH_BYTES = 4096
"""Bytes of a path, as the kernel has it for those who unpack by path."""
LATEST_NS = (1 << 63) - 1
"""Times beyond this are unpacked as 1970, like those before it, as containerd does."""
OPAQUE = b".wh..wh..opq"
WHITEOUT = b".wh."

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def unpack(  # noqa: PLR0913  a layer, a place, and what is known of both
    blob: Path,
    target: Path,
    *,
    media_type: str,
    diff_id: Digest,
    lower: Sequence[Path],
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[int, int]:
    """Unpack ``blob`` into the empty directory ``target``; bytes and entries written, all of them on disk.

    Raises `Mismatch` where the uncompressed bytes are not ``diff_id``, and other `SociError`s for what does not
    unpack: the directory is then to be thrown away. Ends soon after ``stopped()`` is true.
    """
    compression = layer_compression(media_type)
    if compression is None:
        raise Unsupported(f"a layer of type {media_type[:200]!r} cannot be unpacked here")
    digest = new_hash(diff_id)
    try:
        with blob.open("rb") as file:
            stream = Inflated(file, digest, algorithm=compression, stopped=stopped)
            root = os.open(target, _DIRECTORY)
            try:
                counts = _unpack(stream, _Layer(root, lower))
                found = stream.finish()
                if found != diff_id.partition(":")[2]:
                    raise Mismatch(f"the unpacked layer is {digest.name}:{found}, the image says {diff_id}")
                _sync(root)
            finally:
                os.close(root)
    except OSError as error:
        raise error_of(error, "the layer does not unpack") from error
    except (ValueError, OverflowError) as error:  # a zero byte in a name, an owner beyond 32 bits
        raise InvalidTar(f"the layer does not unpack: {error}") from error
    return counts


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
    return ctypes.CDLL(None, use_errno=True)


def _sync(descriptor: int) -> None:
    """Have the file system's data on disk: a snapshot that is committed is still whole after power was lost."""
    if _libc().syncfs(descriptor) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class _Layer:
    """The directory being filled. Directory times are set at the end, when nothing changes them any more."""

    def __init__(self, root: int, lower: Sequence[Path]) -> None:
        self._root = root
        self._lower = lower
        self._times: dict[tuple[bytes, ...], int] = {}
        self._names = 0

    def _remember(self, parts: tuple[bytes, ...], when: int) -> None:
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
                _attributes(self._root, b".", entry, follow_ok=True)
                self._remember((), _time(entry))
            return 0
        parent = self._open_parent(parts[:-1])
        try:
            name = parts[-1]
            if name == OPAQUE:
                os.setxattr(f"/proc/self/fd/{parent}", "trusted.overlay.opaque", b"y")
            elif name.startswith(WHITEOUT):
                self._whiteout(parent, name[len(WHITEOUT) :])
            else:
                return self._entry(parent, name, parts, member)
        finally:
            os.close(parent)
        return 0

    def _whiteout(self, parent: int, hidden: bytes) -> None:
        if hidden in {b"", b".", b".."} or hidden.startswith(WHITEOUT):
            return  # aufs's own files; nothing is hidden by them
        with suppress(FileExistsError):  # a real entry of this layer stands there already
            os.mknod(hidden, stat.S_IFCHR, os.makedev(0, 0), dir_fd=parent)

    def _entry(self, parent: int, name: bytes, parts: tuple[bytes, ...], member: Member) -> int:
        entry = member.entry
        if entry.type == "dir":
            self._directory(parent, name)
            self._remember(parts, _time(entry))
        else:
            _clear(parent, name)
            self._times.pop(parts, None)
        size = 0
        match entry.type:
            case "reg":
                size = _file(parent, name, member.chunks())
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
        _attributes(parent, name, entry)
        return size

    def _directory(self, parent: int, name: bytes) -> None:
        try:
            if stat.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode):
                return
        except FileNotFoundError:
            os.mkdir(name, 0o755, dir_fd=parent)
            return
        _clear(parent, name)
        os.mkdir(name, 0o755, dir_fd=parent)

    def _hardlink(self, parent: int, name: bytes, entry: TocEntry) -> None:
        target = split(entry.linkname)
        if not target:
            raise InvalidTar(f"hard link {entry.name!r} to the root")
        other = self._open_parent(target[:-1], make=False)
        try:
            os.link(target[-1], name, src_dir_fd=other, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(other)

    def _open_parent(self, parts: tuple[bytes, ...], *, make: bool = True) -> int:
        """A descriptor of the directory ``parts``, made where it is missing."""
        here = os.dup(self._root)
        for depth, name in enumerate(parts):
            try:
                try:
                    below = os.open(name, _DIRECTORY, dir_fd=here)
                except FileNotFoundError:
                    if not make:
                        raise
                    self._imply(here, parts[: depth + 1])
                    below = os.open(name, _DIRECTORY, dir_fd=here)
            finally:
                os.close(here)
            here = below
        return here

    def _imply(self, parent: int, parts: tuple[bytes, ...]) -> None:
        """A directory that the layer implies: 0755 of root, or as the layers below have it."""
        os.mkdir(parts[-1], dir_fd=parent)
        os.chmod(_path(parent, parts[-1]), 0o755)  # noqa: S103  whatever the umask
        below = self._below(parts)
        if below is None:
            return
        try:
            copy_directory(below, parent, parts[-1])
            self._remember(parts, os.fstat(below).st_mtime_ns)
        finally:
            os.close(below)

    def _below(self, parts: tuple[bytes, ...]) -> int | None:
        """A descriptor of the directory of that path which the layers below show, if they show one.

        Symlinks are not followed: they were made by an image, and may lead out of it.
        """
        for lower in self._lower:
            here = os.open(lower, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            opaque = False
            try:
                for name in parts:
                    opaque = opaque or _is_opaque(here)
                    below = os.open(name, _DIRECTORY, dir_fd=here)
                    os.close(here)
                    here = below
            except FileNotFoundError:
                os.close(here)
                if opaque:
                    return None  # it hides what lies still lower
            except OSError as error:
                os.close(here)
                if error.errno in {errno.ENOTDIR, errno.ELOOP}:
                    return None  # a whiteout, or something else that is no directory, hides it too
                raise
            else:
                return here
        return None

    def finish(self) -> None:
        """Give directories their times, the deepest first."""
        for parts, when in sorted(self._times.items(), key=lambda item: len(item[0]), reverse=True):
            with suppress(FileNotFoundError, NotADirectoryError):  # something else stands there by now
                parent = self._open_parent(parts[:-1], make=False)
                try:
                    os.utime(parts[-1] if parts else b".", ns=(when, when), dir_fd=parent, follow_symlinks=False)
                finally:
                    os.close(parent)


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


def _is_opaque(directory: int) -> bool:
    try:
        return os.getxattr(directory, "trusted.overlay.opaque") == b"y"
    except OSError:
        return False


def copy_directory(source: int, parent: int, name: bytes) -> None:
    """Owner, mode and xattrs of a lower directory, which is open, onto one of this layer."""
    found = os.fstat(source)
    os.chown(name, found.st_uid, found.st_gid, dir_fd=parent, follow_symlinks=False)
    os.chmod(_path(parent, name), stat.S_IMODE(found.st_mode))
    with suppress(OSError):  # a file system without xattrs
        for key in os.listxattr(source):
            if not key.startswith(("trusted.overlay.", "user.overlay.")):
                with suppress(OSError):
                    os.setxattr(_path(parent, name), key, os.getxattr(source, key), follow_symlinks=False)


def _clear(parent: int, name: bytes) -> None:
    """Take away what an earlier member put at this name."""
    try:
        found = os.lstat(name, dir_fd=parent)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode):
        os.unlink(name, dir_fd=parent)
        return
    remove_tree(parent, name)


def _file(parent: int, name: bytes, chunks: Iterator[bytes]) -> int:
    size = 0
    descriptor = os.open(name, _NEW, 0o600, dir_fd=parent)
    try:
        for chunk in chunks:
            view = memoryview(chunk)
            while view:
                written = os.write(descriptor, view)
                view = view[written:]
                size += written
    finally:
        os.close(descriptor)
    return size


def _attributes(parent: int, name: bytes, entry: TocEntry, *, follow_ok: bool = False) -> None:
    """Owner, then mode (a change of owner clears setuid), then xattrs, then time."""
    path = _path(parent, name)
    os.chown(name, _id(entry.uid), _id(entry.gid), dir_fd=parent, follow_symlinks=follow_ok)
    if entry.type != "symlink":
        os.chmod(path, stat.S_IMODE(entry.mode))
    for key, value in xattrs(entry).items():
        if not key.startswith(b"trusted."):  # an image may not steer overlayfs; containerd leaves them out too
            _set_xattr(path, key, value)
    if entry.type != "dir":
        when = _time(entry)
        os.utime(name, ns=(when, when), dir_fd=parent, follow_symlinks=False)


def _time(entry: TocEntry) -> int:
    """When the member was changed, ns; containerd unpacks what is before 1970, or beyond 64 bits, as 1970."""
    when = mtime_ns(entry)
    return when if 0 <= when <= LATEST_NS else 0


def _id(number: int) -> int:
    return number - 2**32 if number >= 2**31 else number


def _set_xattr(path: bytes, key: bytes, value: bytes) -> None:
    try:
        os.setxattr(path, key, value, follow_symlinks=False)
    except OSError as error:
        # what the file system or the kernel will not take is left out, as containerd leaves it out
        if error.errno not in {errno.EOPNOTSUPP, errno.EPERM}:
            raise
