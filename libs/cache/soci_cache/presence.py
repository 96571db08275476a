# SPDX-License-Identifier: Apache-2.0
"""The presence map: which spans of ``layer.tar`` are here, and why; processes share it through mmap(2).

The file is a header of 64 bytes and one byte a span: 0 absent, else here, and the number says what it came for. A whole
byte, not a bit: several fetchers mark neighbouring spans at the same time, and a byte store never takes a neighbour's
mark with it.

    0   8   magic "SOCISPAN"
    8   4   version, 1 (little-endian)
    12  4   number of spans
    16  36  boot id (/proc/sys/kernel/random/boot_id): the boot in which the marks were set
    52  4   evictions, in this machine's byte order: grows before bytes that a mark stood for are taken away
    56  1   verdict on the whole layer: see `soci_cache.proof`
    57  7   zero

Within one boot the page cache outlives a killed process, so a mark that follows its bytes in program order is right.
After another boot, what reached the disk is unknown, and the journal decides (see `soci_cache.journal`).
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import Final

from soci.errors import InvalidInput

MAGIC = b"SOCISPAN"
VERSION = 1
HEADER = 64
ABSENT: Final = 0
NEEDED: Final = 1
"""The span came because a read waited for it. Maps of an earlier release say this of every span."""
AHEAD: Final = 2
"""It was fetched ahead of a read, or by a load order."""
FILLED: Final = 3
"""It was fetched in the background, for nobody in particular."""
EVICTIONS: Final = 52
VERDICT: Final = 56
SPANS_LIMIT = 131_000
"""Spans of one layer: the most that the zTOC's checkpoints may have."""
_WANTED_AS_X: Final = bytes([0x20, 0x78, 0x78]) + b" " * 253
"""Marks of spans that somebody wanted become letters, all others spaces."""


def boot_id() -> str:
    """This boot's id: 36 characters."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def new_map(spans: int, boot: str) -> bytes:
    """A map of ``spans`` absent spans."""
    return struct.pack("<8sII36s12x", MAGIC, VERSION, spans, boot.encode()) + bytes(spans)


class Presence:
    """One layer's map, open for reading (or for marking too)."""

    count: int
    """Spans in all."""
    boot: str
    """The boot whose marks these are."""

    def __init__(self, path: Path, *, writable: bool) -> None:
        """Raises `InvalidInput` where the file is not a map; OSError where there is none."""
        descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            found = os.fstat(descriptor)
            size = found.st_size
            if not HEADER <= size <= HEADER + SPANS_LIMIT:
                raise InvalidInput(f"{path}: {size} bytes are no presence map")
            self._map = mmap.mmap(descriptor, size, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        magic, version, self.count, boot = struct.unpack_from("<8sII36s", self._map)
        if magic != MAGIC or version != VERSION or HEADER + self.count != size:
            self._map.close()
            raise InvalidInput(f"{path}: not a presence map of version {VERSION}")
        self.boot = boot.decode(errors="replace")
        self._words = memoryview(self._map)[EVICTIONS : EVICTIONS + 4].cast("I")  # loaded and stored at once
        self.file = (found.st_dev, found.st_ino)

    def __getitem__(self, span: int) -> int:
        """The span's mark; `ABSENT` is false."""
        if not 0 <= span < self.count:
            raise IndexError(span)
        mark: int = self._map[HEADER + span]
        return mark

    def missing(self, spans: range) -> list[int]:
        """Those of ``spans`` that are absent; IndexError where the layer has not all of them."""
        if not 0 <= spans.start <= spans.stop <= self.count or spans.step != 1:
            raise IndexError(spans)
        marks = self._map[HEADER + spans.start : HEADER + spans.stop]
        return [spans.start + i for i, mark in enumerate(marks) if not mark] if 0 in marks else []

    def marks(self) -> bytes:
        """Every span's mark, as of now."""
        return bytes(self._map[HEADER:])

    def counts(self) -> tuple[int, ...]:
        """How many spans have each mark: absent, needed, ahead, filled. A mark that is none counts as needed."""
        marks = self.marks()
        absent, ahead, filled = (marks.count(mark) for mark in (ABSENT, AHEAD, FILLED))
        return absent, len(marks) - absent - ahead - filled, ahead, filled

    def present(self) -> int:
        """How many spans are here."""
        return len(self.marks()) - self.marks().count(ABSENT)

    def wanted(self) -> tuple[int, int]:
        """How many spans came because they were needed or foreseen, and in how many runs of neighbours."""
        letters = self._map[HEADER:].translate(_WANTED_AS_X)
        return letters.count(b"x"), len(letters.split())

    def mark(self, span: int, mark: int = NEEDED) -> None:
        """Say that the span is here, and what for. Only after its bytes are in the file."""
        if not 0 <= span < self.count:
            raise IndexError(span)
        if mark not in _MARKS:
            raise ValueError(mark)
        self._map[HEADER + span] = mark

    def clear(self, span: int) -> None:
        """Say that the span is absent. Before its bytes go, `evicting` must be called."""
        if not 0 <= span < self.count:
            raise IndexError(span)
        self._map[HEADER + span] = ABSENT

    @property
    def evictions(self) -> int:
        """A number that differs after bytes were taken away: what was read meanwhile may be holes."""
        return self._words[0]

    def evicting(self) -> None:
        """Say that bytes go, after marks went and before the bytes do. One process at a time (`soci_cache.evict`)."""
        self._words[0] = (self._words[0] + 1) % (1 << 32)

    @property
    def verdict(self) -> int:
        """What is known of the layer as a whole."""
        return self._map[VERDICT]

    @verdict.setter
    def verdict(self, verdict: int) -> None:
        self._map[VERDICT] = verdict

    def close(self) -> None:
        """Let go of the mapping."""
        self._words.release()
        self._map.close()


_MARKS: Final = frozenset({NEEDED, AHEAD, FILLED})


def marks_of(content: bytes) -> bytes:
    """The marks in a map's content, as far as they are any: else `ABSENT`."""
    return bytes(mark if mark in _MARKS else ABSENT for mark in content[HEADER:])
