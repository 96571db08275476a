# SPDX-License-Identifier: Apache-2.0
"""Reading zTOCs from strangers: broken, lying and huge ones."""

from __future__ import annotations

import struct
import tracemalloc
from dataclasses import replace
from typing import Any

import flatbuffers
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import soci.flat
import soci.ztoc
from soci.errors import InvalidZtoc, LimitExceeded, SociError
from soci.span import Spans
from soci.toc import TocEntry, Ztoc
from soci.ztoc import encode_ztoc, mtime_ns, parse_ztoc, xattrs
from support.vectors import content

EMPTY = Ztoc("0.9", "tool", 100, 1024, (), "uncompressed", 0, ("sha256:" + "0" * 64,), b"x")
SMALL = [
    content(name) for name in ("no-zero-blocks.span4194304.ztoc", "plain.span4096.ztoc", "pax-types.span4194304.ztoc")
]

texts = st.binary(max_size=12)
numbers = st.integers(-(2**63), 2**63 - 1)


@st.composite
def ztocs(draw: st.DrawFn) -> Ztoc:
    """Values that a zTOC can hold, with members in order."""
    entries, offset = [], 0
    for _ in range(draw(st.integers(0, 6))):
        offset += 512 * draw(st.integers(0, 3))
        size = draw(st.integers(0, 1500))
        entries.append(
            TocEntry(
                draw(texts), draw(st.sampled_from(["reg", "dir", "symlink", "char"])), offset, size, draw(texts),
                draw(numbers), draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 2**32 - 1)), draw(texts), draw(texts),
                draw(texts).decode("utf-8", "surrogateescape"), draw(numbers), draw(numbers),
                draw(st.dictionaries(texts, texts, max_size=3)),
            )
        )  # fmt: skip
        offset += -(-size // 512) * 512
    return Ztoc(
        draw(texts).decode("utf-8", "surrogateescape"), "tool", draw(st.integers(0, 2**62)), offset, tuple(entries),
        draw(st.sampled_from(["gzip", "uncompressed"])), draw(st.integers(-1, 1000)),
        tuple(draw(st.lists(st.text(max_size=8), max_size=3))), draw(st.binary(max_size=40)),
    )  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(ztocs())
def test_round_trip(ztoc: Ztoc) -> None:
    """Every value that a zTOC can hold comes back as it was, bytes that are no UTF-8 included."""
    data = encode_ztoc(ztoc)
    assert parse_ztoc(data) == ztoc
    assert parse_ztoc(memoryview(data)) == ztoc
    assert encode_ztoc(parse_ztoc(data)) == data


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_mutations_raise_nothing_foreign(data: st.DataObject) -> None:
    """However a zTOC is changed, cut or spliced, reading and mounting it ends in a value or a `SociError`."""
    ztoc = bytearray(data.draw(st.sampled_from(SMALL)))
    interesting = st.sampled_from(
        [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x04\0\0\0", b"\0\0\0\x80", b"\x01"]
    )
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(
            st.integers(0, len(ztoc) - 1) if data.draw(st.booleans()) else st.integers(0, min(len(ztoc), 400) - 1)
        )
        new = data.draw(interesting | st.binary(min_size=1, max_size=8))
        ztoc[at : at + len(new)] = new
    cut = bytes(ztoc[: data.draw(st.integers(0, len(ztoc)))]) if data.draw(st.integers(0, 4)) == 0 else bytes(ztoc)
    try:
        Spans.of(parse_ztoc(cut))
    except SociError:
        return


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_foreign(data: bytes) -> None:
    """Bytes that are no zTOC at all are refused with `InvalidZtoc`."""
    try:
        parse_ztoc(data)
    except InvalidZtoc:
        return


def test_every_cut_is_refused() -> None:
    """A zTOC that lost its tail is refused at every length; the buffer's end holds its oldest strings."""
    data = content("no-zero-blocks.span4194304.ztoc")
    for length in range(len(data) - 8):
        with pytest.raises(InvalidZtoc):
            parse_ztoc(data[:length])


def entry(**changes: Any) -> TocEntry:
    return replace(TocEntry(b"a", "reg", 512, 100), **changes)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"entries": (entry(offset=-512),)}, "overlaps"),
        ({"entries": (entry(size=-1),)}, "overlaps"),
        ({"entries": (entry(size=513),)}, "overlaps"),
        ({"entries": (entry(), entry(offset=1000))}, "overlaps"),
        ({"entries": (entry(), entry(offset=1023, size=0))}, "overlaps"),
        ({"entries": (entry(type="symlink", offset=1025),)}, "overlaps"),
        ({"entries": (entry(type="odd"),)}, "unknown type"),
        ({"entries": (entry(name=b"n" * (1 << 20) + b"n"),)}, "name of more"),
        ({"entries": (entry(linkname=b"n" * (1 << 20) + b"n"),)}, "name of more"),
        ({"entries": (entry(pax={b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0"}),)}, "sparse"),
        ({"compressed_size": -1}, "layer of -1"),
        ({"uncompressed_size": -1}, "tar of -1"),
        ({"max_span_id": -2}, "last span"),
        ({"max_span_id": 131_000}, "last span"),
        ({"span_digests": ("d" * 257,)}, "span digest"),
        ({"span_digests": ("",) * 131_001}, "span digests"),
    ],
)
def test_contents_that_cannot_be(change: dict[str, Any], reason: str) -> None:
    """A well-formed buffer with impossible contents is refused, and the error says what is wrong."""
    with pytest.raises(InvalidZtoc, match=reason):
        parse_ztoc(encode_ztoc(replace(EMPTY, **change)))


def test_entries_are_sorted() -> None:
    """Entries come back in the order of their data, whatever the order in the file."""
    entries = (entry(name=b"b", offset=1024, size=0), entry(name=b"a"))
    assert [e.name for e in parse_ztoc(encode_ztoc(replace(EMPTY, entries=entries))).entries] == [b"a", b"b"]


def test_a_member_without_data_may_claim_a_size() -> None:
    """A hard link that records its target's size is no reason to refuse a layer, where nothing overlaps."""
    ztoc = replace(EMPTY, entries=(entry(type="hardlink", offset=1024, size=5000),))
    assert parse_ztoc(encode_ztoc(ztoc)) == ztoc


def test_versions() -> None:
    """Other versions pass, as elsewhere, but not under the strict flag."""
    data = encode_ztoc(replace(EMPTY, version="1.0"))
    assert parse_ztoc(data).version == "1.0"
    with pytest.raises(InvalidZtoc, match="version"):
        parse_ztoc(data, strict_version=True)


def test_size_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A zTOC beyond a limit is neither read nor written."""
    data = encode_ztoc(replace(EMPTY, entries=(entry(),)))
    monkeypatch.setattr(soci.ztoc, "MAX_ZTOC_BYTES", 100)
    with pytest.raises(InvalidZtoc, match="MAX_ZTOC_BYTES"):
        parse_ztoc(data)
    monkeypatch.undo()
    monkeypatch.setattr(soci.ztoc, "MAX_ENTRIES", 0)
    with pytest.raises(InvalidZtoc, match="members"):
        parse_ztoc(data)
    monkeypatch.setattr("soci.ztoc_encode.MAX_ENTRIES", 0)
    with pytest.raises(LimitExceeded, match="MAX_ENTRIES"):
        encode_ztoc(replace(EMPTY, entries=(entry(),)))
    monkeypatch.undo()
    monkeypatch.setattr("soci.ztoc_encode.MAX_ZTOC_BYTES", 100)
    with pytest.raises(LimitExceeded, match="MAX_ZTOC_BYTES"):
        encode_ztoc(EMPTY)


@pytest.mark.parametrize("change", [{"max_span_id": 2**31}, {"compressed_size": 2**63}, {"entries": (entry(uid=-1),)}])
def test_numbers_too_large_to_write(change: dict[str, Any]) -> None:
    """A number that its field cannot hold is refused when writing."""
    with pytest.raises(InvalidZtoc, match="cannot hold"):
        encode_ztoc(replace(EMPTY, **change))


def forged(entries: int, *, table: bool = True, records: int = 0, text: int = 0) -> bytes:
    """A zTOC whose ``entries`` are all the same table, with ``records`` times the same PAX record in it."""
    b = flatbuffers.Builder(0)
    word = b.CreateString(b"w" * text)
    kind, name = b.CreateString("reg"), b.CreateString("n")
    b.StartObject(2)
    b.PrependUOffsetTRelativeSlot(0, name, 0)
    b.PrependUOffsetTRelativeSlot(1, word, 0)
    record = b.EndObject()
    b.StartVector(4, records, 4)
    for _ in range(records):
        b.PrependUOffsetTRelative(record)
    pax = b.EndVector()
    b.StartObject(14)
    for slot, target in ((0, word), (1, kind), (13, pax)):
        b.PrependUOffsetTRelativeSlot(slot, target, 0)
    member = b.EndObject()
    b.StartVector(4, entries, 4)
    for _ in range(entries):
        b.PrependUOffsetTRelative(member)
    metadata = b.EndVector()
    b.StartObject(1)
    b.PrependUOffsetTRelativeSlot(0, metadata, 0)
    toc = b.EndObject()
    b.StartObject(4)
    compression = b.EndObject()
    b.StartObject(6)
    if table:
        b.PrependUOffsetTRelativeSlot(4, toc, 0)
    b.PrependUOffsetTRelativeSlot(5, compression, 0)
    b.Finish(b.EndObject())
    return bytes(b.Output())


def test_a_missing_table_of_contents_is_refused() -> None:
    """The table of contents must be there; a member's absent fields are empty or zero."""
    assert parse_ztoc(forged(1)).entries == (TocEntry(b"", "reg", 0, 0),)
    with pytest.raises(InvalidZtoc, match="no table of contents"):
        parse_ztoc(forged(1, table=False))


@pytest.mark.parametrize(
    "data",
    [
        forged(100_000),
        forged(5_000, text=100_000),
        forged(1_000, records=200),
        forged(1, records=60_000),
        forged(1, records=1_000, text=100_000),
    ],
    ids=["members", "names", "records", "one-vector", "values"],
)
def test_aliases_do_not_multiply_memory(data: bytes) -> None:
    """Offsets that point at the same bytes over and over are refused before they cost memory."""
    tracemalloc.start()
    try:
        with pytest.raises(InvalidZtoc):
            parse_ztoc(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 * len(data) + 1_000_000


def test_counts_are_checked_up_front() -> None:
    """A vector that claims a hundred million elements in a few bytes is refused at once."""
    data = bytearray(forged(50))
    honest = struct.pack("<I", 50)
    at = data.index(honest)
    assert data.count(honest) == 1
    data[at : at + 4] = struct.pack("<I", 100_000_000)
    with pytest.raises(InvalidZtoc, match="100000000 members do not fit"):
        parse_ztoc(bytes(data))


def test_fields_that_overlap_are_refused() -> None:
    """A vtable that lays a field over another, over its own start or beyond its table is refused."""
    data = bytearray(encode_ztoc(EMPTY))
    (root,) = struct.unpack_from("<I", data)
    vtable = root - struct.unpack_from("<i", data, root)[0]
    (size,) = struct.unpack_from("<H", data, vtable + 2)
    for value in (3, struct.unpack_from("<H", data, vtable + 4)[0] + 3, size - 3):
        changed = data.copy()
        struct.pack_into("<H", changed, vtable + 6, value)
        with pytest.raises(InvalidZtoc, match=r"overlap|outside"):
            parse_ztoc(bytes(changed))
    struct.pack_into("<H", data, vtable + 2, size - 4)
    with pytest.raises(InvalidZtoc, match="outside"):
        parse_ztoc(bytes(data))


def test_vtables_are_not_hoarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one vtable at a time the result is the same."""
    data = content("pax-types.span4194304.ztoc")
    before = parse_ztoc(data)
    monkeypatch.setattr(soci.flat, "MAX_LAYOUTS", 1)
    assert parse_ztoc(data) == before


def test_times_and_xattrs_of_an_entry() -> None:
    """An entry's time is in nanoseconds, and its extended attributes are the records with the right prefix."""
    found = entry(mod_time="1970-01-01T00:00:01.5Z", pax={b"SCHILY.xattr.user.a": b"", b"path": b"p"})
    assert mtime_ns(found) == 1_500_000_000
    assert xattrs(found) == {b"user.a": b""}
