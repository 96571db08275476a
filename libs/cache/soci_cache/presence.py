# SPDX-License-Identifier: Apache-2.0
"""The presence map: which spans of ``layer.tar`` are here, shared by all processes of the node through mmap(2).

The file is a header of 64 bytes and one byte a span: 0 absent, 1 here. A whole byte, not a bit: several fetchers mark
neighbouring spans at the same time, and a byte store never takes a neighbour's mark with it.

    0   8   magic "SOCISPAN"
    8   4   version, 1 (little-endian)
    12  4   number of spans
    16  36  boot id (/proc/sys/kernel/random/boot_id): the boot in which the marks were set
    52  12  zero

Within one boot the page cache outlives a killed process, so a mark that follows its bytes in program order is right.
After another boot, what reached the disk is unknown, and the journal decides (see `soci_cache.journal`).
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

from soci.errors import InvalidInput

MAGIC = b"SOCISPAN"
VERSION = 1
HEADER = 64
HERE = 1
_ABSENT_TO_SPACE = bytes([0x20]) + bytes(range(1, 256))
SPANS_LIMIT = 131_000
"""Spans of one layer: the most that the zTOC's checkpoints may have."""


def boot_id() -> str:
    """This boot's id: 36 characters."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def new_map(spans: int, boot: str) -> bytes:
    """A map of ``spans`` absent spans."""
    return struct.pack("<8sII36s12x", MAGIC, VERSION, spans, boot.encode()) + bytes(spans)


class Presence:
    """One layer's map, open for reading (or for marking too)."""

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
        self.file = (found.st_dev, found.st_ino)

    def __getitem__(self, span: int) -> bool:
        if not 0 <= span < self.count:
            raise IndexError(span)
        return self._map[HEADER + span] == HERE

    def missing(self, spans: range) -> list[int]:
        """Those of ``spans`` that are absent; IndexError where the layer has not all of them."""
        if not 0 <= spans.start <= spans.stop <= self.count or spans.step != 1:
            raise IndexError(spans)
        marks = self._map[HEADER + spans.start : HEADER + spans.stop]
        return [spans.start + i for i, mark in enumerate(marks) if mark != HERE]

    def present(self) -> int:
        """How many spans are here."""
        return self._map[HEADER:].count(HERE)

    def runs(self) -> int:
        """How many runs of neighbouring spans are here: what came at once, more or less."""
        return len(self._map[HEADER:].translate(_ABSENT_TO_SPACE).split())

    def mark(self, span: int) -> None:
        """Say that the span is here. Only after its bytes are in the file."""
        if not 0 <= span < self.count:
            raise IndexError(span)
        self._map[HEADER + span] = HERE

    def clear(self, span: int) -> None:
        """Say that the span is absent."""
        if not 0 <= span < self.count:
            raise IndexError(span)
        self._map[HEADER + span] = 0

    def close(self) -> None:
        """Let go of the mapping."""
        self._map.close()
