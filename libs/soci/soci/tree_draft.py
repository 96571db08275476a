# SPDX-License-Identifier: Apache-2.0
"""A layer's members, in tar order, played into a draft of its directory tree.

What the draft accepts is what unpacking the layer with plain system calls would accept; what it refuses would fail
there too, or depends on the order of things in a way that only unpacking can tell. A refused layer is not lost: it
is not loaded lazily, that is all. `soci.tree` turns the draft into the compact `LayerTree`.
"""

from __future__ import annotations

from typing import Final

from soci.entries import TYPES, Entries
from soci.errors import InvalidZtoc

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

MAX_KNOWN: Final = 1 << 16
"""Directories that are found again by the path as a member wrote it."""
IMPLIED: Final = -1
"""In the place of a member: the directory that no member lists."""

REGULAR: Final = TYPES.index("reg")
HARDLINK: Final = TYPES.index("hardlink")
SYMLINK: Final = TYPES.index("symlink")
DIR: Final = TYPES.index("dir")
DEVICES: Final = (TYPES.index("char"), TYPES.index("block"))
_NO_NAMES: Final = frozenset((b"", b".", b".."))
_CAREFUL: Final = bytes(code in (HARDLINK, DIR) for code in range(256))


class Directory:
    """A directory while the tree grows: changed in place, never handed out of this library.

    Members are numbers: their places among the entries. A child is a member's number or a `Directory`; ``whiteouts``
    are markers' members by the name that they hide.
    """

    __slots__ = ("children", "entry", "number", "opaque", "whiteouts")

    def __init__(self, entry: int = IMPLIED) -> None:
        self.entry = entry
        self.number = -1  # `soci.tree`'s
        self.children: dict[bytes, int | Directory] = {}
        self.whiteouts: dict[bytes, int] = {}
        self.opaque = False


def draft_tree(entries: Entries) -> Directory:
    """The root directory's draft, after every entry in the order given (the tar's).

    Raises `InvalidZtoc` for a member that no file system could hold, for one below something that is not a
    directory, for a hard link whose target is not there yet or is a directory, and beyond the limits above.
    """
    _check(entries)
    maker = _Maker(entries)
    maker.run()
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
    def __init__(self, entries: Entries) -> None:
        self.root = Directory()
        self._names = list(entries.names)
        self._links = entries.links
        self._types = entries.types
        self._nodes = 1 + len(entries)  # of which the members that make no node are taken off again
        # Children of directories by the path as members write it: most members lie beside the one before.
        self._known: dict[bytes, dict[bytes, int | Directory]] = {b"": self.root.children}

    def run(self) -> None:
        """Play all members."""
        known, names = self._known, self._names
        careful = self._careful()
        for at, name in enumerate(names):
            head, _, base = name.rpartition(b"/")
            children = known.get(head)
            if children is None or careful[at] or base in children or base in _NO_NAMES:
                self._add(at, name)
            else:
                children[base] = at
        if self._nodes > MAX_NODES:
            raise InvalidZtoc(f"more than {MAX_NODES:,} files in one layer")

    def _careful(self) -> bytearray:
        """Which members need `_add`: all but plain ones with plain names."""
        careful = bytearray(self._types.translate(_CAREFUL))
        everything = b"/".join(self._names)
        if b"\0" in everything:
            name = next(name for name in self._names if b"\0" in name)
            raise InvalidZtoc(f"a name with a NUL byte: {shown(name)}")
        marked = WHITEOUT in everything
        for at, name in enumerate(self._names):
            if len(name) > MAX_NAME or (marked and WHITEOUT in name):
                careful[at] = 1
        return careful

    def _add(self, at: int, name: bytes) -> None:
        kind = self._types[at]
        path = clean_path(name)
        self._nodes -= 1  # for now
        if not path:
            if kind != DIR:
                raise InvalidZtoc(f"the root directory as a member of type {TYPES[kind]}: {shown(name)}")
            self.root.entry = at
            return
        base = path.pop()
        if any(part.startswith(WHITEOUT) for part in path):
            return  # below a marker: union file systems' own housekeeping, never shown
        parent = self._directory(path, name)
        if base.startswith(WHITEOUT):
            self._mark(parent, base, at)
            return
        self._put(parent, base, at, kind)
        head, _, last = name.rpartition(b"/")
        if last not in _NO_NAMES and len(self._known) < MAX_KNOWN:
            self._known[head] = parent.children

    def _put(self, parent: Directory, base: bytes, at: int, kind: int) -> None:
        old = parent.children.get(base)
        if isinstance(old, Directory):
            if kind == DIR:
                old.entry = at  # the attributes are the later entry's, every one of them; the children stay
                return
            self._known.clear()  # it may hold what goes now
        # Whatever else was here goes first, a directory with all below it: a hard link must not find it any more.
        parent.children.pop(base, None)
        if kind == HARDLINK:
            parent.children[base] = self._target(at)
        else:
            self._count(self._names[at])
            parent.children[base] = Directory(at) if kind == DIR else at

    def _mark(self, parent: Directory, base: bytes, at: int) -> None:
        if base == OPAQUE:
            parent.opaque = True
            return
        hidden = base[len(WHITEOUT) :]
        if hidden in _NO_NAMES or hidden.startswith(WHITEOUT):
            return  # hides nothing that can have a name here (".wh..wh.plnk" and its like)
        self._count(self._names[at])
        parent.whiteouts[hidden] = at

    def _directory(self, path: list[bytes], name: bytes) -> Directory:
        """The directory at ``path``, made with its parents where it is missing."""
        at = self.root
        for part in path:
            child = at.children.get(part)
            if child is None:
                self._count(name)
                child = at.children[part] = Directory()
            if not isinstance(child, Directory):
                raise InvalidZtoc(f"a member below something that is not a directory: {shown(name)}")
            at = child
        return at

    def _target(self, at: int) -> int:
        """What a hard link links to. It must have come before the link, as link(2) would have it."""
        name, link = self._names[at], self._links[at]
        found: int | Directory | None = self.root
        for part in clean_path(link):
            found = found.children.get(part) if isinstance(found, Directory) else None
        if found is None:
            raise InvalidZtoc(f"hard link {shown(name)} to {shown(link)}, which is not there before it")
        if isinstance(found, Directory):
            raise InvalidZtoc(f"hard link {shown(name)} to the directory {shown(link)}")
        return found

    def _count(self, name: bytes) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES + len(self._names):
            raise InvalidZtoc(f"more than {MAX_NODES:,} files in one layer, at {shown(name)}")


def _check(entries: Entries) -> None:
    """Refuse what could not be shown to a kernel. What `soci.ztoc` has checked already costs little here."""
    for at, (offset, size) in enumerate(zip(entries.offsets, entries.sizes, strict=True)):
        if size < 0 or not 0 <= offset <= MAX_OFFSET - size:
            raise InvalidZtoc(f"size {size} at offset {offset} is impossible: {shown(entries.names[at])}")
    for at, kind in enumerate(entries.types):
        if kind == SYMLINK:
            target = entries.links[at]
            if not 1 <= len(target) <= MAX_PATH or b"\0" in target:
                raise InvalidZtoc(
                    f"a symbolic link's target is empty, has a NUL or is too long: {shown(entries.names[at])}"
                )
        elif kind in DEVICES and not (
            0 <= entries.majors[at] <= MAX_DEVMAJOR and 0 <= entries.minors[at] <= MAX_DEVMINOR
        ):
            raise InvalidZtoc(
                f"device {entries.majors[at]}:{entries.minors[at]} is impossible: {shown(entries.names[at])}"
            )
