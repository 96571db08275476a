# SPDX-License-Identifier: Apache-2.0
"""Tar headers in every dialect that layers are written in: V7, USTAR, PAX, GNU and STAR.

`Headers` is a machine that is fed what it asks for and hands out members; where the bytes come from, and what
becomes of the members' data, is `soci.tar`'s business. The rules for reading a field are those of Go's reader,
because a layer must look the same to us as to containerd and to the other builder of zTOCs: lenient about padding,
strict about numbers, GNU long names over PAX paths, names never cleaned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Final, Literal

from soci import tar_pax
from soci.entries import BLOCK
from soci.errors import InvalidTar, Unsupported
from soci.toc import EntryType, TocEntry

MAX_PAYLOAD_BYTES: Final = tar_pax.MAX_PAYLOAD_BYTES

_ZERO_BLOCK: Final = bytes(BLOCK)
_OCTAL: Final = b"01234567"
_BLANK: Final = b" \0"
_WORD: Final = 1 << 32
_INT64: Final = 1 << 63
_FREE_YEARS: Final = 146_097  # days of 400 years, after which the calendar repeats
_EPOCH_ORDINAL: Final = 719_163  # date(1970, 1, 1).toordinal()
_FIRST_ORDINAL: Final = -365  # 0000-01-01
_LAST_ORDINAL: Final = 3_652_059  # 9999-12-31
_TYPES: Final[Mapping[bytes, EntryType]] = {
    b"0": "reg",
    b"1": "hardlink",
    b"2": "symlink",
    b"3": "char",
    b"4": "block",
    b"5": "dir",
    b"6": "fifo",
}
_WITHOUT_DATA: Final = frozenset(b"123456")
_NO_RECORDS: Final[Mapping[bytes, bytes]] = {}

Dialect = Literal["v7", "ustar", "star", "gnu"]


@dataclass(slots=True)
class _Fields:
    """One header block, before extension headers have their say."""

    kind: bytes
    name: bytes
    linkname: bytes
    size: int
    mode: int
    uid: int
    gid: int
    seconds: int
    nanoseconds: int = 0
    uname: bytes = b""
    gname: bytes = b""
    devmajor: int = 0
    devminor: int = 0


class Headers:
    """Reads headers. Give exactly `wanted` bytes each time, then skip ``data`` bytes (a member's) and ``padding``.

    ``sparse`` says whether sparse members are let through: their data cannot be served by offset.
    ``global_pax`` says whether a ``g`` header breaks the archive or is skipped (its records are for defaults that
    no layer needs; containerd skips it, while a TOC has no place for it).
    """

    def __init__(self, *, sparse: bool = False, global_pax: Literal["refuse", "skip"] = "refuse") -> None:
        self.wanted = BLOCK
        self.ended = False  # the end-of-archive blocks were read
        self.position = 0  # bytes given and skipped so far
        self.data = 0
        self.padding = 0
        self.parse = tar_pax.Parser()  # remembers what records look like
        self._sparse = sparse
        self._skip_global = global_pax == "skip"
        self._give: Callable[[bytes], TocEntry | None] = self._header
        self._payload = b""  # type of the extension header whose payload comes next
        self._reset()

    def give(self, data: bytes) -> TocEntry | None:
        """Take the next `wanted` bytes; a member when its headers are whole. Raises `InvalidTar`, `Unsupported`."""
        self.position += len(data)
        return self._give(data)

    def skip(self, most: int) -> int:
        """Skip at most ``most`` bytes of data and padding; says how many."""
        data = min(most, self.data)
        padding = min(most - data, self.padding)
        self.data -= data
        self.padding -= padding
        self.position += data + padding
        return data + padding

    @property
    def plain(self) -> bool:
        """Whether a header comes next that no extension header has anything to say about."""
        return self._give == self._header and not (self._records or self._long_name or self._long_link)

    def jump(self, position: int, data: int) -> None:
        """Stand behind a header that somebody else has read: at ``position``, before ``data`` bytes of its member."""
        self.position, self.data, self.padding = position, data, -data % BLOCK

    def may_end(self) -> bool:
        """Whether the archive may stop here: before a header, or in the padding before it."""
        return self.ended or (not self.data and self._give in (self._header, self._second_zero))

    def _reset(self) -> None:
        self._records: Mapping[bytes, bytes] = _NO_RECORDS
        self._long_name = b""
        self._long_link = b""

    def _header(self, block: bytes) -> TocEntry | None:
        if block == _ZERO_BLOCK:
            self._give = self._second_zero
            return None
        fields = _parse_block(block)
        if fields.kind in (b"x", b"L", b"K", b"g"):
            self._expect_payload(fields)
            return None
        return self._member(fields)

    def _second_zero(self, block: bytes) -> TocEntry | None:
        if block != _ZERO_BLOCK:
            raise InvalidTar("a zero block, then one that is not")
        self.ended = True
        self.wanted = 0
        return None

    def _expect_payload(self, fields: _Fields) -> None:
        if fields.kind == b"g" and not self._skip_global:
            raise InvalidTar("PAX global header: a TOC has no place for its records")
        if not 0 <= fields.size <= MAX_PAYLOAD_BYTES:
            raise InvalidTar(f"extension header of {fields.size} bytes; at most {MAX_PAYLOAD_BYTES} are allowed")
        self._payload = fields.kind
        if fields.size:
            self._give = self._take_payload
            self.wanted = fields.size
        else:
            self._take_payload(b"")

    def _take_payload(self, data: bytes) -> None:
        if self._payload == b"x":
            self._records = self.parse(data)
        elif self._payload == b"L":
            self._long_name = _text(data)
        elif self._payload == b"K":
            self._long_link = _text(data)
        else:
            self._reset()
        self._give = self._header
        self.wanted = BLOCK
        self.padding = -len(data) % BLOCK

    def _member(self, fields: _Fields) -> TocEntry | None:
        records = self._records
        if fields.size < 0 and fields.kind[0] not in _WITHOUT_DATA:
            raise InvalidTar(f"member of {fields.size} bytes")
        _apply_records(fields, records)
        fields.name = self._long_name or fields.name
        fields.linkname = self._long_link or fields.linkname
        if fields.kind == b"\0":
            fields.kind = b"5" if fields.name.endswith(b"/") else b"0"
        data = 0 if fields.kind[0] in _WITHOUT_DATA else fields.size
        if fields.kind not in _TYPES or data < 0:
            raise InvalidTar(f"member {fields.name[:100]!r} of type {fields.kind!r} with {fields.size} bytes")
        self._reset()
        self.data, self.padding = data, -data % BLOCK
        if records and tar_pax.is_sparse(records):
            return self._sparse_member(fields, records)
        return self._entry(fields, records)

    def _sparse_member(self, fields: _Fields, records: Mapping[bytes, bytes]) -> TocEntry | None:
        if not self._sparse:
            raise Unsupported(f"sparse member {fields.name[:100]!r}: the archive holds only parts of it")
        if fields.kind != b"0":
            raise InvalidTar("sparse member that is no regular file")
        fields.name = tar_pax.sparse_name(records) or fields.name
        size = tar_pax.sparse_size(records)
        fields.size = fields.size if size is None else size
        if not tar_pax.has_map_in_data(records):
            tar_pax.check_map_in_records(records, fields.size)
            return self._entry(fields, records)
        # The map is the data's first blocks. They are taken one by one, then the member goes on behind them.
        sparse_map, left, padding = tar_pax.MapReader(), self.data, self.padding

        def take(block: bytes) -> TocEntry | None:
            nonlocal left
            left -= BLOCK
            if not sparse_map.feed(block):
                if left < BLOCK:
                    raise InvalidTar("sparse map cut short")
                return None
            sparse_map.check(fields.size)
            self._give = self._header
            self.data, self.padding = left, padding
            return self._entry(fields, records)

        if left < BLOCK:
            raise InvalidTar("sparse map cut short")
        self.data = self.padding = 0
        self._give = take
        return None

    def _entry(self, fields: _Fields, records: Mapping[bytes, bytes]) -> TocEntry:
        return TocEntry(
            name=fields.name,
            type=_TYPES[fields.kind],
            offset=self.position,
            size=fields.size,
            linkname=fields.linkname,
            mode=fields.mode,
            uid=fields.uid % _WORD,
            gid=fields.gid % _WORD,
            uname=fields.uname,
            gname=fields.gname,
            mod_time=format_time(fields.seconds, fields.nanoseconds),
            devmajor=fields.devmajor,
            devminor=fields.devminor,
            pax=records,
        )


def format_time(seconds: int, nanoseconds: int) -> str:
    """RFC 3339 text in UTC, the fraction without its trailing zeros; empty outside the years 0 to 9999."""
    days, second = divmod(seconds, 86_400)
    ordinal = days + _EPOCH_ORDINAL
    if not _FIRST_ORDINAL <= ordinal <= _LAST_ORDINAL:
        return ""
    day = date.fromordinal(ordinal if ordinal > 0 else ordinal + _FREE_YEARS)  # `date` begins with the year 1
    year = day.year if ordinal > 0 else day.year - 400
    fraction = f".{nanoseconds:09d}".rstrip("0") if nanoseconds else ""
    minute, second = divmod(second, 60)
    hour, minute = divmod(minute, 60)
    return f"{year:04d}-{day.month:02d}-{day.day:02d}T{hour:02d}:{minute:02d}:{second:02d}{fraction}Z"


def _parse_block(block: bytes) -> _Fields:
    dialect = _dialect(block)
    fields = _Fields(
        kind=block[156:157],
        name=_text(block[0:100]),
        linkname=_text(block[157:257]),
        size=_number(block[124:136]),
        mode=_number(block[100:108]),
        uid=_number(block[108:116]),
        gid=_number(block[116:124]),
        seconds=_number(block[136:148]),
    )
    if dialect == "v7":
        return fields
    fields.uname = _text(block[265:297])
    fields.gname = _text(block[297:329])
    fields.devmajor = _number(block[329:337])
    fields.devminor = _number(block[337:345])
    prefix = _prefix(block, dialect)
    if prefix:
        fields.name = prefix + b"/" + fields.name
    return fields


def _dialect(block: bytes) -> Dialect:
    stated = _octal(block[148:156])
    total = sum(block) - sum(block[148:156]) + 8 * 32
    if stated != total:
        # Some old writers summed signed bytes.
        negative = sum(1 for byte in block[:148] + block[156:] if byte > 127)
        if stated != total - 256 * negative:
            raise InvalidTar("header with a wrong checksum")
    magic, version, trailer = block[257:263], block[263:265], block[508:512]
    if magic == b"ustar\0":
        return "star" if trailer == b"tar\0" else "ustar"
    if magic == b"ustar " and version == b" \0":
        return "gnu"
    return "v7"


def _prefix(block: bytes, dialect: Dialect) -> bytes:
    if dialect == "ustar":
        return _text(block[345:500])
    if dialect == "star":
        _number(block[476:488])
        _number(block[488:500])
        return _text(block[345:476])
    # GNU has times in the prefix's place. Where they are no numbers, an old writer put a prefix there after all.
    try:
        for field in (block[345:357], block[357:369]):
            if field[0]:
                _number(field)
    except InvalidTar:
        prefix = _text(block[345:500])
        return prefix if prefix.isascii() else b""
    return b""


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _number(field: bytes) -> int:
    if not field[0] & 0x80:
        return _octal(field)
    # Base 256, two's complement, the highest bit being the mark.
    number = int.from_bytes(field, "big") & (1 << (8 * len(field) - 1)) - 1
    if field[0] & 0x40:
        number -= 1 << (8 * len(field) - 1)
    if not -_INT64 <= number < _INT64:
        raise InvalidTar("number beyond 64 bits")
    return number


def _octal(field: bytes) -> int:
    digits = field.strip(_BLANK).partition(b"\0")[0]
    if digits.translate(None, _OCTAL):
        raise InvalidTar(f"not an octal number: {field!r}")
    return int(digits, 8) if digits else 0


def _apply_records(fields: _Fields, records: Mapping[bytes, bytes]) -> None:
    """Let PAX records override the header's fields; an empty value keeps the field. Raises `InvalidTar`."""
    if not records:
        return
    fields.name = records.get(b"path") or fields.name
    fields.linkname = records.get(b"linkpath") or fields.linkname
    fields.uname = records.get(b"uname") or fields.uname
    fields.gname = records.get(b"gname") or fields.gname
    fields.uid = tar_pax.override(records, b"uid", tar_pax.parse_int, fields.uid)
    fields.gid = tar_pax.override(records, b"gid", tar_pax.parse_int, fields.gid)
    fields.size = tar_pax.override(records, b"size", tar_pax.parse_int, fields.size)
    for key in (b"atime", b"ctime", b"mtime"):
        text = records.get(key)
        if text:
            moment = tar_pax.parse_time(text)
            if key == b"mtime":
                fields.seconds, fields.nanoseconds = moment
