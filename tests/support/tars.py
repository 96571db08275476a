# SPDX-License-Identifier: Apache-2.0
"""Tar archives made by hand, block by block, so that tests can break them anywhere."""

from __future__ import annotations

BLOCK = 512
END = bytes(2 * BLOCK)
MAGICS = {"v7": b"", "ustar": b"ustar\x0000", "star": b"ustar\x0000", "gnu": b"ustar  \0"}


def header(
    name: bytes = b"f",
    kind: bytes = b"0",
    size: bytes | int = 0,
    *,
    dialect: str = "ustar",
    mode: bytes = b"0000644\0",
    uid: bytes = b"0000000\0",
    mtime: bytes = b"00000000000\0",
    linkname: bytes = b"",
    signed: bool = False,
    checksum_off_by: int = 0,
    **fields: bytes,
) -> bytes:
    """One header block. ``fields`` are ``at_<offset>=bytes``, written last."""
    block = bytearray(BLOCK)
    number = b"%011o\0" % size if isinstance(size, int) else size
    pieces = [(0, name), (100, mode), (108, uid), (116, b"0000000\0"), (124, number), (136, mtime)]
    pieces += [(156, kind), (157, linkname), (257, MAGICS[dialect])]
    if dialect == "star":
        pieces.append((508, b"tar\0"))
    pieces += [(int(key.removeprefix("at_")), value) for key, value in fields.items()]
    for at, value in pieces:
        block[at : at + len(value)] = value
    block[148:156] = b" " * 8
    total = sum(byte - 256 if signed and byte > 127 else byte for byte in block) + checksum_off_by
    block[148:156] = b"%06o\0 " % total
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def record(key: bytes, value: bytes) -> bytes:
    """A PAX record with its right length."""
    rest = len(key) + len(value) + 3
    length = rest
    while length != rest + len(str(length)):
        length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def extension(kind: bytes, payload: bytes) -> bytes:
    """An extension header (``x``, ``g``, ``L`` or ``K``) and its payload."""
    return header(b"extension", kind, len(payload)) + padded(payload)


def pax(**records: bytes) -> bytes:
    """An ``x`` header; ``_`` in keys stands for a dot."""
    return extension(b"x", b"".join(record(key.replace("_", ".").encode(), value) for key, value in records.items()))
