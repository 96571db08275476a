# SPDX-License-Identifier: Apache-2.0
# Descriptors and bytes, which pathlib has not. ruff: noqa: PTH
"""Descriptors of the directories of a tree that strangers fill, opened step by step and kept for the next look.

Nothing outside the tree can be reached: each step of a path is opened relative to its parent's descriptor with
O_NOFOLLOW, so neither ``..`` nor a symlink that an image planted leads out. Members of a layer stand together by
directory, so nearly every look finds its directory open.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
OPEN_DIRECTORIES: Final = 64
"""Descriptors kept of one tree."""

Parts = tuple[bytes, ...]


class Parents:
    """The open directories below ``root``, a descriptor that stays the caller's.

    What `open` gives is this object's, and good until the next call; `os.dup` it to keep it longer.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._open: OrderedDict[Parts, int] = OrderedDict()

    def open(self, parts: Parts, imply: Callable[[int, Parts], None] | None = None) -> int:
        """The directory ``parts``. Raises OSError where one of them is none.

        ``imply`` is called, with its parent and its path, for each that is missing, and makes it.
        """
        found = self._open.get(parts)
        if found is not None:
            return found
        if not parts:
            return self._root
        depth = len(parts) - 1
        while depth and parts[:depth] not in self._open:
            depth -= 1
        here = self._open[parts[:depth]] if depth else self._root
        for end in range(depth + 1, len(parts) + 1):
            name = parts[end - 1]
            try:
                below = os.open(name, DIRECTORY, dir_fd=here)
            except FileNotFoundError:
                if imply is None:
                    raise
                imply(here, parts[:end])
                below = os.open(name, DIRECTORY, dir_fd=here)
            self._keep(parts[:end], below)
            here = below
        return here

    def _keep(self, parts: Parts, descriptor: int) -> None:
        self._open[parts] = descriptor
        if len(self._open) > OPEN_DIRECTORIES:
            os.close(self._open.popitem(last=False)[1])

    def forget(self, parts: Parts) -> None:
        """Something else is to stand at ``parts``: the directory there, and all below it, are no more."""
        depth = len(parts)
        for one in [one for one in self._open if one[:depth] == parts]:
            os.close(self._open.pop(one))

    def close(self) -> None:
        """Close what is open."""
        while self._open:
            os.close(self._open.popitem()[1])
