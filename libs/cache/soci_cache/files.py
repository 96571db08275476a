# SPDX-License-Identifier: Apache-2.0
"""Small things that all who touch the cache's files do the same way."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from soci.errors import LimitExceeded, Unavailable

PIECE = 1 << 20
"""Bytes of ``layer.tar`` that are digested at a time."""
BLOCK_UNIT = 512
"""Bytes of a block as stat(2) counts them."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""What write(2) says of a full disk."""


def replace(place: Path, name: str, content: bytes | bytearray) -> None:
    """Put a file in place of another, whole, and on disk before it has the name."""
    draft = place / f".{name}"
    draft.write_bytes(content)
    sync(draft)
    draft.rename(place / name)


def sync(path: Path) -> None:
    """Have a file or folder on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(descriptor: int, start: int, end: int) -> bytes | None:
    """The SHA-256 of a file's bytes, piece by piece: a span may have as many as memory. None where it ends before."""
    state = hashlib.sha256()
    while start < end:
        piece = os.pread(descriptor, min(end - start, PIECE), start)
        if not piece:
            return None
        state.update(piece)
        start += len(piece)
    return state.digest()


@contextmanager
def disk(place: Path) -> Iterator[None]:
    """The border where what the disk refuses becomes ours."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise LimitExceeded(f"the disk of the span cache is full ({place})") from error
        raise Unavailable(f"the span cache cannot be used: {place}: {error}") from error
