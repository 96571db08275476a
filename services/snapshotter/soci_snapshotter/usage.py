# SPDX-License-Identifier: Apache-2.0
"""Disk usage of a directory, hard links counted once, other file systems left out."""

from __future__ import annotations

import os
from pathlib import Path

ENTRIES_LIMIT = 50_000_000
"""Directory entries that one walk looks at."""


def disk_usage(top: Path) -> tuple[int, int]:
    """Allocated bytes and inodes below ``top``, itself included; what vanishes meanwhile is not counted."""
    seen: set[int] = set()
    size = 0
    try:
        root = top.lstat()
    except OSError:
        return 0, 0
    stack = [str(top)]
    seen.add(root.st_ino)
    size += root.st_blocks * 512
    looked = 0
    while stack and looked < ENTRIES_LIMIT:
        try:
            entries = list(os.scandir(stack.pop()))
        except OSError:
            continue
        looked += len(entries)
        for entry in entries:
            try:
                found = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            if found.st_dev != root.st_dev or found.st_ino in seen:
                continue
            seen.add(found.st_ino)
            size += found.st_blocks * 512
            if entry.is_dir(follow_symlinks=False):
                stack.append(entry.path)
    return size, len(seen)
