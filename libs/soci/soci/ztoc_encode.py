# SPDX-License-Identifier: Apache-2.0
"""Writing a zTOC.

FlatBuffers are written from the end to the front, so the order in which objects are made is the order of the bytes.
It is the format's own order here: two builders of one layer must come to the same digest.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any, Final

from soci.entries import Row, rows_backwards
from soci.errors import InvalidZtoc, LimitExceeded
from soci.flat_write import Layout, Writer, layout, text
from soci.toc import MAX_ENTRIES, MAX_ZTOC_BYTES, Ztoc

ALGORITHM_NUMBERS: Final = {"gzip": 1, "uncompressed": 2, "zstd": 3}
"""The numbers of the compression algorithms; 3 is this project's own."""
BATCH: Final = 4096
"""Members that are written to one piece of the buffer."""
MAX_WORDS: Final = 1024
"""Owners, links and types, as they stand in the buffer, that are kept: most members have the same ones. And shapes."""
MAX_SHAPE_BYTES: Final = 4096
"""Bytes of a shape of PAX records that is kept."""

_GZIP: Final = 1  # the schema's default, hence not written
_ROOT: Final = ((0, "I"), (1, "I"), (4, "I"), (2, "q"), (3, "q"), (5, "I"))
_TOC: Final = ((0, "I"),)
_COMPRESSION: Final = ((1, "i"), (2, "I"), (3, "I"), (0, "b"))
_ENTRY: Final = tuple(enumerate("IIqqIqIIIIIqqI"))
_SCALARS: Final = (2, 3, 5, 6, 7, 11, 12)
_NO_VECTOR: Final = bytes(4)  # an empty one


def encode_ztoc(ztoc: Ztoc) -> bytes:
    """The zTOC's bytes; the same for equal values, always.

    Entries are written in the order given, PAX records in ascending order of their keys. Raises `InvalidZtoc` for a
    number that its field cannot hold, `LimitExceeded` beyond `MAX_ENTRIES` or `MAX_ZTOC_BYTES`.
    """
    if len(ztoc.entries) > MAX_ENTRIES:
        raise LimitExceeded(f"{len(ztoc.entries)} members; a zTOC has at most {MAX_ENTRIES} (MAX_ENTRIES)")
    writer = Writer(MAX_ZTOC_BYTES, "MAX_ZTOC_BYTES")
    try:
        return _encode(writer, ztoc)
    except (struct.error, TypeError, OverflowError) as error:
        raise InvalidZtoc(f"a number that a zTOC cannot hold: {error}") from error


def _encode(writer: Writer, ztoc: Ztoc) -> bytes:
    version = writer.string(_raw(ztoc.version))
    tool = writer.string(_raw(ztoc.build_tool))
    members = _Members(writer)
    rows = rows_backwards(ztoc.entries)
    for _ in range(0, len(ztoc.entries), BATCH):
        members.write(islice(rows, BATCH))
    metadata = writer.vector(members.marks[::-1])
    toc = writer.table(_TOC, (metadata,))
    checkpoints = writer.blob(ztoc.checkpoints)
    digests = writer.vector([writer.string(_raw(digest)) for digest in ztoc.span_digests])
    number = ALGORITHM_NUMBERS[ztoc.algorithm]
    compression = writer.table(_COMPRESSION, (ztoc.max_span_id, digests, checkpoints, 0 if number == _GZIP else number))
    root = writer.table(_ROOT, (version, tool, toc, ztoc.compressed_size, ztoc.uncompressed_size, compression))
    return writer.finish(root)


class _Members:
    """Writes the members' tables, each with its strings and records behind it."""

    def __init__(self, writer: Writer) -> None:
        self.marks: list[int] = []
        self._writer = writer
        self._layouts: dict[tuple[bool, ...], tuple[Layout, ...]] = {}
        self._shapes: dict[tuple[object, ...], _Shape] = {}
        self._middles: dict[tuple[bytes, bytes, bytes, bytes], tuple[bytes, int, int, int, int]] = {}

    def write(self, rows: Iterator[Row]) -> None:
        """Write ``rows`` in their order, that is, each before the one that came before."""
        writer, middle = self._writer, self._middle
        layouts, vtables, marks = self._layouts, writer.vtables, self.marks
        mark = writer.mark
        pieces: list[bytes] = []
        for name, kind, offset, size, link, mode, uid, gid, uname, gname, time, major, minor, pax in rows:
            time_, name_ = text(time), text(name)
            middle_, to_uname, to_link, to_kind, to_name = middle(gname, uname, link, kind)
            behind = time_ + middle_ + name_
            if pax:
                records = self._records(pax, mark + len(behind))
                pieces += (behind, records)
                to_time = len(records)
            else:
                pieces += (behind, _NO_VECTOR)
                to_time = 4
            mark += len(behind) + to_time
            to_gname = to_time + len(time_)
            key = (offset != 0, size != 0, mode != 0, uid != 0, gid != 0, major != 0, minor != 0)
            found = layouts.get(key)
            if found is None:
                found = layouts[key] = self._layout(key)
            made = found[mark >> 2 & 1]
            n, k, _, _, li, _, _, _, un, gn, ti, _, _, xs = made.places
            at = mark + made.length
            vtable = vtables.get(made.vtable)
            pieces.append(
                made.pack(
                    *made.pick((
                        len(made.vtable) if vtable is None else vtable - at,
                        xs, minor, major, ti + to_time, gn + to_gname, un + to_gname + to_uname, gid, uid, mode,
                        li + to_gname + to_link, size, offset, k + to_gname + to_kind, n + to_gname + to_name,
                    ))
                )
            )  # fmt: skip
            mark = at
            marks.append(at)
            if vtable is None:
                pieces.append(made.vtable)
                mark = vtables[made.vtable] = at + len(made.vtable)
        pieces.reverse()
        writer.put(b"".join(pieces))

    def _records(self, pax: Mapping[bytes, bytes], mark: int) -> bytes:
        """PAX records in ascending order of their keys, written at ``mark``, and before them the vector of them."""
        vtables = self._writer.vtables
        vtable = vtables.get(_RECORD.vtable)
        first = vtable is None
        shape = (first, *pax, *map(len, pax.values()))
        made = self._shapes.get(shape)
        if made is None:
            made = _shape(pax, first=first)
            if len(self._shapes) < MAX_WORDS and len(made.vector) + made.length <= MAX_SHAPE_BYTES:
                self._shapes[shape] = made
        if vtable is None:
            vtable = vtables[_RECORD.vtable] = mark + made.vtable
        to_vtable = vtable - mark
        words: list[bytes | int] = [made.vector]
        for key, back, head, tail in made.records:
            words += (to_vtable - back, head, pax[key], tail)
        return made.pack(*words)  # type: ignore[no-any-return]

    def _layout(self, key: tuple[bool, ...]) -> tuple[Layout, ...]:
        present = [True] * len(_ENTRY)
        for slot, there in zip(_SCALARS, key, strict=True):
            present[slot] = there
        made = layout(_ENTRY, present, 0), layout(_ENTRY, present, 4)
        self._writer.align = max(self._writer.align, made[0].align)
        return made

    def _middle(self, gname: bytes, uname: bytes, link: bytes, kind: bytes) -> tuple[bytes, int, int, int, int]:
        """The strings between a member's time and its name, and how far all but the first, and their end, are off."""
        key = (gname, uname, link, kind)
        found = self._middles.get(key)
        if found is None:
            texts = list(map(text, key))
            _, *offsets, end = accumulate(map(len, texts), initial=0)
            found = (b"".join(texts), offsets[0], offsets[1], offsets[2], end)
            if len(self._middles) < MAX_WORDS:
                self._middles[key] = found
        return found


@dataclass(frozen=True, slots=True)
class _Shape:
    """How the records of a member look that has certain keys, and values of certain lengths: all but the values."""

    pack: Any  # of the vector, then of each record, from the last to the first: offset to the vtable, head, value, tail
    vector: bytes
    records: tuple[tuple[bytes, int, bytes, bytes], ...]  # the key, and from the mark before all records to the table's
    length: int  # bytes, the values and the vector not included
    vtable: int  # bytes from the mark before all records to that of the vtable, where it is among them


def _shape(pax: Mapping[bytes, bytes], *, first: bool) -> _Shape:
    """The shape of ``pax``; ``first`` where the buffer has no records yet: their vtable follows the first of them."""
    back, vtable, marks, form = 0, 0, [], ""
    records: list[tuple[bytes, int, bytes, bytes]] = []
    between = b""
    for key in sorted(pax):
        key_, value_ = text(key), text(pax[key])
        back += len(key_) + len(value_) + _RECORD.length
        marks.append(back)
        # The table without the offset to its vtable, then the value's length.
        head = _RECORD.pack(0, _RECORD.places[1], _RECORD.places[0] + len(value_))[4:] + value_[:4]
        records.append((key, back, head, key_ + between))
        form = f"i{len(head)}s{len(value_) - 4}s{len(key_) + len(between)}s{form}"
        between = b""
        if first and not vtable:
            between = _RECORD.vtable
            vtable = back = back + len(between)
    at = back + 4 * len(marks)
    offsets = (at - 4 * number - mark for number, mark in enumerate(marks))
    vector = struct.pack(f"<I{len(marks)}I", len(marks), *offsets) + between
    length = sum(len(head) + len(tail) for _, _, head, tail in records)
    packer = struct.Struct(f"<{len(vector)}s{form}").pack
    return _Shape(packer, vector, tuple(reversed(records)), length, vtable)


_RECORD: Final = layout(((0, "I"), (1, "I")), (True, True), 0)


def _raw(raw: str) -> bytes:
    # `parse_ztoc` decodes the same way: a text that is not UTF-8 comes back as it was.
    return raw.encode("utf-8", "surrogateescape")
