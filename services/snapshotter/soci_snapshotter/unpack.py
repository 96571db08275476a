# SPDX-License-Identifier: Apache-2.0
"""Unpack a layer blob into a snapshot's directory, as containerd's overlay differ would have.

The directory is the upper side of an overlay: ``.wh.X`` becomes a 0/0 character device, ``.wh..wh..opq`` an opaque
mark, and directories that the layer implies take their attributes from the layers below.

Nothing outside the directory can be reached: each step of a path is opened relative to its parent's descriptor with
O_NOFOLLOW, so neither ``..`` nor a symlink that the layer planted leads out.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from soci.digest import Digest, hex_of
from soci.errors import InvalidGzip, InvalidTar, LimitExceeded, Mismatch, SociError, Unsupported
from soci.tar import Member, iter_members
from soci.toc import TocEntry
from soci.ztoc import mtime_ns, xattrs

READ_BYTES = 1 << 20
"""Compressed bytes read at a time."""
OPAQUE = b".wh..wh..opq"
WHITEOUT = b".wh."
DEPTH_LIMIT = 4096
"""Components of a path."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class _Inflated:
    """The uncompressed bytes of a blob, read once from front to back, digested on the way."""

    def __init__(self, blob: BinaryIO, *, gzip: bool) -> None:
        self._blob = blob
        self._gzip = gzip
        self._inflater = zlib.decompressobj(31) if gzip else None
        self._ready = b""
        self._digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes; empty at the end."""
        while not self._ready:
            piece = self._more()
            if piece is None:
                return b""
            self._ready = piece
        piece, self._ready = self._ready[:size], self._ready[size:]
        self._digest.update(piece)
        return piece

    def _more(self) -> bytes | None:
        if self._inflater is None:
            return self._blob.read(READ_BYTES) or None
        tail = self._inflater.unconsumed_tail or self._inflater.unused_data or self._blob.read(READ_BYTES)
        try:
            if self._inflater.eof:
                if not tail:
                    return None
                self._inflater = zlib.decompressobj(31)  # the next member of a multi-member stream
            elif not tail:
                raise InvalidGzip("the layer's gzip stream is cut short")
            return self._inflater.decompress(tail, READ_BYTES)
        except zlib.error as error:
            raise InvalidGzip(f"the layer's gzip stream is damaged: {error}") from error

    def finish(self) -> str:
        """Read what is left and give the SHA-256 of all of it."""
        while self.read(READ_BYTES):
            pass
        return self._digest.hexdigest()


def unpack(blob: Path, target: Path, *, media_type: str, diff_id: Digest, lower: Sequence[Path]) -> tuple[int, int]:
    """Unpack ``blob`` into the empty directory ``target``; bytes and entries written.

    Raises `Mismatch` where the uncompressed bytes are not ``diff_id``: the directory is then to be thrown away.
    """
    if media_type.endswith("zstd"):
        raise Unsupported(f"{media_type} cannot be unpacked here yet")
    gzip = media_type.endswith("gzip")
    written = entries = 0
    with blob.open("rb") as file:
        stream = _Inflated(file, gzip=gzip)
        root = os.open(target, _DIRECTORY)
        try:
            layer = _Layer(root, lower)
            for member in iter_members(stream.read):
                written += layer.put(member)
                entries += 1
            layer.finish()
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise LimitExceeded(f"no room to unpack the layer: {error}") from error
            raise SociError(f"the layer does not unpack: {error}") from error
        finally:
            os.close(root)
        found = stream.finish()
    if found != hex_of(diff_id):
        raise Mismatch(f"the unpacked layer is sha256:{found}, the image says {diff_id}")
    return written, entries


class _Layer:
    """The directory being filled. Directory times are set at the end, when nothing changes them any more."""

    def __init__(self, root: int, lower: Sequence[Path]) -> None:
        self._root = root
        self._lower = lower
        self._times: dict[tuple[bytes, ...], int] = {}

    def put(self, member: Member) -> int:
        """One member of the tar; the bytes it holds."""
        entry = member.entry
        parts = split(entry.name)
        if not parts:
            if entry.type == "dir":
                _attributes(self._root, b".", entry, follow_ok=True)
                self._times[()] = _time(entry)
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
            self._times[parts] = _time(entry)
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
        os.mkdir(parts[-1], 0o755, dir_fd=parent)
        path = os.path.join(*parts)
        for lower in self._lower:
            try:
                found = os.lstat(os.path.join(os.fsencode(lower), path))
            except OSError:
                continue
            if stat.S_ISDIR(found.st_mode):
                copy_directory(os.path.join(os.fsencode(lower), path), found, parent, parts[-1])
                self._times[parts] = found.st_mtime_ns
            return

    def finish(self) -> None:
        """Give directories their times, the deepest first."""
        for parts, when in sorted(self._times.items(), key=lambda item: len(item[0]), reverse=True):
            with suppress(FileNotFoundError, NotADirectoryError):
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
    if len(parts) > DEPTH_LIMIT:
        raise InvalidTar(f"a path of {len(parts)} components; {DEPTH_LIMIT} are allowed")
    return tuple(parts)


def copy_directory(source: bytes, found: os.stat_result, parent: int, name: bytes) -> None:
    """Owner, mode and xattrs of a lower directory onto one of this layer."""
    os.chown(name, found.st_uid, found.st_gid, dir_fd=parent, follow_symlinks=False)
    os.chmod(f"/proc/self/fd/{parent}".encode() + b"/" + name, stat.S_IMODE(found.st_mode))
    for key in os.listxattr(source, follow_symlinks=False):
        if not key.startswith(("trusted.overlay.", "user.overlay.")):
            with suppress(OSError):
                value = os.getxattr(source, key, follow_symlinks=False)
                os.setxattr(f"/proc/self/fd/{parent}".encode() + b"/" + name, key, value, follow_symlinks=False)


def _clear(parent: int, name: bytes) -> None:
    """Take away what an earlier member put at this name."""
    try:
        found = os.lstat(name, dir_fd=parent)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode):
        os.unlink(name, dir_fd=parent)
        return
    below = os.open(name, _DIRECTORY, dir_fd=parent)
    try:
        for child in os.listdir(below):
            _clear(below, os.fsencode(child))
    finally:
        os.close(below)
    os.rmdir(name, dir_fd=parent)


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
    path = f"/proc/self/fd/{parent}".encode() + b"/" + name
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
    """When the member was changed, ns; containerd unpacks what is before 1970 as 1970."""
    return max(0, mtime_ns(entry))


def _id(number: int) -> int:
    return number - 2**32 if number >= 2**31 else number


def _set_xattr(path: bytes, key: bytes, value: bytes) -> None:
    try:
        os.setxattr(path, key, value, follow_symlinks=False)
    except OSError as error:
        # what the file system or the kernel will not take is left out, as containerd leaves it out
        if error.errno not in {errno.EOPNOTSUPP, errno.EPERM}:
            raise
