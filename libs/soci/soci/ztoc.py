# SPDX-License-Identifier: Apache-2.0
"""The zTOC's binary form: a FlatBuffers buffer, to and from values.

Reading is the harder half. A zTOC is a stranger's bytes, so nothing but `InvalidZtoc` comes out of `parse_ztoc`, and
its memory stays in proportion to the input: counts are compared with the bytes that are there, and the sum of all
strings with the size of the buffer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from soci.errors import InvalidZtoc
from soci.flat import FlatBuffer, Tables, schema
from soci.toc import (
    MAX_ENTRIES,
    MAX_NAME_BYTES,
    MAX_ZTOC_BYTES,
    VERSION,
    Algorithm,
    EntryType,
    TocEntry,
    Ztoc,
)
from soci.toc_time import parse_rfc3339_ns
from soci.zinfo import MAX_SPANS
from soci.ztoc_encode import encode_ztoc
from soci.ztoc_members import MIN_ENTRY_BYTES, parse_members

__all__ = [
    "MAX_ENTRIES",
    "MAX_NAME_BYTES",
    "MAX_ZTOC_BYTES",
    "VERSION",
    "Algorithm",
    "EntryType",
    "TocEntry",
    "Ztoc",
    "encode_ztoc",
    "mtime_ns",
    "parse_ztoc",
    "xattrs",
]

MAX_DIGEST_BYTES: Final = 256
"""Bytes of a span digest's text."""

_ROOT: Final = schema("IIqqII")
_TOC: Final = schema("I")
_COMPRESSION: Final = schema("biII", slot_0=1)
_ALGORITHMS: Final[Mapping[int, Algorithm]] = {1: "gzip", 2: "uncompressed", 3: "zstd"}
_XATTR: Final = b"SCHILY.xattr."


def parse_ztoc(data: bytes | memoryview, *, strict_version: bool = False) -> Ztoc:
    """Read a zTOC. Its entries come back in ascending order of their offsets.

    Raises `InvalidZtoc`, and nothing else, for any bytes that are no zTOC, for one beyond a limit of this module,
    and for one that could not serve its files: members that overlap or lie outside the tar, sparse members, types
    that nobody defined. Only with ``strict_version`` must the version be `VERSION`; nobody else checks it. Whether the
    spans fit the layer is for `soci.span.Spans.of`.
    """
    if len(data) > MAX_ZTOC_BYTES:
        raise InvalidZtoc(f"zTOC of {len(data)} bytes; at most {MAX_ZTOC_BYTES} are allowed (MAX_ZTOC_BYTES)")
    try:
        ztoc = _Parsing(bytes(data)).ztoc()
    except InvalidZtoc as error:
        raise InvalidZtoc(f"zTOC: {error}") from error
    if strict_version and ztoc.version != VERSION:
        raise InvalidZtoc(f"zTOC: version {ztoc.version[:20]!r}, not {VERSION!r}")
    return ztoc


def mtime_ns(entry: TocEntry) -> int:
    """The member's modification time in ns since the epoch; text that is no time is the year 1."""
    return parse_rfc3339_ns(entry.mod_time)


def xattrs(entry: TocEntry) -> dict[bytes, bytes]:
    """The member's extended attributes: its ``SCHILY.xattr.`` records without the prefix, empty values kept."""
    return {key[len(_XATTR) :]: value for key, value in entry.pax.items() if key.startswith(_XATTR)}


class _Parsing:
    """One zTOC being read."""

    def __init__(self, data: bytes) -> None:
        self._buffer = FlatBuffer(data)

    def ztoc(self) -> Ztoc:
        buffer = self._buffer
        tables = Tables(buffer, _ROOT)
        root = buffer.root()
        values, offsets = tables.row(root)
        version = self._text(root + offsets[0] + values[0]) if values[0] else ""
        tool = self._text(root + offsets[1] + values[1]) if values[1] else ""
        compressed_size, uncompressed_size = values[2], values[3]
        if compressed_size < 0 or uncompressed_size < 0:
            raise InvalidZtoc(f"layer of {compressed_size} bytes, tar of {uncompressed_size}")
        toc = tables.target(root, 4, "table of contents")
        compression = tables.target(root, 5, "compression info")
        algorithm, max_span_id, digests, checkpoints = self._compression(compression)
        return Ztoc(
            version=version,
            build_tool=tool,
            compressed_size=compressed_size,
            uncompressed_size=uncompressed_size,
            entries=self._entries(toc, uncompressed_size),
            algorithm=algorithm,
            max_span_id=max_span_id,
            span_digests=digests,
            checkpoints=checkpoints,
        )

    def _compression(self, table: int) -> tuple[Algorithm, int, tuple[str, ...], bytes]:
        buffer = self._buffer
        (number, max_span_id, digests, checkpoints, _), offsets = Tables(buffer, _COMPRESSION).row(table)
        algorithm = _ALGORITHMS.get(number)
        if algorithm is None:
            raise InvalidZtoc(f"unknown compression algorithm {number}")
        if not -1 <= max_span_id < MAX_SPANS:
            raise InvalidZtoc(f"last span {max_span_id}; at most {MAX_SPANS} spans are allowed")
        texts: list[str] = []
        if digests:
            first, count = buffer.vector(table + offsets[2] + digests, 4, "span digests")
            if count > MAX_SPANS:
                raise InvalidZtoc(f"{count} span digests; at most {MAX_SPANS} are allowed")
            texts = [self._text(buffer.follow(at)) for at in range(first, first + 4 * count, 4)]
            if any(len(text) > MAX_DIGEST_BYTES for text in texts):
                raise InvalidZtoc(f"span digest of more than {MAX_DIGEST_BYTES} bytes")
        blob = buffer.bytes_at(table + offsets[3] + checkpoints) if checkpoints else b""
        return algorithm, max_span_id, tuple(texts), blob

    def _entries(self, toc: int, uncompressed_size: int) -> Sequence[TocEntry]:
        buffer = self._buffer
        values, offsets = Tables(buffer, _TOC).row(toc)
        if not values[0]:
            return ()
        first, count = buffer.vector(toc + offsets[0] + values[0], 4, "members")
        if count > min(MAX_ENTRIES, buffer.size // MIN_ENTRY_BYTES):
            raise InvalidZtoc(f"{count} members in {buffer.size} bytes; at most {MAX_ENTRIES} are allowed")
        return parse_members(buffer, first, count, uncompressed_size) if count else ()

    def _text(self, at: int) -> str:
        return self._buffer.bytes_at(at).decode("utf-8", "surrogateescape")
