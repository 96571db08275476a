# SPDX-License-Identifier: Apache-2.0
"""Members of layers, and their trees, for tests."""

from __future__ import annotations

from collections.abc import Mapping

from soci.toc import EntryType, TocEntry
from soci.tree import ROOT, LayerTree, Node


def entry(
    name: bytes,
    kind: EntryType = "reg",
    *,
    offset: int = 512,
    size: int = 0,
    to: bytes = b"",
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    time: str = "",
    dev: tuple[int, int] = (0, 0),
    pax: Mapping[bytes, bytes] | None = None,
) -> TocEntry:
    return TocEntry(name, kind, offset, size, to, mode, uid, gid, b"", b"", time, *dev, pax or {})


def paths(tree: LayerTree) -> list[bytes]:
    """All paths of the tree, as a walk through `children` finds them."""
    found: list[bytes] = []

    def walk(directory: int, prefix: bytes) -> None:
        for name, child in tree.children(directory):
            found.append(prefix + name)
            if tree.is_directory(child):
                walk(child, prefix + name + b"/")

    walk(ROOT, b"")
    return found


def at(tree: LayerTree, path: bytes) -> Node:
    found = tree.find(path)
    assert found is not None, path
    return tree.node(found)
