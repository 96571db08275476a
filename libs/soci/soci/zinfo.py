# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a zTOC: where inflating can start.

Two forms, chosen by the layer's compression. For gzip a packed little-endian blob, called zinfo: a count, the span
size, then a record a checkpoint with its offsets, bit position and window. Version 1 of it left out the first
record; the blob's length tells the versions apart. For plain tar a FlatBuffers table, TarZinfo, which is but the
span size and the blob's size.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from soci.errors import InvalidZtoc
from soci.flat import FlatBuffer, Tables, schema
from soci.flat_write import Writer

WINDOW_BYTES: Final = 32_768
"""Bytes of output that deflate may refer back to, kept whole with each checkpoint."""
HEADER_BYTES: Final = 12
RECORD_BYTES: Final = 8 + 8 + 1 + WINDOW_BYTES
MAX_SPANS: Final = 131_000
"""Checkpoints of one layer. Beyond it the blob passes 4 GiB, which other implementations cannot address."""
TAR_ZINFO_VERSION: Final = 2
MAX_TAR_ZINFO_BYTES: Final = 48
V1_FIRST_IN: Final = 10
"""Where version 1 takes the first span to start: behind a gzip header without optional fields."""

_HEADER: Final = struct.Struct("<iq")
_POINT: Final = struct.Struct("<qqB")
_ZERO_WINDOW: Final = memoryview(bytes(WINDOW_BYTES))
_TAR_ZINFO: Final = schema("iqq")
_TAR_ZINFO_FIELDS: Final = tuple(enumerate("iqq"))
_INT64_MAX: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The gzip checkpoints of a layer, read from the blob as they are asked for: the windows are not copied."""

    version: int  # of the blob: 1 or 2
    count: int  # at least 1
    span_size: int  # bytes: the least distance between checkpoints, as given to the builder
    blob: memoryview

    def in_offset(self, i: int) -> int:
        """Offset in the compressed blob of the first whole byte of span ``i``."""
        return self._point(i)[0]

    def out_offset(self, i: int) -> int:
        """Offset in the uncompressed stream where span ``i`` starts."""
        return self._point(i)[1]

    def bits(self, i: int) -> int:
        """How many bits (0 to 7) of the byte before `in_offset` still belong to span ``i``: its highest ones."""
        return self._point(i)[2]

    def window(self, i: int) -> memoryview:
        """The 32 KiB of output before span ``i``, oldest byte first, zeros where there is no output yet."""
        at = self._at(i)
        return _ZERO_WINDOW if at is None else self.blob[at + _POINT.size : at + RECORD_BYTES]

    def points(self) -> Iterator[tuple[int, int, int]]:
        """(in offset, out offset, bits) of every checkpoint."""
        return (self._point(i) for i in range(self.count))

    def encode(self) -> bytes:
        """The blob, byte for byte as it was parsed, whichever its version."""
        return bytes(self.blob)

    def _at(self, i: int) -> int | None:
        if not 0 <= i < self.count:
            raise InvalidZtoc(f"no checkpoint {i}: the layer has {self.count}")
        if self.version == 1:
            return HEADER_BYTES + (i - 1) * RECORD_BYTES if i else None
        return HEADER_BYTES + i * RECORD_BYTES

    def _point(self, i: int) -> tuple[int, int, int]:
        at = self._at(i)
        if at is None:
            return V1_FIRST_IN, 0, 0
        found: tuple[int, int, int] = _POINT.unpack_from(self.blob, at)
        return found


def parse_zinfo(blob: bytes | memoryview) -> Checkpoints:
    """The checkpoints in a zinfo blob of either version.

    Raises `InvalidZtoc` for a blob without checkpoints, of a length that fits neither version, or with a bit
    position or an offset that cannot be. Whether the offsets ascend and lie within the layer: `soci.span`.
    """
    if len(blob) < HEADER_BYTES:
        raise InvalidZtoc(f"checkpoints cut short: {len(blob)} bytes")
    count, span_size = _HEADER.unpack_from(blob)
    if not 1 <= count <= MAX_SPANS:
        raise InvalidZtoc(f"{count} checkpoints; from 1 to {MAX_SPANS} are allowed")
    if span_size < 0:
        raise InvalidZtoc(f"negative span size {span_size}")
    records = len(blob) - HEADER_BYTES
    if records == count * RECORD_BYTES:
        version = 2
    elif records == (count - 1) * RECORD_BYTES:
        version = 1
    else:
        raise InvalidZtoc(f"{records} bytes cannot hold {count} checkpoints")
    found = Checkpoints(version, count, span_size, memoryview(blob).toreadonly())
    for number, (into, out, bits) in enumerate(found.points()):
        if bits > 7 or out < 0 or into < (1 if bits else 0):
            raise InvalidZtoc(f"impossible checkpoint {number}: in {into}, out {out}, bits {bits}")
    return found


@dataclass(frozen=True, slots=True)
class TarZinfo:
    """The checkpoints of a plain tar: a span starts every ``span_size`` bytes."""

    span_size: int  # bytes, at least 1
    size: int  # bytes of the layer blob
    version: int = TAR_ZINFO_VERSION


def parse_tar_zinfo(blob: bytes) -> TarZinfo:
    """Read a TarZinfo buffer; raises `InvalidZtoc`."""
    buffer = FlatBuffer(blob)
    (version, span_size, size, _), _ = Tables(buffer, _TAR_ZINFO).row(buffer.root())
    if span_size < 1 or size < 0:
        raise InvalidZtoc(f"plain tar with span size {span_size} and size {size}")
    return TarZinfo(span_size, size, version)


def encode_tar_zinfo(zinfo: TarZinfo) -> bytes:
    """The TarZinfo buffer: one table, its fields added in slot order; raises `InvalidZtoc` for sizes that cannot be."""
    if not 1 <= zinfo.span_size <= _INT64_MAX or not 0 <= zinfo.size <= _INT64_MAX:
        raise InvalidZtoc(f"plain tar with span size {zinfo.span_size} and size {zinfo.size}")
    writer = Writer(MAX_TAR_ZINFO_BYTES, "MAX_TAR_ZINFO_BYTES")
    return writer.finish(writer.table(_TAR_ZINFO_FIELDS, (zinfo.version, zinfo.span_size, zinfo.size)))
