# SPDX-License-Identifier: Apache-2.0
"""The journal: one record for each filled span, with the SHA-256 of its *uncompressed* bytes.

A record is 40 bytes: span number (u32, little-endian), CRC-32 of the other 36 bytes (u32), SHA-256 (32 bytes).
Records are appended by one write(2) each, so that fetchers may share the file (O_APPEND). A torn or damaged record
is passed over, byte by byte until the next whole one: its span then counts as absent and is fetched again. Later
records win.
"""

from __future__ import annotations

import struct
import zlib

RECORD = struct.Struct("<II32s")
JOURNAL_LIMIT = 16 << 20
"""Bytes of a journal that are read: three times what the most spans of a layer need."""


def encode_record(span: int, sha256: bytes) -> bytes:
    """One record."""
    return RECORD.pack(span, _crc(span, sha256), sha256)


def parse_journal(content: bytes, spans: int) -> dict[int, bytes]:
    """Span → SHA-256 of its bytes, from the records that are whole and speak of one of ``spans`` spans."""
    found: dict[int, bytes] = {}
    place = 0
    while place + RECORD.size <= len(content):
        span, crc, sha256 = RECORD.unpack_from(content, place)
        if crc == _crc(span, sha256):
            if span < spans:
                found[span] = sha256
            place += RECORD.size
        else:
            place += 1
    return found


def _crc(span: int, sha256: bytes) -> int:
    return zlib.crc32(struct.pack("<I", span) + sha256)
