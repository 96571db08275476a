# SPDX-License-Identifier: Apache-2.0
"""A layer's members, in tar order, played into a draft of its directory tree.

What the draft accepts is what unpacking the layer with plain system calls would accept; what it refuses would fail
there too, or depends on the order of things in a way that only unpacking can tell. A refused layer is not lost: it
is not loaded lazily, that is all. `soci.tree` turns the draft into the compact `LayerTree`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from soci.errors import InvalidZtoc
from soci.toc import TocEntry

MAX_NODES: Final = 1_000_000
"""Files and directories of one layer, with implied parents, whiteouts and what later members replace."""
MAX_NAME: Final = 255
"""Bytes of one path component (Linux NAME_MAX)."""
MAX_PATH: Final = 4095
"""Bytes of a path, and of a symbolic link's target (Linux PATH_MAX without the final NUL)."""
MAX_DEPTH: Final = 1024
"""Components of a path."""
MAX_OFFSET: Final = 2**63 - 1
MAX_DEVMAJOR: Final = 2**12 - 1
MAX_DEVMINOR: Final = 2**20 - 1

WHITEOUT: Final = b".wh."
"""Prefix of a marker's name: ``.wh.X`` hides X of the layers below (OCI image-spec, layer.md "Whiteouts")."""
OPAQUE: Final = b".wh..wh..opq"
"""The marker that hides all that the layers below have in its directory."""

_TYPES: Final = frozenset({"reg", "hardlink", "symlink", "char", "block", "dir", "fifo"})


class Draft:
    """A node while the tree grows: changed in place, never handed out of this library. Its id is `soci.tree`'s."""

    __slots__ = ("entry", "id")

    def __init__(self, entry: TocEntry | None) -> None:
        self.entry = entry  # None for a directory that no member lists
        self.id = -1


class Directory(Draft):
    """A directory's draft. ``whiteouts`` holds its markers by the name that they hide."""

    __slots__ = ("children", "opaque", "whiteouts")

    def __init__(self, entry: TocEntry | None = None) -> None:
        super().__init__(entry)
        self.children: dict[bytes, Draft] = {}
        self.whiteouts: dict[bytes, TocEntry] = {}
        self.opaque = False


def draft_tree(entries: Iterable[TocEntry]) -> Directory:
    """The root directory's draft, after every entry in the order given (the tar's).

    Raises `InvalidZtoc` for a member that no file system could hold, for one below something that is not a
    directory, for a hard link whose target is not there yet or is a directory, and beyond the limits above.
    """
    maker = _Maker()
    for entry in entries:
        maker.add(entry)
    return maker.root


def clean_path(name: bytes) -> list[bytes]:
    """The components of ``name`` seen from the layer's root, lexically: ``.`` and ``//`` vanish, ``..`` goes up and
    stops at the root, so no name escapes it. Empty for the root itself. Raises `InvalidZtoc`.
    """
    if b"\0" in name:
        raise InvalidZtoc(f"a name with a NUL byte: {shown(name)}")
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part in (b"", b"."):
            continue
        if part != b"..":
            parts.append(part)
        elif parts:
            parts.pop()
    if len(name) > MAX_NAME:  # else nothing can be too long or too deep
        if any(len(part) > MAX_NAME for part in parts):
            raise InvalidZtoc(f"a path component longer than {MAX_NAME} bytes: {shown(name)}")
        if sum(map(len, parts)) + len(parts) - 1 > MAX_PATH:
            raise InvalidZtoc(f"a path longer than {MAX_PATH} bytes: {shown(name)}")
        if len(parts) > MAX_DEPTH:
            raise InvalidZtoc(f"a path of more than {MAX_DEPTH} components: {shown(name)}")
    return parts


def shown(name: bytes) -> str:
    """``name`` for an error message: printable, and short whatever was given."""
    return repr(name if len(name) <= 100 else name[:100] + b"...")[1:]


class _Maker:
    def __init__(self) -> None:
        self.root = Directory()
        self._nodes = 1

    def add(self, entry: TocEntry) -> None:
        _check(entry)
        path = clean_path(entry.name)
        if not path:
            if entry.type != "dir":
                raise InvalidZtoc(f"the root directory as a member of type {entry.type}: {shown(entry.name)}")
            self.root.entry = entry
            return
        name = path.pop()
        if any(part.startswith(WHITEOUT) for part in path):
            return  # below a marker: union file systems' own housekeeping, never shown
        parent = self._directory(path, entry)
        if name.startswith(WHITEOUT):
            self._mark(parent, name, entry)
        else:
            self._put(parent, name, entry)

    def _put(self, parent: Directory, name: bytes, entry: TocEntry) -> None:
        old = parent.children.get(name)
        if entry.type == "dir" and isinstance(old, Directory):
            old.entry = entry  # the attributes are the later entry's, every one of them; the children stay
            return
        # Whatever else was here goes first, a directory with all below it: a hard link must not find it any more.
        parent.children.pop(name, None)
        if entry.type == "hardlink":
            parent.children[name] = self._target(entry)
        else:
            self._count(entry.name)
            parent.children[name] = Directory(entry) if entry.type == "dir" else Draft(entry)

    def _mark(self, parent: Directory, name: bytes, entry: TocEntry) -> None:
        if name == OPAQUE:
            parent.opaque = True
            return
        hidden = name[len(WHITEOUT) :]
        if hidden in (b"", b".", b"..") or hidden.startswith(WHITEOUT):
            return  # hides nothing that can have a name here (".wh..wh.plnk" and its like)
        self._count(entry.name)
        parent.whiteouts[hidden] = entry

    def _directory(self, path: list[bytes], entry: TocEntry) -> Directory:
        """The directory at ``path``, made with its parents where it is missing."""
        at = self.root
        for part in path:
            child = at.children.get(part)
            if child is None:
                self._count(entry.name)
                child = at.children[part] = Directory()
            if not isinstance(child, Directory):
                raise InvalidZtoc(f"a member below something that is not a directory: {shown(entry.name)}")
            at = child
        return at

    def _target(self, entry: TocEntry) -> Draft:
        """What a hard link links to. It must have come before the link, as link(2) would have it."""
        at: Draft | None = self.root
        for part in clean_path(entry.linkname):
            at = at.children.get(part) if isinstance(at, Directory) else None
        if at is None:
            raise InvalidZtoc(f"hard link {shown(entry.name)} to {shown(entry.linkname)}, which is not there before it")
        if isinstance(at, Directory):
            raise InvalidZtoc(f"hard link {shown(entry.name)} to the directory {shown(entry.linkname)}")
        return at

    def _count(self, name: bytes) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise InvalidZtoc(f"more than {MAX_NODES:,} files in one layer, at {shown(name)}")


def _check(entry: TocEntry) -> None:
    """Refuse what could not be shown to a kernel. What `soci.ztoc` has checked already costs little here."""
    if entry.type not in _TYPES:
        raise InvalidZtoc(f"unknown member type {entry.type[:20]!r}: {shown(entry.name)}")
    if not 0 <= entry.size <= MAX_OFFSET or not 0 <= entry.offset <= MAX_OFFSET - entry.size:
        raise InvalidZtoc(f"size {entry.size} at offset {entry.offset} is impossible: {shown(entry.name)}")
    if not 0 <= entry.uid < 2**32 or not 0 <= entry.gid < 2**32:
        raise InvalidZtoc(f"owner {entry.uid}:{entry.gid} is impossible: {shown(entry.name)}")
    if entry.type == "symlink" and (not 1 <= len(entry.linkname) <= MAX_PATH or b"\0" in entry.linkname):
        raise InvalidZtoc(f"a symbolic link's target is empty, has a NUL or is too long: {shown(entry.name)}")
    if entry.type in ("char", "block") and not (
        0 <= entry.devmajor <= MAX_DEVMAJOR and 0 <= entry.devminor <= MAX_DEVMINOR
    ):
        raise InvalidZtoc(f"device {entry.devmajor}:{entry.devminor} is impossible: {shown(entry.name)}")
