# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PTH115, PTH123, PTH208 -- names are bytes here, and need not be text
"""Two directory trees, path by path: everything that a program could tell them apart by."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass, fields
from pathlib import Path

READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Seen:
    """What one path shows. ``twins``: the other names of the same inode in the tree."""

    type: int
    mode: int
    uid: int
    gid: int
    size: int | None  # None for directories, whose size is the file system's own affair
    mtime_ns: int | None  # None where nobody says it
    rdev: int
    target: bytes
    xattrs: tuple[tuple[str, bytes], ...]
    content: str
    nlink: int | None
    twins: tuple[bytes, ...]


def look(top: Path, *, timeless: frozenset[str] = frozenset()) -> dict[bytes, Seen]:
    """Every path below ``top``, itself as ``b""``. The times of directories in ``timeless`` are not looked at."""
    root = os.fsencode(top)
    paths = [b""]
    stats: dict[bytes, os.stat_result] = {}
    names: dict[tuple[int, int], list[bytes]] = {}
    for path in paths:  # grows while it is walked
        full = root + b"/" + path if path else root
        stats[path] = found = os.lstat(full)
        if stat.S_ISDIR(found.st_mode):
            paths += [path + b"/" + name if path else name for name in sorted(os.listdir(full))]
        else:
            names.setdefault((found.st_dev, found.st_ino), []).append(path)
    return {path: _seen(root, path, found, names, timeless) for path, found in stats.items()}


def _seen(
    root: bytes,
    path: bytes,
    found: os.stat_result,
    names: dict[tuple[int, int], list[bytes]],
    timeless: frozenset[str],
) -> Seen:
    full = root + b"/" + path
    kind = stat.S_IFMT(found.st_mode)
    directory = kind == stat.S_IFDIR
    device = kind in {stat.S_IFCHR, stat.S_IFBLK}
    xattrs = tuple((key, os.getxattr(full, key, follow_symlinks=False)) for key in sorted(_keys(full)))
    content = ""
    if kind == stat.S_IFREG:
        digest = hashlib.sha256()
        with open(full, "rb") as file:
            while chunk := file.read(READ_BYTES):
                digest.update(chunk)
        content = digest.hexdigest()
    return Seen(
        type=kind,
        mode=stat.S_IMODE(found.st_mode),
        uid=found.st_uid,
        gid=found.st_gid,
        size=None if directory else found.st_size,
        mtime_ns=None if directory and os.fsdecode(path) in timeless else found.st_mtime_ns,
        rdev=found.st_rdev if device else 0,
        target=os.readlink(full) if kind == stat.S_IFLNK else b"",
        xattrs=xattrs,
        content=content,
        nlink=None if directory else found.st_nlink,
        twins=() if directory else tuple(sorted(set(names[found.st_dev, found.st_ino]) - {path})),
    )


def _keys(full: bytes) -> list[str]:
    return os.listxattr(full, follow_symlinks=False)


def differences(ours: dict[bytes, Seen], theirs: dict[bytes, Seen]) -> list[str]:
    """One line for each path and field that differs."""
    lines = [f"{path!r}: only in the first" for path in sorted(ours.keys() - theirs.keys())]
    lines += [f"{path!r}: only in the second" for path in sorted(theirs.keys() - ours.keys())]
    for path in sorted(ours.keys() & theirs.keys()):
        for field in fields(Seen):
            mine, other = getattr(ours[path], field.name), getattr(theirs[path], field.name)
            if mine != other:
                lines.append(f"{path!r}: {field.name} {mine!r} != {other!r}")
    return lines
