# SPDX-License-Identifier: Apache-2.0
"""Spans: their geometry, the zTOCs that contradict it, and inflating one of them."""

from __future__ import annotations

import gzip
import struct
import zlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import soci.inflate
import soci.span
from soci.errors import InvalidGzip, InvalidZtoc, Mismatch, SociError
from soci.inflate import check_gzip_header, inflate_span, inflate_tail
from soci.span import Spans
from soci.toc import Ztoc
from soci.zinfo import (
    MAX_SPANS,
    RECORD_BYTES,
    WINDOW_BYTES,
    TarZinfo,
    encode_tar_zinfo,
    parse_tar_zinfo,
    parse_zinfo,
)
from soci.ztoc import parse_ztoc
from support.vectors import content

DIGEST = "sha256:" + "0" * 64
ZEROS = bytes(WINDOW_BYTES)


@pytest.fixture
def inflater(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "zlib":
        monkeypatch.setattr(soci.inflate, "_fast", zlib)


both_inflaters = pytest.mark.parametrize("inflater", ["fast", "zlib"], indirect=True)


def zinfo(*points: tuple[int, int, int], count: int | None = None, span_size: int = 100) -> bytes:
    blob = struct.pack("<iq", len(points) if count is None else count, span_size)
    return blob + b"".join(struct.pack("<qqB", *point) + ZEROS for point in points)


def gzip_ztoc(*points: tuple[int, int, int], compressed: int = 1000, uncompressed: int = 5000, **changes: Any) -> Ztoc:
    digests = (DIGEST,) * len(points)
    ztoc = Ztoc("0.9", "t", compressed, uncompressed, (), "gzip", len(points) - 1, digests, zinfo(*points))
    return replace(ztoc, **changes)


def plain_ztoc(span_size: int, size: int, archive: int) -> Ztoc:
    count = -(-size // span_size)
    blob = encode_tar_zinfo(TarZinfo(span_size, size))
    return Ztoc("0.9", "t", size, archive, (), "uncompressed", count - 1, (DIGEST,) * count, blob)


def test_a_span_that_starts_inside_a_byte_shares_it() -> None:
    """Where a span starts with some bits of a byte, that byte belongs to it and to the span before."""
    spans = Spans.of(gzip_ztoc((10, 0, 0), (300, 2000, 3), (600, 4000, 0)))
    assert [spans.compressed(i) for i in range(3)] == [(10, 300), (299, 600), (600, 1000)]
    assert [spans.uncompressed(i) for i in range(3)] == [(0, 2000), (2000, 4000), (4000, 5000)]


@pytest.mark.parametrize(
    ("offset", "length", "ids"),
    [
        (0, 0, []),
        (0, 1, [0]),
        (1999, 1, [0]),
        (1999, 2, [0, 1]),
        (2000, 2000, [1]),
        (0, 5000, [0, 1, 2]),
        (4999, 9999, [2]),
        (9999, 1, [2]),
        (2**70, 1, [2]),
    ],
)
def test_covering(offset: int, length: int, ids: list[int]) -> None:
    """A range is covered by the spans that hold its bytes; beyond the end, by the last one."""
    assert list(Spans.of(gzip_ztoc((10, 0, 0), (300, 2000, 3), (600, 4000, 0))).covering(offset, length)) == ids


def test_numbers_outside_a_layer() -> None:
    """Spans and ranges that are not there raise `InvalidZtoc`."""
    spans = Spans.of(gzip_ztoc((10, 0, 0)))
    for ask in (
        lambda: spans.compressed(1),
        lambda: spans.uncompressed(-1),
        lambda: spans.digest(1),
        lambda: spans.covering(-1, 1),
        lambda: spans.covering(0, -1),
        lambda: parse_zinfo(zinfo((10, 0, 0))).window(1),
    ):
        with pytest.raises(InvalidZtoc):
            ask()


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(0, 700), st.integers(0, 700))
def test_plain_spans_tile_the_blob(span_size: int, size: int, archive: int) -> None:
    """The spans of a plain tar tile its blob, and its archive part; a span in the padding may be empty."""
    ztoc = plain_ztoc(span_size, size, min(size, archive))
    blob = bytes(range(256)) * 3
    spans = Spans.of(ztoc)
    assert spans.count == -(-size // span_size)
    assert not spans.covering(0, 100) if not size else True
    pieces = []
    for i in range(spans.count):
        start, end = spans.compressed(i)
        assert start == i * span_size == spans.uncompressed(i)[0]
        pieces.append(inflate_span(ztoc, spans, i, blob[start:end]))
        assert len(pieces[-1]) == spans.uncompressed(i)[1] - spans.uncompressed(i)[0]
    if size:
        pieces.append(inflate_tail(ztoc, spans, blob[slice(*spans.compressed(spans.count - 1))]))
    assert b"".join(pieces) == blob[:size]


@pytest.mark.parametrize(
    "ztoc",
    [
        gzip_ztoc((10, 0, 0), max_span_id=1),
        gzip_ztoc((10, 0, 0), span_digests=()),
        gzip_ztoc((10, 0, 0), span_digests=(DIGEST, DIGEST)),
        gzip_ztoc((10, 0, 0), span_digests=("sha256:short",)),
        gzip_ztoc((10, 0, 0), span_digests=("sha256:" + "\udcff" * 64,)),
        gzip_ztoc((10, 0, 0), (300, 2000, 0), max_span_id=0, span_digests=(DIGEST,)),
        gzip_ztoc(),
        gzip_ztoc((10, 0, 0), (10, 100, 0)),
        gzip_ztoc((10, 0, 0), (300, 0, 0)),
        gzip_ztoc((10, 0, 0), (300, 200, 0), (200, 300, 0)),
        gzip_ztoc((10, 0, 0), (300, 200, 0), (400, 100, 0)),
        gzip_ztoc((10, 1, 0)),
        gzip_ztoc((1001, 0, 0)),
        gzip_ztoc((10, 0, 0), (1002, 200, 1)),
        gzip_ztoc((10, 0, 0), uncompressed=2**40),
        gzip_ztoc((10, 0, 0), compressed=2**40),
        gzip_ztoc((10, 0, 0), compressed=-1),
        gzip_ztoc((10, 0, 0), uncompressed=1_100_000),
        gzip_ztoc((2_000_000, 0, 0), compressed=3_000_000),
        gzip_ztoc((10, 0, 0), max_span_id=MAX_SPANS),
        replace(plain_ztoc(100, 1000, 1000), compressed_size=1001),
        replace(plain_ztoc(100, 1000, 1000), algorithm="gzip"),
        replace(gzip_ztoc((10, 0, 0)), algorithm="uncompressed"),
        plain_ztoc(2**31, 2**32, 0),
    ],
)
def test_geometry_that_cannot_be_is_refused(ztoc: Ztoc) -> None:
    """A zTOC whose spans contradict each other, the layer, or what deflate can do is not mounted."""
    with pytest.raises(InvalidZtoc):
        Spans.of(ztoc)


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        bytes(11),
        zinfo(),
        zinfo(count=-1),
        zinfo(count=1)[:-1],
        zinfo(count=MAX_SPANS + 1),
        zinfo(count=2**31 - 1),
        zinfo((10, 0, 8)),
        zinfo((10, -1, 0)),
        zinfo((-1, 0, 0)),
        zinfo((0, 0, 1)),
        zinfo((10, 0, 0), span_size=-1),
        zinfo((10, 0, 0), (20, 5, 0))[:-1],
        zinfo((10, 0, 0), count=3),
        zinfo((10, 0, 0)) + b"x",
    ],
)
def test_broken_checkpoints_are_refused(blob: bytes) -> None:
    """Blobs that hold no checkpoints, or others than they say, are refused."""
    with pytest.raises(InvalidZtoc):
        parse_zinfo(blob)


def test_one_checkpoint_of_version_1() -> None:
    """A version 1 blob for one span is but a header; everything about the span is taken for granted."""
    found = parse_zinfo(zinfo(count=1))
    assert (found.version, list(found.points()), len(zinfo(count=1))) == (1, [(10, 0, 0)], 12)
    found = parse_zinfo(zinfo((300, 2000, 3), count=2))
    assert (found.version, list(found.points())) == (1, [(10, 0, 0), (300, 2000, 3)])


def test_tar_zinfo_bytes() -> None:
    """A plain layer's checkpoints are these 48 bytes, and come back from them; the version's default may be left out."""
    wanted = bytes.fromhex(
        "14000000 000000000000 0a00 1c00 1800 0c00 0400 0a000000 0050000000000000 0000400000000000 00000000 02000000"
    )
    assert encode_tar_zinfo(TarZinfo(4_194_304, 20_480)) == wanted
    assert parse_tar_zinfo(wanted) == TarZinfo(4_194_304, 20_480, 2)
    for size, span_size in ((-1, 1), (1, 0), (2**63, 1)):
        with pytest.raises(InvalidZtoc):
            encode_tar_zinfo(TarZinfo(span_size, size))


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_mutated_checkpoints_raise_nothing_foreign(data: st.DataObject) -> None:
    """However offsets, bits and counts are changed, mounting and inflating end in bytes or a `SociError`."""
    blob, ztoc = content("spans.tar.gz"), parse_ztoc(content("spans.span40000.ztoc"))
    changed = bytearray(ztoc.checkpoints)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(
            st.sampled_from([0, 4, *(12 + RECORD_BYTES * i + d for i in range(3) for d in (0, 1, 8, 9, 16, 900))])
        )
        changed[at] = data.draw(st.integers(0, 255))
    ztoc = replace(ztoc, checkpoints=bytes(changed))
    try:
        spans = Spans.of(ztoc)
        for i in range(spans.count):
            start, end = spans.uncompressed(i)
            assert len(inflate_span(ztoc, spans, i, blob[slice(*spans.compressed(i))])) == end - start
    except SociError:
        return


@both_inflaters
@pytest.mark.usefixtures("inflater")
@settings(deadline=None, max_examples=150)
@given(st.data())
def test_mutated_compressed_bytes_raise_nothing_foreign(data: st.DataObject) -> None:
    """However a span's compressed bytes are changed, inflating ends in the right number of bytes or `InvalidGzip`."""
    blob, ztoc = content("members.tar.gz"), parse_ztoc(content("members.span60000.ztoc"))
    spans = Spans.of(ztoc)
    i = data.draw(st.integers(0, spans.count - 1))
    compressed = bytearray(blob[slice(*spans.compressed(i))])
    for _ in range(data.draw(st.integers(1, 4))):
        compressed[data.draw(st.integers(0, len(compressed) - 1))] = data.draw(st.integers(0, 255))
    start, end = spans.uncompressed(i)
    try:
        assert len(inflate_span(ztoc, spans, i, bytes(compressed))) == end - start
    except InvalidGzip:
        return


@pytest.mark.parametrize("change", [-1, 1])
def test_compressed_bytes_of_another_length(change: int) -> None:
    """A span's compressed bytes must be exactly those of the span."""
    ztoc = gzip_ztoc((10, 0, 0))
    spans, compressed = Spans.of(ztoc), bytes(990 + change)
    with pytest.raises(Mismatch, match="compressed bytes"):
        inflate_span(ztoc, spans, 0, compressed)
    with pytest.raises(Mismatch, match="compressed bytes"):
        inflate_tail(ztoc, spans, compressed)


def raw(data: bytes, *, final: bool = True) -> bytes:
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
    return deflate.compress(data) + (deflate.flush() if final else deflate.flush(zlib.Z_FULL_FLUSH))


def one_span(stream: bytes, size: int) -> bytes:
    """Inflate ``stream``, what follows a gzip header, as the only span of a layer with ``size`` bytes."""
    ztoc = gzip_ztoc((10, 0, 0), compressed=10 + len(stream), uncompressed=size)
    return inflate_span(ztoc, Spans.of(ztoc), 0, stream)


@both_inflaters
@pytest.mark.usefixtures("inflater")
def test_a_span_never_comes_short() -> None:
    """Streams that end too soon raise, and never give fewer bytes; those that go on are cut."""
    data = bytes(range(256)) * 20
    trailer = struct.pack("<II", zlib.crc32(data), len(data))
    assert one_span(raw(data) + trailer, 5120) == data
    assert one_span(raw(data) + trailer, 5119) == data[:5119]
    assert one_span(raw(data) + trailer + gzip.compress(b"more"), 5124) == data + b"more"
    for stream, size in (
        (raw(data) + trailer, 5121),
        (raw(data), 5121),
        (raw(data) + trailer[:7], 5121),
        (raw(data)[:-3], 5120),
        (raw(data, final=False), 5121),
        (raw(data) + trailer + b"junk" * 9, 5121),
        (raw(data) + trailer + gzip.compress(b"more")[:-12], 5124),
        (raw(data) + trailer + zlib.compress(b"more"), 5124),
        (b"\xff" * 100, 5000),
    ):
        with pytest.raises(InvalidGzip):
            one_span(stream, size)
    broken = bytearray(gzip.compress(b"more"))
    broken[-8] ^= 1
    with pytest.raises(InvalidGzip):
        one_span(raw(data) + trailer + bytes(broken) + gzip.compress(b"!"), 5125)


@both_inflaters
@pytest.mark.usefixtures("inflater")
def test_many_members(monkeypatch: pytest.MonkeyPatch) -> None:
    """A span may go through thousands of members, empty ones too, but not through any number of them."""
    empty, small = gzip.compress(b""), gzip.compress(b"ab")
    stream = raw(b"") + bytes(8) + (empty + small) * 3000
    assert one_span(stream, 6000) == b"ab" * 3000
    monkeypatch.setattr(soci.inflate, "MAX_MEMBERS", 100)
    with pytest.raises(InvalidGzip, match="more than 100"):
        one_span(stream, 6000)


@both_inflaters
@pytest.mark.usefixtures("inflater")
def test_a_bomb_gives_no_more_than_the_span() -> None:
    """A span that could inflate to far more gives what the zTOC says, and its tail is limited."""
    ztoc = gzip_ztoc((10, 0, 0), compressed=10 + len(raw(bytes(1 << 25))), uncompressed=100)
    stream = raw(bytes(1 << 25))
    assert inflate_span(ztoc, Spans.of(ztoc), 0, stream) == bytes(100)
    with pytest.raises(InvalidGzip, match="behind the end"):
        inflate_tail(ztoc, Spans.of(ztoc), stream)


def test_headers() -> None:
    """What lies before the first span must be one gzip header, with whatever optional fields."""
    plain = gzip.compress(b"", mtime=0)[:10]
    named = plain[:3] + b"\x08" + plain[4:] + b"name\0"
    commented = plain[:3] + b"\x14" + plain[4:] + b"\x03\x00abc" + b"comment\0"
    for good in (plain, named, commented):
        check_gzip_header(good)
        for bad in (good[:-1], good + b"x", b"", b"\x1f" + good, good + good):
            with pytest.raises(InvalidGzip):
                check_gzip_header(bad)
    with pytest.raises(InvalidGzip):
        check_gzip_header(zlib.compress(b"")[:2])


def test_a_plain_layers_spans_do_not_inflate_a_gzip_layer() -> None:
    """Spans and zTOC of different layers are found out."""
    ztoc = plain_ztoc(100, 100, 100)
    with pytest.raises(InvalidZtoc, match="plain layer"):
        inflate_span(replace(ztoc, algorithm="gzip"), Spans.of(ztoc), 0, bytes(100))
