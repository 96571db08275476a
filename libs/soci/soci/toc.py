# SPDX-License-Identifier: Apache-2.0
"""The zTOC as values: what a layer holds, and where inflating can start.

These are the field-by-field contents of the binary form that `soci.ztoc` reads and writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

Algorithm = Literal["gzip", "uncompressed", "zstd"]
EntryType = Literal["reg", "hardlink", "symlink", "char", "block", "dir", "fifo"]

VERSION: Final = "0.9"
"""The only version of the format."""
MAX_ZTOC_BYTES: Final = 512 << 20
"""Bytes of one zTOC, read or built: 16,000 spans, or two million files."""
MAX_ENTRIES: Final = 2_000_000
"""Members of one layer."""
MAX_NAME_BYTES: Final = 1 << 20
"""Bytes of a member's name or link target: what tar's extension headers can hold."""


@dataclass(frozen=True, slots=True)
class TocEntry:
    """One member of the layer's tar. Text of the tar is bytes: names need not be UTF-8."""

    name: bytes  # verbatim: not cleaned
    type: EntryType
    offset: int  # of the first data byte in the uncompressed tar
    size: int  # bytes; recorded even for members that carry no data
    linkname: bytes = b""
    mode: int = 0
    uid: int = 0
    gid: int = 0
    uname: bytes = b""
    gname: bytes = b""
    mod_time: str = ""  # RFC 3339, or empty for years outside 0..9999
    devmajor: int = 0
    devminor: int = 0
    pax: Mapping[bytes, bytes] = field(default_factory=dict)  # the member's own PAX records, raw


@dataclass(frozen=True, slots=True)
class Ztoc:
    """One layer's table of contents and inflate checkpoints."""

    version: str
    build_tool: str
    compressed_size: int  # bytes of the layer blob
    uncompressed_size: int  # bytes of the tar up to its end-of-archive blocks
    entries: Sequence[TocEntry]  # ascending by offset; read from bytes, made one by one (`soci.entries`)
    algorithm: Algorithm
    max_span_id: int  # number of spans - 1
    span_digests: tuple[str, ...]
    checkpoints: bytes  # gzip: the zinfo blob; uncompressed: a TarZinfo buffer
