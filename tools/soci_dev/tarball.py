# SPDX-License-Identifier: Apache-2.0
"""Members of a layer's tar (PAX, image layer rules) from a directory tree or from an overlayfs upper directory.

A member is a ``TarInfo`` and, for a regular file, its content. Owners are numbers only; times keep their nanoseconds;
extended attributes travel as ``SCHILY.xattr.`` records. The order is sorted, so that the same tree gives the same tar.
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

Content = Path | bytes | None
"""Of a regular file: the file to read, or the bytes; None for everything else."""

Member = tuple[tarfile.TarInfo, Content]

XATTR: Final = "SCHILY.xattr."
WHITEOUT: Final = ".wh."
OPAQUE: Final = ".wh..wh..opq"
_OVERLAY: Final = "trusted.overlay."
_NOT_IN_IMAGES: Final = ("security.selinux", _OVERLAY)
_NS: Final = 1_000_000_000
_TYPES: Final = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}


def member(
    name: str,
    kind: bytes = tarfile.REGTYPE,
    content: bytes = b"",
    *,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime_ns: int = 0,
    linkname: str = "",
    device: tuple[int, int] = (0, 0),
    xattrs: dict[str, bytes] | None = None,
) -> Member:
    """One member by hand. ``linkname`` of a hard link is a path in the same tar, of a symlink its target."""
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.uid, info.gid, info.linkname = kind, mode, uid, gid, linkname
    info.devmajor, info.devminor = device
    set_mtime(info, mtime_ns)
    set_xattrs(info, xattrs or {})
    if kind != tarfile.REGTYPE:
        return info, None
    info.size = len(content)
    return info, content


def set_mtime(info: tarfile.TarInfo, mtime_ns: int) -> None:
    """Whole seconds in the header; a PAX record only where there is a fraction, as tar(1) does it."""
    seconds, fraction = divmod(mtime_ns, _NS)
    info.mtime = seconds
    if fraction:
        info.pax_headers = {**info.pax_headers, "mtime": f"{seconds}.{fraction:09d}"}


def set_xattrs(info: tarfile.TarInfo, xattrs: dict[str, bytes]) -> None:
    """Add extended attributes as PAX records."""
    records = {XATTR + name: value.decode("utf-8", "surrogateescape") for name, value in sorted(xattrs.items())}
    if records:
        info.pax_headers = {**info.pax_headers, **records}


def members_of(tree: Path, *, overlay: bool = False) -> Iterator[Member]:
    """All of ``tree`` but its root, parents before children.

    With ``overlay`` the tree is the upper directory of an overlayfs mount: its whiteouts (char device 0/0) and opaque
    directories (``trusted.overlay.opaque``) become the whiteout files of image layers.
    """
    links: dict[tuple[int, int], str] = {}
    yield from _walk(tree, "", links, overlay=overlay)


def _walk(folder: Path, prefix: str, links: dict[tuple[int, int], str], *, overlay: bool) -> Iterator[Member]:
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: os.fsencode(entry.name))
    for entry in ordered:
        path, name = Path(entry.path), prefix + entry.name
        found = entry.stat(follow_symlinks=False)
        if overlay and stat.S_ISCHR(found.st_mode) and found.st_rdev == 0:
            yield member(prefix + WHITEOUT + entry.name)
            continue
        kind = _TYPES.get(stat.S_IFMT(found.st_mode))
        if kind is None:  # a socket: no tar holds one
            continue
        yield _member_of(path, name, kind, found, links)
        if kind == tarfile.DIRTYPE:
            if overlay and _attribute(path, _OVERLAY + "opaque") == b"y":
                yield member(f"{name}/{OPAQUE}")
            yield from _walk(path, name + "/", links, overlay=overlay)


def _member_of(path: Path, name: str, kind: bytes, found: os.stat_result, links: dict[tuple[int, int], str]) -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.mode = kind, stat.S_IMODE(found.st_mode)
    info.uid, info.gid = found.st_uid, found.st_gid
    set_mtime(info, found.st_mtime_ns)
    if kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        info.devmajor, info.devminor = os.major(found.st_rdev), os.minor(found.st_rdev)
    elif kind == tarfile.SYMTYPE:
        info.linkname = str(path.readlink())
    if kind != tarfile.DIRTYPE and found.st_nlink > 1:
        first = links.setdefault((found.st_dev, found.st_ino), name)
        if first != name:
            info.type, info.linkname = tarfile.LNKTYPE, first
            return info, None
    set_xattrs(info, _xattrs(path))
    if kind == tarfile.REGTYPE:
        info.size = found.st_size
        return info, path
    return info, None


def _xattrs(path: Path) -> dict[str, bytes]:
    names = [name for name in os.listxattr(path, follow_symlinks=False) if not name.startswith(_NOT_IN_IMAGES)]
    return {name: os.getxattr(path, name, follow_symlinks=False) for name in names}


def _attribute(path: Path, name: str) -> bytes | None:
    try:
        return os.getxattr(path, name, follow_symlinks=False)
    except OSError:
        return None
