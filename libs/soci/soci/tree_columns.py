# SPDX-License-Identifier: Apache-2.0
"""Numbering a layer's draft tree: nodes, the edges that lead to them, and their attributes, a column each."""

from __future__ import annotations

import os
import stat
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from soci.entries import TYPES, Entries, Records, Slices
from soci.errors import InvalidZtoc
from soci.flat_bulk import numbers
from soci.times_bulk import parse_times
from soci.toc import TocEntry
from soci.toc_time import NS
from soci.tree_draft import DEVICES, IMPLIED, MAX_NAME, REGULAR, SYMLINK, Directory, shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.int64]

MAX_XATTR_VALUE: Final = 65_536
"""Bytes of one extended attribute's value (Linux XATTR_SIZE_MAX). A name has at most `MAX_NAME` bytes."""

_XATTR: Final = b"SCHILY.xattr."
# Attributes by which overlayfs is steered (opaque, redirect, metacopy, ...): the layer is a lower directory of an
# overlay, so an image could point a directory anywhere with them. The opaque flag comes from `.wh..wh..opq` alone.
# containerd leaves out all of `trusted.` when it unpacks, so nobody expects to see them.
_NOT_SHOWN: Final = (b"trusted.", b"user.overlay.")
_NO_XATTRS: Final[Mapping[bytes, bytes]] = MappingProxyType({})
_NO_ID: Final = 2**32 - 1
_IMPLIED_MODE: Final = stat.S_IFDIR | 0o755
_TYPE_BITS: Final = {
    "reg": stat.S_IFREG,
    "hardlink": 0,  # no node is one
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


@dataclass(frozen=True, slots=True)
class Edges:
    """What leads where: an edge is a name in a directory. All but ``names`` are columns of uint32."""

    names: list[bytes]  # a directory's are consecutive and sorted; edge 0 leads to the root
    nodes: array[int]
    start: array[int]  # of nodes: the first child's edge
    count: array[int]
    parents: array[int]
    places: array[int]  # of nodes: the first edge to it


@dataclass(frozen=True, slots=True)
class Columns:
    """The attributes of all nodes, a column each; what few nodes have is in dictionaries."""

    names: Sequence[bytes]  # of members, as are links
    links: Sequence[bytes]
    members: array[int]  # the member that a node's attributes are of, or `IMPLIED`
    mode: array[int]
    uid: array[int]
    gid: array[int]
    nlink: array[int]
    size: array[int]
    data_offset: array[int]
    mtime_s: array[int]  # in two: the year 9999 has no place in 64 bits of ns
    mtime_ns: array[int]
    rdev: Mapping[int, int]
    opaque: frozenset[int]
    xattrs: Mapping[int, Mapping[bytes, bytes]]

    def node(self, node: int) -> Node:
        """All about one node."""
        member, mode = self.members[node], self.mode[node]
        return Node(
            mode=mode,
            uid=self.uid[node],
            gid=self.gid[node],
            size=self.size[node],
            mtime_ns=self.mtime_s[node] * NS + self.mtime_ns[node],
            rdev=self.rdev.get(node, 0),
            nlink=self.nlink[node],
            data_offset=self.data_offset[node],
            target=self.links[member] if stat.S_ISLNK(mode) else b"",
            xattrs=self.xattrs.get(node, _NO_XATTRS),
            implied=member == IMPLIED,
            opaque=node in self.opaque,
            first_name=self.names[member] if member != IMPLIED else b"",
        )


def number_tree(entries: Entries, root: Directory) -> tuple[Columns, Edges]:
    """Number the nodes of the draft: the root is 0, then breadth first, names bytewise."""
    import numpy as np  # noqa: PLC0415  (see `soci.flat_bulk`)

    names, found, counts, directories = _walk(root, len(entries))
    drafts = np.frombuffer(found, np.int64)
    nodes, first = _node_ids(drafts, len(entries) + len(directories))
    shown_here = drafts[first]  # the nodes' drafts, by node
    made = np.array([directory.number for directory in directories], np.int64)
    ids = np.empty(len(directories), np.int64)  # of directories
    ids[shown_here[shown_here >= len(entries)] - len(entries)] = np.flatnonzero(shown_here >= len(entries))
    starts, lengths = np.zeros(len(first), np.int64), np.zeros(len(first), np.int64)
    per_directory = np.frombuffer(counts, np.int64)
    order = ids[made - len(entries)]
    lengths[order] = per_directory
    starts[order] = 1 + np.cumsum(per_directory) - per_directory
    above = np.concatenate(([0], np.repeat(order, per_directory)))  # of edges: the directory they are in
    parents = above[first]
    edges = Edges(
        names, numbers(nodes, "I"), numbers(starts, "I"), numbers(lengths, "I"), numbers(parents, "I"),
        numbers(first, "I"),
    )  # fmt: skip

    links = np.bincount(nodes, minlength=len(first))
    is_directory = shown_here >= len(entries)
    below = np.bincount(parents[1:][is_directory[1:]], minlength=len(first))
    opaque = frozenset(int(ids[directory.number - len(entries)]) for directory in directories if directory.opaque)
    listed = np.array([directory.entry for directory in directories], np.int64)
    whiteout = shown_here < 0
    members = np.where(whiteout, -1 - shown_here, shown_here)
    members[is_directory] = listed[shown_here[is_directory] - len(entries)]
    nlink = np.where(is_directory, 2 + below, links)
    return _columns(entries, members, whiteout, nlink, opaque), edges


def _walk(root: Directory, count: int) -> tuple[list[bytes], array[int], array[int], list[Directory]]:
    """Names and drafts of all edges, the root's first, and how many each directory has.

    A draft is a member's number, -1 - that for a whiteout, or ``count`` + a directory's place in the walk.
    """
    root.number = count
    names, drafts, counts, directories = [b""], array("q", [count]), array("q"), [root]
    for directory in directories:  # grows while it is walked: breadth first
        children: dict[bytes, int | Directory] = directory.children
        if directory.whiteouts:
            children = {**{name: -1 - marker for name, marker in directory.whiteouts.items()}, **children}
        ordered = sorted(children)
        names += ordered
        counts.append(len(ordered))
        below = [children[name] for name in ordered]
        for at, child in enumerate(below):
            if child.__class__ is Directory:
                child.number = below[at] = count + len(directories)
                directories.append(child)
        drafts.extend(below)  # type: ignore[arg-type]  # numbers by now
    return names, drafts, counts, directories


def _node_ids(drafts: Numbers, limit: int) -> tuple[Numbers, Numbers]:
    """The edges' nodes, and the nodes' first edges: one more for each draft that no edge before led to."""
    import numpy as np  # noqa: PLC0415

    keys = drafts + limit  # whiteouts are negative
    first_edge = np.full(2 * limit, -1, np.int64)
    first_edge[keys[::-1]] = np.arange(len(keys) - 1, -1, -1)  # the last one written stays
    edge = first_edge[keys]
    fresh = edge == np.arange(len(keys))
    first = np.flatnonzero(fresh)
    return (np.cumsum(fresh) - 1)[edge], first


def _columns(
    entries: Entries, members: Numbers, whiteout: NDArray[np.bool_], nlink: Numbers, opaque: frozenset[int]
) -> Columns:
    import numpy as np  # noqa: PLC0415

    implied = members == IMPLIED
    bare = implied | whiteout
    kinds = np.frombuffer(entries.types, np.uint8)

    def column(values: Any, kind: str = "q") -> Numbers:
        """A column of members as one of nodes; 0 for those that have only a name."""
        found = np.frombuffer(values, kind) if isinstance(values, array) else values
        if not len(found):
            return np.zeros(len(members), np.int64)
        taken: Numbers = np.where(bare, 0, found[members]).astype(np.int64)
        return taken

    kind = column(kinds)
    # The type is the member's alone: the mode field may hold type bits that contradict it.
    mode = np.array([_TYPE_BITS[word] for word in TYPES])[kind] | (column(entries.modes) & 0o7777)
    mode[whiteout], mode[implied] = stat.S_IFCHR, _IMPLIED_MODE
    regular = ~bare & (kind == REGULAR)
    symlinks = ~bare & (kind == SYMLINK)
    size = np.where(regular, column(entries.sizes), 0)
    links = Slices.of(entries.links)
    size[symlinks] = (column(links.ends) - column(links.starts))[symlinks]
    uid, gid = (column(ids, "I") for ids in (entries.uids, entries.gids))
    seconds, ns = parse_times(Slices.of(entries.times))
    # A whiteout has its marker's time.
    if len(seconds):
        seconds, ns = np.where(implied, 0, seconds[members]), np.where(implied, 0, ns[members])
    else:
        seconds = ns = np.zeros(len(members), np.int64)
    rdev = {}
    for node in np.flatnonzero(~bare & np.isin(kind, DEVICES)).tolist():
        rdev[node] = os.makedev(entries.majors[int(members[node])], entries.minors[int(members[node])])
    return Columns(
        entries.names, entries.links, numbers(members), numbers(mode, "I"),
        numbers(np.where(uid == _NO_ID, 0, uid), "I"), numbers(np.where(gid == _NO_ID, 0, gid), "I"),
        numbers(nlink, "I"), numbers(size), numbers(np.where(regular, column(entries.offsets), 0)),
        numbers(seconds), numbers(ns, "I"), rdev, opaque, _xattrs(entries, np.where(bare, IMPLIED, members)),
    )  # fmt: skip


def _xattrs(entries: Entries, members: Numbers) -> dict[int, Mapping[bytes, bytes]]:
    """The extended attributes of the nodes that have some."""
    import numpy as np  # noqa: PLC0415

    found: dict[int, Mapping[bytes, bytes]] = {}
    if not entries.pax or (isinstance(entries.pax, Records) and not entries.pax.mention(_XATTR)):
        return found
    there = np.zeros(len(entries) + 1, np.bool_)  # the last one stands for no member
    there[list(entries.pax)] = True
    for node in np.flatnonzero(there[members]).tolist():
        member = int(members[node])
        own = _own_xattrs(entries.pax[member], entries.names[member])
        if own:
            found[node] = MappingProxyType(own)
    return found


def xattrs_of(entry: TocEntry) -> dict[bytes, bytes]:
    """The extended attributes to give to the member's file, empty values included, overlayfs' own left out.

    Raises `InvalidZtoc` for a name or a value that setxattr(2) would refuse for its length.
    """
    return _own_xattrs(entry.pax, entry.name)


def _own_xattrs(records: Mapping[bytes, bytes], name: bytes) -> dict[bytes, bytes]:
    found = {key[len(_XATTR) :]: value for key, value in records.items() if key.startswith(_XATTR)}
    for key, value in found.items():
        if not 1 <= len(key) <= MAX_NAME or b"\0" in key or len(value) > MAX_XATTR_VALUE:
            raise InvalidZtoc(f"an extended attribute that no file can have, on {shown(name)}")
    return {key: value for key, value in found.items() if not key.startswith(_NOT_SHOWN)}
