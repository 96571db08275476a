# SPDX-License-Identifier: Apache-2.0
"""One layer's directory tree as a kernel should see it, made from its table of contents.

Whiteouts, opaque directories, hard links and repeated members are resolved once, here; every way to mount is an
adapter of this. The tree is pure and does not change. A large layer has tens of thousands of nodes and a node may
never be looked at, so they are columns of numbers; a `Node` is built when one is asked for.
"""

from __future__ import annotations

import os
import stat
from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from types import MappingProxyType
from typing import Final

from soci.errors import InvalidZtoc
from soci.toc import TocEntry
from soci.toc_time import NS
from soci.tree_draft import MAX_NAME, Directory, Draft, draft_tree, shown
from soci.ztoc import mtime_ns, xattrs

__all__ = ["MAX_XATTR_VALUE", "ROOT", "LayerTree", "Node", "mtime_ns", "xattrs_of"]

ROOT: Final = 0
"""Node id of the layer's root directory."""
MAX_XATTR_VALUE: Final = 65_536
"""Bytes of one extended attribute's value (Linux XATTR_SIZE_MAX). A name has at most `MAX_NAME` bytes."""

# Attributes by which overlayfs is steered (opaque, redirect, metacopy, ...): the layer is a lower directory of an
# overlay, so an image could point a directory anywhere with them. The opaque flag comes from `.wh..wh..opq` alone.
# containerd leaves out all of `trusted.` when it unpacks, so nobody expects to see them.
_NOT_SHOWN: Final = (b"trusted.", b"user.overlay.")
_NO_XATTRS: Final[Mapping[bytes, bytes]] = MappingProxyType({})
_IMPLIED: Final = TocEntry(b"", "dir", 0, 0, mode=0o755, mod_time="1970-01-01T00:00:00Z")
_NO_ID: Final = 2**32 - 1
_TYPE_BITS: Final = {
    "reg": stat.S_IFREG,
    "symlink": stat.S_IFLNK,
    "char": stat.S_IFCHR,
    "block": stat.S_IFBLK,
    "dir": stat.S_IFDIR,
    "fifo": stat.S_IFIFO,
}


@dataclass(frozen=True, slots=True)
class Node:
    """What stat(2), readlink(2) and listxattr(2) should say of one node, and where its bytes are.

    A whiteout is a character device 0/0 without permission bits, as overlayfs wants it. For an opaque directory
    the adapter adds ``trusted.overlay.opaque`` (or its ``user.`` twin); ``xattrs`` never has it.
    """

    mode: int  # st_mode, file type bits included
    uid: int
    gid: int
    size: int  # bytes: content of a regular file, target of a symbolic link, else 0
    mtime_ns: int  # since the epoch; what is older is shown as the epoch, as containerd unpacks it
    rdev: int  # of character and block devices, else 0
    nlink: int
    data_offset: int  # of a regular file's first byte in the uncompressed tar, else 0
    target: bytes  # of a symbolic link, else b""
    xattrs: Mapping[bytes, bytes]
    implied: bool  # a directory that no member lists: mode 0755, root's, 1970
    opaque: bool  # a directory that hides what lower layers have at its path
    first_name: bytes  # verbatim name of the member that gave the attributes and the data; b"" if implied


class LayerTree:
    """The tree. Nodes have ids 0 to ``len(tree) - 1``, the root first, then breadth first, names bytewise.

    Equal tables of contents give equal ids. Names of one directory are unique; a hard-linked node has several.
    """

    __slots__ = ("_columns", "_edge_count", "_edge_start", "_names", "_nodes", "_parents", "_places")

    def __init__(self, root: Directory) -> None:
        self._columns = _Columns()
        self._names: list[bytes] = [b""]  # of edges: a directory's are consecutive and sorted; edge 0 leads to the root
        self._nodes = array("I", [ROOT])  # of edges
        self._edge_start = array("I")  # of nodes: its first child's edge
        self._edge_count = array("I")
        self._parents = array("I")
        self._places = array("I")  # of nodes: the first edge to it
        self._number(root)

    @classmethod
    def of(cls, entries: Sequence[TocEntry]) -> LayerTree:
        """The tree of a layer's members, which must be in tar order (ascending offset).

        Later members replace earlier ones of the same name, except that a directory named again keeps its children.
        A real entry X beside a whiteout of X hides the whiteout, and a directory X is then not opaque, as when
        containerd unpacks the layer over an overlay. Raises `InvalidZtoc` for what unpacking would refuse too; see
        `soci.tree_draft`.
        """
        return cls(draft_tree(entries))

    def __len__(self) -> int:
        return len(self._parents)

    def lookup(self, parent: int, name: bytes) -> int | None:
        """The child of directory ``parent`` called ``name``, or None. No name begins with ``.wh.``."""
        start = self._edge_start[parent]
        end = start + self._edge_count[parent]
        edge = bisect_left(self._names, name, start, end)
        return self._nodes[edge] if edge < end and self._names[edge] == name else None

    def children(self, directory: int) -> Sequence[tuple[bytes, int]]:
        """Names and nodes in ``directory``, bytewise by name; nothing for other nodes. A fresh list each time."""
        start = self._edge_start[directory]
        end = start + self._edge_count[directory]
        return list(zip(self._names[start:end], self._nodes[start:end], strict=True))

    def parent(self, node: int) -> int:
        """The directory that holds ``node`` (a hard-linked node's first). The root's is the root."""
        return self._parents[node]

    def path(self, node: int) -> bytes:
        """The path from the root, without a leading slash, of a directory (or of a node's first name)."""
        parts: list[bytes] = []
        while node != ROOT:
            parts.append(self._names[self._places[node]])
            node = self._parents[node]
        return b"/".join(reversed(parts))

    def find(self, path: bytes) -> int | None:
        """The node at a path as `path` gives it, without following symbolic links."""
        node: int | None = ROOT
        for part in path.split(b"/") if path else ():
            node = None if node is None else self.lookup(node, part)
        return node

    def is_directory(self, node: int) -> bool:
        """Whether ``node`` is a directory, without building its `Node`."""
        return stat.S_ISDIR(self._columns.mode[node])

    def implied(self) -> list[int]:
        """The directories that no member lists, ascending, the root included where none lists it.

        Unpacking would give them the attributes that the layers below have at their paths.
        """
        return [node for node, implied in enumerate(self._columns.implied) if implied]

    def node(self, node: int) -> Node:
        """All about one node, built anew each time."""
        return self._columns.node(node)

    def _number(self, root: Directory) -> None:
        self._add(root, ROOT, 0)
        directories = [root]
        for directory in directories:  # grows while it is walked: breadth first
            children = _visible(directory)
            self._edge_start[directory.id] = len(self._names)
            self._edge_count[directory.id] = len(children)
            for name, child in children:
                if child.id < 0:
                    self._add(child, directory.id, len(self._names))
                    if isinstance(child, Directory):
                        self._columns.nlink[directory.id] += 1
                        directories.append(child)
                else:
                    self._columns.nlink[child.id] += 1
                self._names.append(name)
                self._nodes.append(child.id)

    def _add(self, draft: Draft, parent: int, place: int) -> None:
        draft.id = len(self._parents)
        self._parents.append(parent)
        self._places.append(place)
        self._edge_start.append(0)
        self._edge_count.append(0)
        self._columns.add(draft)


class _Columns:
    """The attributes of all nodes, a column each; what few nodes have is in dictionaries."""

    __slots__ = (
        "data_offset",
        "first_name",
        "gid",
        "implied",
        "mode",
        "mtime_ns",
        "mtime_s",
        "nlink",
        "opaque",
        "rdev",
        "size",
        "target",
        "uid",
        "xattrs",
    )

    def __init__(self) -> None:
        self.mode, self.uid, self.gid, self.rdev, self.nlink = (array("I") for _ in range(5))
        self.size, self.data_offset = array("q"), array("q")
        self.mtime_s, self.mtime_ns = array("Q"), array("I")  # in two: the year 9999 has no place in 64 bits of ns
        self.implied, self.opaque = bytearray(), bytearray()
        self.first_name: list[bytes] = []
        self.target: dict[int, bytes] = {}
        self.xattrs: dict[int, Mapping[bytes, bytes]] = {}

    def add(self, draft: Draft) -> None:
        """Append a node's row; ``nlink`` is that of its first link (2 for a directory)."""
        entry = draft.entry or _IMPLIED
        node = len(self.mode)
        # The type is the member's alone: the mode field may hold type bits that contradict it.
        self.mode.append(_TYPE_BITS[entry.type] | (entry.mode & 0o7777))
        self.uid.append(_owner(entry.uid))
        self.gid.append(_owner(entry.gid))
        self.nlink.append(2 if isinstance(draft, Directory) else 1)
        seconds, ns = divmod(max(0, mtime_ns(entry)), NS)
        self.mtime_s.append(seconds)
        self.mtime_ns.append(ns)
        regular = entry.type == "reg"
        self.data_offset.append(entry.offset if regular else 0)
        self.size.append(entry.size if regular else len(entry.linkname) if entry.type == "symlink" else 0)
        device = entry.type in ("char", "block")
        self.rdev.append(os.makedev(entry.devmajor, entry.devminor) if device else 0)
        self.implied.append(draft.entry is None)
        self.opaque.append(isinstance(draft, Directory) and draft.opaque)
        self.first_name.append(entry.name)
        if entry.type == "symlink":
            self.target[node] = entry.linkname
        if entry.pax and (own := xattrs_of(entry)):
            self.xattrs[node] = MappingProxyType(own)

    def node(self, node: int) -> Node:
        return Node(
            mode=self.mode[node],
            uid=self.uid[node],
            gid=self.gid[node],
            size=self.size[node],
            mtime_ns=self.mtime_s[node] * NS + self.mtime_ns[node],
            rdev=self.rdev[node],
            nlink=self.nlink[node],
            data_offset=self.data_offset[node],
            target=self.target.get(node, b""),
            xattrs=self.xattrs.get(node, _NO_XATTRS),
            implied=bool(self.implied[node]),
            opaque=bool(self.opaque[node]),
            first_name=self.first_name[node],
        )


def _visible(directory: Directory) -> list[tuple[bytes, Draft]]:
    """What ``directory`` shows, bytewise by name."""
    shown_here = directory.children
    if directory.whiteouts:
        shown_here = dict(shown_here)
        for name, marker in directory.whiteouts.items():
            real = shown_here.get(name)
            if real is None:
                shown_here[name] = Draft(TocEntry(marker.name, "char", 0, 0, mod_time=marker.mod_time))
    return sorted(shown_here.items(), key=itemgetter(0))


def _owner(number: int) -> int:
    """chown(2) takes 2**32 - 1 (a tar's -1) for "leave as it is", which leaves the unpacker's root."""
    return 0 if number == _NO_ID else number


def xattrs_of(entry: TocEntry) -> dict[bytes, bytes]:
    """The extended attributes to give to the member's file, empty values included, overlayfs' own left out.

    Raises `InvalidZtoc` for a name or a value that setxattr(2) would refuse for its length.
    """
    found = xattrs(entry)
    for name, value in found.items():
        if not 1 <= len(name) <= MAX_NAME or b"\0" in name or len(value) > MAX_XATTR_VALUE:
            raise InvalidZtoc(f"an extended attribute that no file can have, on {shown(entry.name)}")
    return {name: value for name, value in found.items() if not name.startswith(_NOT_SHOWN)}
