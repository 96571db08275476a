# SPDX-License-Identifier: Apache-2.0
"""What the cache holds, layer by layer, as values; and its budget. Looks only, at a handful of files a layer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from soci.digest import Digest, parse_digest
from soci.errors import InvalidDigest, InvalidInput
from soci_cache.compressed import FILE
from soci_cache.evict import DRAFT, folder_size
from soci_cache.presence import ABSENT, FILLED, Presence, boot_id
from soci_cache.proof import COMPLETE, OPEN, REJECTED, UNPROVEN

AUTOMATIC_FREE: Final = 0.2
"""The share of the file system that the automatic budget leaves free: the kubelet begins to evict pods, and to delete
images, where less than 0.15 is free."""
HIGH_WATER: Final = 1.0
"""Share of the budget above which room is made."""
LOW_WATER: Final = 0.9
"""Share of the budget that is reached then, so that room is not made span by span."""

NO_MARKS: Final = (0, 0, 0, 0)
Key = tuple[Digest, Digest]
"""Layer and zTOC."""


@dataclass(frozen=True, slots=True)
class Held:
    """One layer of the cache."""

    layer: Digest
    ztoc: Digest
    size: int  # bytes that its files take of the disk
    used_at: float  # seconds since the epoch: of its last use: see `soci_cache.store`
    counts: tuple[int, ...] = NO_MARKS  # of spans, by mark; none where there is no map of this boot
    verdict: int = OPEN
    known: bool = True  # is there a map of this boot?
    shared_at: float = 0.0  # when compressed bytes were kept for other nodes, last; 0: none are

    @property
    def key(self) -> Key:
        """Layer and zTOC."""
        return self.layer, self.ztoc

    @property
    def here(self) -> int:
        """Spans that are here."""
        return self.spans - self.counts[ABSENT]

    @property
    def spans(self) -> int:
        """Spans in all."""
        return sum(self.counts)

    @property
    def full(self) -> bool:
        """Is all of it here?"""
        return self.known and not self.counts[ABSENT]

    @property
    def state(self) -> str:
        """``lazy``, ``filling`` (in the background, or being proven), ``complete``, ``unproven``, ``rejected``.

        ``unchecked``: nobody opened it since the machine's boot.
        """
        if not self.known:
            return "unchecked"
        found = {COMPLETE: "complete", UNPROVEN: "unproven", REJECTED: "rejected"}.get(self.verdict)
        return found or ("filling" if self.counts[FILLED] or self.full else "lazy")


def survey(cache: Path) -> list[Held]:
    """Every layer that the cache holds, in the order of their names. Raises OSError where the disk fails."""
    return [held for place in folders(cache) if (held := look(place)) is not None]


def folders(cache: Path) -> Iterator[Path]:
    """The layers' folders."""
    for parent in _folders(cache / "layers"):
        yield from _folders(parent)


def _folders(parent: Path) -> list[Path]:
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(parent) as entries:
        found = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        return [parent / name for name in sorted(found) if not name.startswith(DRAFT)]
    return []


def look(place: Path) -> Held | None:
    """What a layer's folder holds; None where it is gone, or is none of ours."""
    try:
        layer, ztoc = _digest(place.parent.name), _digest(place.name)
        used_at = place.stat().st_mtime
    except (InvalidDigest, OSError):
        return None
    size, shared_at = folder_size(place)[0], _shared_at(place)
    try:
        presence = Presence(place / "spans", writable=False)
    except (OSError, InvalidInput):
        return Held(layer, ztoc, size, used_at, known=False, shared_at=shared_at)
    try:
        if presence.boot != boot_id():
            return Held(layer, ztoc, size, used_at, known=False, shared_at=shared_at)
        return Held(layer, ztoc, size, used_at, presence.counts(), presence.verdict, shared_at=shared_at)
    finally:
        presence.close()


def _shared_at(place: Path) -> float:
    with suppress(OSError):
        return (place / FILE).stat().st_mtime
    return 0.0


def _digest(name: str) -> Digest:
    return parse_digest(f"sha{len(name) * 4}:{name}")


def budget_of(setting: int, used: int, disk: int, free: int) -> int:
    """Bytes that the cache may take: ``setting``, or, where that is 0, what leaves `AUTOMATIC_FREE` of the disk free.

    ``used`` are the cache's own bytes, ``disk`` and ``free`` the file system's, free to us. Pure.
    """
    return setting or max(0, used + free - int(disk * AUTOMATIC_FREE))


def budget_here(cache: Path, setting: int, used: int) -> int:
    """As `budget_of`, for the cache at this place. Raises OSError."""
    found = os.statvfs(cache)
    return budget_of(setting, used, found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)
