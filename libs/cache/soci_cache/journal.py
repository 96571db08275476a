# SPDX-License-Identifier: Apache-2.0
"""The journal: one record for each filled span, with the SHA-256 of its *uncompressed* bytes.

A record is 40 bytes: span number (u32, little-endian), CRC-32 of the other 36 bytes (u32), SHA-256 (32 bytes); 32 zero
bytes in the digest's place say that the span was taken away. Records are appended by one write(2) each, so that
processes may share the file (O_APPEND). A torn or damaged record is passed over, byte by byte until the next whole one:
its span then counts as absent and is fetched again. Later records win.
"""

from __future__ import annotations

import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Final

RECORD = struct.Struct("<II32s")
JOURNAL_LIMIT = 16 << 20
"""Bytes of a journal that are read, the last ones: three times what the most spans of a layer need."""
GONE: Final = bytes(32)
"""In the digest's place."""


def encode_record(span: int, sha256: bytes) -> bytes:
    """One record; with `GONE` it voids the span's earlier ones."""
    return RECORD.pack(span, _crc(span, sha256), sha256)


def parse_journal(content: bytes, spans: int) -> dict[int, bytes]:
    """Span → SHA-256 of its bytes, from the records that are whole and speak of one of ``spans`` spans.

    In the order of the last records: what was filled longest ago comes first.
    """
    found: dict[int, bytes] = {}
    place = 0
    while place + RECORD.size <= len(content):
        span, crc, sha256 = RECORD.unpack_from(content, place)
        if crc == _crc(span, sha256):
            found.pop(span, None)
            if span < spans and sha256 != GONE:
                found[span] = sha256
            place += RECORD.size
        else:
            place += 1
    return found


def read_journal(place: Path, spans: int) -> dict[int, bytes]:
    """What the journal in a layer's folder says, see `parse_journal`; nothing where there is none. Raises OSError."""
    with suppress(FileNotFoundError), (place / "journal").open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - JOURNAL_LIMIT))
        return parse_journal(file.read(JOURNAL_LIMIT), spans)
    return {}


def _crc(span: int, sha256: bytes) -> int:
    return zlib.crc32(struct.pack("<I", span) + sha256)
