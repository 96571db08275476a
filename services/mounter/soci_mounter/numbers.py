# SPDX-License-Identifier: Apache-2.0
"""Inode numbers: which layer and which node a number of the kernel means.

One FUSE connection shows many layers, and the kernel names every file by one 64-bit number. The upper half is the
layer's *slot*, the lower half the node's id in its `LayerTree`. A slot is used once in the life of the process:
what the kernel still remembers of an unmounted layer can therefore never mean a file of another one.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from soci.errors import LimitExceeded

ROOT = 1  # FUSE_ROOT_ID: the directory that holds one directory a layer
NODE_BITS = 32
MAX_NODE = (1 << NODE_BITS) - 1
# overlayfs with xino keeps the upper bits of an inode number for itself; it needs a handful, this leaves it eight.
MAX_SLOT = (1 << 24) - 1


STATE, STATE_FILE = MAX_NODE - 1, MAX_NODE
"""Nodes that no tree has: a layer's hidden directory, and the file in it (`soci_mounter.state`)."""


def inode(slot: int, node: int) -> int:
    """The inode number of ``node`` (0 is the layer's root directory) of the layer in ``slot``."""
    return slot << NODE_BITS | node


def split(ino: int) -> tuple[int, int]:
    """``(slot, node)`` of an inode number. `ROOT` and other numbers that no layer owns have slot 0."""
    return ino >> NODE_BITS, ino & MAX_NODE


def compact(values: Sequence[int]) -> array[int]:
    """Numbers in as little memory as an array takes: what is held of each mounted layer is many of them."""
    small = min(values, default=0) >= 0 and max(values, default=0) <= MAX_NODE
    return array("I" if small else "q", values)


class Slots:
    """Hands out slots 1, 2, 3 …, none of them twice."""

    def __init__(self) -> None:
        self._last = 0

    def take(self) -> int:
        """The next slot; `LimitExceeded` after `MAX_SLOT` mounts, which only a new process can cure."""
        if self._last >= MAX_SLOT:
            raise LimitExceeded(f"this mounter has shown {MAX_SLOT} layers in its life; restart it")
        self._last += 1
        return self._last
