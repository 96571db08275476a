# SPDX-License-Identifier: Apache-2.0
"""Taking bytes out of the cache: spans out of a layer that stays, and layers as a whole.

No reader ever takes a hole for bytes. Of a span first the mark goes, then the map's count of evictions grows, and only
then the bytes go: whoever read them under a mark sees one of both changed, and looks again (`LayerReader.get`). Who
fills the span holds its lock, and is not disturbed. A layer goes by losing its name, while nobody reads it.

The kernel itself may read a layer, as a file system whose bytes are ``layer.tar``'s: it looks at no mark. Such a file
is *kept* (`keep`): until the machine's next boot nothing of it becomes a hole, and where its folder goes, its bytes go
with the last mount of it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from soci.span import Spans
from soci_cache import locks
from soci_cache.files import BLOCK_UNIT
from soci_cache.journal import GONE, encode_record
from soci_cache.presence import Presence

DRAFT: Final = ".new-"
"""How the names of half-made, and half-removed, folders begin."""
BATCH: Final = 256
"""Spans that go together: the map's count grows once for them, and readers of the layer look again as often."""
_KEPT: Final = stat.S_ISVTX
"""Of ``layer.tar``'s mode; on a regular file it means nothing to Linux. In the file itself, for it holds as long as the
bytes do: mounts outlive every process, and a map may be damaged."""
_KEEP_SIZE_PUNCH_HOLE: Final = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE of fallocate(2)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def keep(tar: int) -> None:
    """Have the open ``layer.tar`` keep its bytes until the next boot; in its locked folder. Raises OSError."""
    os.fchmod(tar, stat.S_IMODE(os.fstat(tar).st_mode) | _KEPT)


def is_kept(tar: int | Path) -> bool:
    """Whether a ``layer.tar``, open or by its name, keeps its bytes. Raises OSError."""
    return bool(os.stat(tar).st_mode & _KEPT)  # noqa: PTH116  descriptors too


def keep_no_more(tar: int) -> None:
    """After a boot no mount of before is left. Raises OSError."""
    os.fchmod(tar, stat.S_IMODE(os.fstat(tar).st_mode) & ~_KEPT)


def take_away(place: Path, spans: Spans, victims: Iterable[int]) -> tuple[int, int]:
    """Free these spans of a layer whose folder is locked; how many went, and bytes of the disk that are free now.

    A span that is being filled stays. Of a file that is kept only marks go, so that damaged bytes are written anew. The
    caller has taken the verdict on the whole layer away first. Raises OSError.
    """
    went = 0
    tar = os.open(place / "layer.tar", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    presence = None
    try:
        before = os.fstat(tar).st_blocks
        unit = os.fstat(tar).st_blksize
        beyond = -(-os.fstat(tar).st_size // unit) * unit
        punch(tar, beyond, beyond + unit)  # nothing is there; where the file system makes no holes, it says so now
        presence = Presence(place / "spans", writable=True)
        left = list(victims)
        for at in range(0, len(left), BATCH):
            batch = [(one, *spans.uncompressed(one)) for one in left[at : at + BATCH]]
            went += _take_batch(place, presence, tar, unit, batch)
        return went, max(0, before - os.fstat(tar).st_blocks) * BLOCK_UNIT
    finally:
        if presence is not None:
            presence.close()
        os.close(tar)


def _take_batch(place: Path, presence: Presence, tar: int, unit: int, batch: list[tuple[int, int, int]]) -> int:
    own = os.open(f"/proc/self/fd/{tar}", os.O_RDWR | os.O_CLOEXEC)  # closing it lets go of the batch's locks
    try:
        taken = [one for one in batch if locks.take_span(own, one[0])]
        went = sum(bool(presence[span]) for span, _, _ in taken)
        for span, _, _ in taken:
            presence.clear(span)
        presence.evicting()
        with suppress(OSError):  # on a full disk room is the first thing; without the records a boot finds holes
            _append(place / "journal", b"".join(encode_record(span, GONE) for span, _, _ in taken))
        for start, end in [] if is_kept(tar) else _stretches((start, end) for _, start, end in taken):
            # whole blocks alone: those at the edges are neighbours' too
            punch(tar, -(-start // unit) * unit, end // unit * unit)
        return went
    finally:
        os.close(own)


def _stretches(pieces: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Starts and ends, those that touch made one."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(pieces):
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], end
        else:
            found.append((start, end))
    return found


def _append(path: Path, records: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.write(descriptor, records)
    finally:
        os.close(descriptor)


def punch(descriptor: int, start: int, end: int) -> None:
    """Make a hole of a file's bytes from ``start`` to ``end``. Raises OSError."""
    if end > start and _libc.fallocate(descriptor, _KEEP_SIZE_PUNCH_HOLE, start, end - start):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def remove_layer(place: Path) -> int | None:
    """Free a layer whose folder is locked; bytes that its files took. None where somebody reads it. Raises OSError."""
    tar = os.open(place / "layer.tar", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_CREAT, 0o600)
    try:
        if not locks.lock_alone(tar):
            return None
        size = folder_size(place)[0]
        gone = Path(tempfile.mkdtemp(prefix=DRAFT, dir=place.parent))
        place.rename(gone / place.name)
        if not is_kept(tar):
            os.ftruncate(tar, 0)  # a fetcher may have it open for long
    finally:
        os.close(tar)
    remove_draft(gone)
    return size


def is_read(place: Path) -> bool:
    """Whether somebody has the layer open for reading. Raises OSError, `NotFound` where it is gone."""
    with locks.folder(place), (place / "layer.tar").open("rb") as tar:
        return not locks.lock_alone(tar.fileno())


def remove_draft(draft: Path) -> None:
    """Delete a folder without a name, and the layer's if it was the last."""
    shutil.rmtree(draft, ignore_errors=True)
    with suppress(OSError):
        draft.parent.rmdir()


def folder_size(place: Path) -> tuple[int, int]:
    """Allocated bytes and inodes of a layer's folder; zeros where it is not there."""
    size = inodes = 0
    try:
        with os.scandir(place) as entries:
            found = [place.lstat(), *(entry.stat(follow_symlinks=False) for entry in entries)]
    except OSError:  # it is not here, or is just being deleted
        found = []
    for one in found:
        size += one.st_blocks * BLOCK_UNIT
        inodes += 1
    return size, inodes
