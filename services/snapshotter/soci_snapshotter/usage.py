# SPDX-License-Identifier: Apache-2.0
"""What a snapshot takes of the disk: its directory's files, or what the span cache holds of a lazy layer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from soci.digest import parse_digest
from soci.errors import InvalidInput
from soci_cache import LayerStore
from soci_snapshotter.labels import ZTOC, read_remote_labels

ENTRIES_LIMIT = 50_000_000
"""Directory entries that one walk looks at."""
FEW_ENTRIES = 64
"""Directory entries that are looked at sooner than another thread would begin to."""


def lazy_usage(cache: Path | None, labels: Mapping[str, str]) -> tuple[int, int]:
    """Allocated bytes and inodes that the span cache holds of a lazy snapshot with these labels.

    Looks at a handful of files, never through FUSE. A layer that several snapshots show is counted for each, as
    containerd counts: what a snapshot takes does not depend on who else is there.
    """
    try:
        layer, ztoc = read_remote_labels(labels).layer, parse_digest(labels.get(ZTOC, ""))
    except InvalidInput:
        return 0, 0
    return LayerStore(cache).usage(layer, ztoc) if cache else (0, 0)


def disk_usage(top: Path) -> tuple[int, int]:
    """Allocated bytes and inodes below ``top``, itself included, hard links counted once, other file systems left
    out; what vanishes meanwhile is not counted.
    """
    size, inodes, _ = _walk(top, ENTRIES_LIMIT)
    return size, inodes


def few_usage(top: Path) -> tuple[int, int] | None:
    """As `disk_usage`, where no more than `FEW_ENTRIES` are to be looked at; otherwise None, after a short look."""
    size, inodes, looked = _walk(top, FEW_ENTRIES + 1)
    return (size, inodes) if looked <= FEW_ENTRIES else None


def _walk(top: Path, most: int) -> tuple[int, int, int]:
    """Bytes, inodes, and directory entries looked at, which are ``most`` at most."""
    seen: set[int] = set()
    size = 0
    try:
        root = top.lstat()
    except OSError:
        return 0, 0, 0
    stack = [str(top)]
    seen.add(root.st_ino)
    size += root.st_blocks * 512
    looked = 0
    while stack and looked < most:
        try:
            with os.scandir(stack.pop()) as open_now:
                entries = list(islice(open_now, most - looked))
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
    return size, len(seen), looked
