# SPDX-License-Identifier: Apache-2.0
"""One layer's directory tree as a kernel should see it, made from its table of contents.

Whiteouts, opaque directories, hard links and repeated members are resolved once, here; every way to mount is an
adapter of this. The tree is pure and does not change. A large layer has tens of thousands of nodes and a node may
never be looked at, so they are columns of numbers; a `Node` is built when one is asked for.
"""

from __future__ import annotations

import stat
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Final

from soci.entries import Entries
from soci.toc import TocEntry
from soci.tree_columns import MAX_XATTR_VALUE, Columns, Edges, Node, number_tree, xattrs_of
from soci.tree_draft import IMPLIED, draft_tree
from soci.ztoc import mtime_ns

__all__ = ["MAX_XATTR_VALUE", "ROOT", "LayerTree", "Node", "mtime_ns", "xattrs_of"]

ROOT: Final = 0
"""Node id of the layer's root directory."""


class LayerTree:
    """The tree. Nodes have ids 0 to ``len(tree) - 1``, the root first, then breadth first, names bytewise.

    Equal tables of contents give equal ids. Names of one directory are unique; a hard-linked node has several.
    """

    __slots__ = ("_columns", "_edge_count", "_edge_start", "_names", "_nodes", "_parents", "_places")

    def __init__(self, columns: Columns, edges: Edges) -> None:
        self._columns = columns
        self._names = edges.names  # of edges: a directory's are consecutive and sorted; edge 0 leads to the root
        self._nodes = edges.nodes
        self._edge_start = edges.start  # of nodes: its first child's edge
        self._edge_count = edges.count
        self._parents = edges.parents
        self._places = edges.places  # of nodes: the first edge to it

    @classmethod
    def of(cls, entries: Iterable[TocEntry]) -> LayerTree:
        """The tree of a layer's members, which must be in tar order (ascending offset).

        Later members replace earlier ones of the same name, except that a directory named again keeps its children.
        A real entry X beside a whiteout of X hides the whiteout, and a directory X is then not opaque, as when
        containerd unpacks the layer over an overlay. Raises `InvalidZtoc` for what unpacking would refuse too; see
        `soci.tree_draft`.
        """
        members = Entries.of(entries)
        return cls(*number_tree(members, draft_tree(members)))

    def __len__(self) -> int:
        return len(self._parents)

    @property
    def columns(self) -> Columns:
        """The attributes of all nodes at once, for those who write them all."""
        return self._columns

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
        return [node for node, member in enumerate(self._columns.members) if member == IMPLIED]

    def node(self, node: int) -> Node:
        """All about one node, built anew each time."""
        return self._columns.node(node)
