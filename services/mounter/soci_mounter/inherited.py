# SPDX-License-Identifier: Apache-2.0
"""Attributes of directories that a layer implies but does not list, from the layers below.

A layer that holds ``usr/bin/x`` need not list ``usr``. Unpacked on top of its parents, ``usr`` would keep the
attributes that it has there, so it takes them here too: from the nearest lower directory that shows it in the merged
view. A whiteout, another type of file or an opaque directory on the way hides what lies below it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress

from soci.errors import Unavailable
from soci.tree import LayerTree
from soci_mounter.filesystem import OPAQUE, OPAQUE_YES, Inherited

# What overlayfs keeps of its own on a lower directory says nothing of ours, and it would obey some of it.
PRIVATE = (b"trusted.", b"user.overlay.")


def inherit(tree: LayerTree, lower: Sequence[str], opaque: bytes = OPAQUE) -> dict[int, Inherited]:
    """Node id → attributes, for the implied directories of ``tree`` that ``lower`` (nearest first) has.

    ``opaque`` is the extended attribute by which lower directories say that they hide what is below them.

    Blocks: lower directories may be on the very FUSE mount that waits for the answer, so it must run in a thread.
    Raises `Unavailable` where a lower directory cannot be read.
    """
    found: dict[int, Inherited] = {}
    places = [os.fsencode(directory) for directory in lower]
    for node_id in tree.implied():
        try:
            inherited = _find(places, tree.path(node_id), opaque)
        except OSError as error:
            raise Unavailable(f"a layer below cannot be read: {error}") from error
        if inherited is not None:
            found[node_id] = inherited
    return found


def _find(places: Sequence[bytes], path: bytes, mark: bytes) -> Inherited | None:
    parts = path.split(b"/") if path else []
    for place in places:
        here = place
        seen = os.lstat(here)
        opaque = False
        for depth, part in enumerate([*parts, None]):
            if not stat.S_ISDIR(seen.st_mode):
                return None  # a whiteout, or another file: it hides the rest
            if part is None:
                return _of_root(seen) if depth == 0 else _of(here, seen)
            opaque = opaque or _is_opaque(here, mark)
            here += b"/" + part
            try:
                seen = os.lstat(here)
            except FileNotFoundError:
                break
        if opaque:
            return None
    return None


def _of_root(seen: os.stat_result) -> Inherited:
    """A snapshot's own root directory is made with mode 0755 for the owner of the one below."""
    return Inherited(stat.S_IFDIR | 0o755, seen.st_uid, seen.st_gid, 0)


def _of(path: bytes, seen: os.stat_result) -> Inherited:
    return Inherited(seen.st_mode, seen.st_uid, seen.st_gid, seen.st_mtime_ns, _xattrs(path))


def _xattrs(path: bytes) -> Mapping[bytes, bytes]:
    names = [os.fsencode(name) for name in os.listxattr(path, follow_symlinks=False)]
    return {name: os.getxattr(path, name, follow_symlinks=False) for name in names if not name.startswith(PRIVATE)}


def _is_opaque(path: bytes, mark: bytes) -> bool:
    with suppress(OSError):
        return os.getxattr(path, mark, follow_symlinks=False) == OPAQUE_YES
    return False
