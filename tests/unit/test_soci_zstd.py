# SPDX-License-Identifier: Apache-2.0
"""zstd layers: frames become spans, spans give the tar back, and nothing hostile costs memory."""

from __future__ import annotations

import random
import resource
import struct
import tracemalloc
from array import array
from dataclasses import replace
from itertools import pairwise

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import soci.inflate
import soci.zstd
from soci.build import Built, ZtocBuilder
from soci.decompress import decompressor
from soci.digest import sha256_digest
from soci.errors import InvalidInput, InvalidZtoc, LimitExceeded, Mismatch, SociError
from soci.index import SOCIABLE_ZTOC_MEDIA_TYPE, ZTOC_MEDIA_TYPE, SociIndex, encode_index, parse_index, ztoc_entry
from soci.inflate import inflate_span, inflate_stream, inflate_tail
from soci.oci import OCI_MANIFEST, Descriptor
from soci.span import Spans
from soci.zstd import ZstdPoints, ZstdStream, encode_zstd_points, parse_zstd_points
from soci.ztoc import encode_ztoc, parse_ztoc
from support.tars import END, header, padded


def frame(data: bytes, level: int = 1, *, checksum: bool = False, size: bool = True) -> bytes:
    """One zstd frame."""
    if size:
        return zstandard.ZstdCompressor(level=level, write_checksum=checksum).compress(data)
    stream = zstandard.ZstdCompressor(level=level, write_checksum=checksum, write_content_size=False).compressobj()
    return stream.compress(data) + stream.flush()


def skippable(payload: bytes, number: int = 0) -> bytes:
    """A skippable frame."""
    return struct.pack("<II", 0x184D2A50 + number, len(payload)) + payload


def tar_of(rng: random.Random, sizes: list[int]) -> bytes:
    """A tar of files of these sizes, some of which compress and some do not."""
    files = (
        header(b"f%d" % i, size=size)
        + padded(rng.choice([rng.randbytes(size), bytes(size), b"lorem " * size][:3])[:size])
        for i, size in enumerate(sizes)
    )
    return b"".join(files) + END + bytes(rng.choice([0, 8192]))


def build(blob: bytes, span_size: int = 1 << 22, seed: int = 0) -> Built:
    """Build with pieces of random sizes."""
    builder, sizes, at = ZtocBuilder("zstd", span_size), random.Random(seed), 0
    while at < len(blob):
        size = sizes.choice([1, 3, 512, 1 << 17])
        builder.feed(blob[at : at + size])
        at += size
    return builder.finish()


def chunks_of(data: bytes, rng: random.Random) -> list[bytes]:
    """``data`` cut at random places."""
    cuts = sorted([0, len(data), *(rng.randrange(len(data) + 1) for _ in range(4))])
    return [data[a:b] for a, b in pairwise(cuts)]


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 2**32), st.sampled_from([0, 1, 5_000, 1 << 22]))
def test_any_frames_build_and_inflate(seed: int, span_size: int) -> None:
    """Frames of every kind, skippable ones anywhere: spans begin at frames, far enough apart, and give the tar back."""
    rng = random.Random(seed)
    tar = tar_of(rng, rng.choices([0, 1, 700, 20_000, 300_000], k=4))
    blob, starts, at = b"", {}, 0
    for end in sorted([rng.randrange(len(tar)) for _ in range(rng.randrange(6))] + [len(tar)]):
        for _ in range(rng.choice([0, 0, 1, 2])):
            blob += skippable(rng.randbytes(rng.choice([0, 1, 5000])), rng.randrange(16))
        starts[len(blob)] = at
        blob += frame(tar[at:end], rng.choice([1, 3, 19]), checksum=rng.random() < 0.5, size=rng.random() < 0.5)
        at = end
    blob += skippable(b"manifest") * rng.choice([0, 1])
    built = build(blob, span_size, seed)
    assert built == build(blob, span_size, seed + 1)
    assert (built.layer, built.layer_size, built.diff_id) == (sha256_digest(blob), len(blob), sha256_digest(tar))
    ztoc = parse_ztoc(built.ztoc_bytes)
    assert ztoc == built.ztoc
    assert ztoc.algorithm == "zstd"

    spans, pieces = Spans.of(ztoc), []
    expected, last = [0], 0
    for start, out in list(starts.items())[1:]:
        if out - last >= max(1, span_size):
            expected.append(start)
            last = out
    assert list(spans.starts) == expected
    for i in range(spans.count):
        compressed = blob[slice(*spans.compressed(i))]
        assert spans.digest(i) == sha256_digest(compressed)
        content = inflate_span(ztoc, spans, i, compressed)
        assert b"".join(inflate_stream(ztoc, spans, i, chunks_of(compressed, rng))) == content
        pieces.append(content)
    tail = inflate_tail(ztoc, spans, compressed)
    assert b"".join([*pieces, tail]) == tar
    assert b"".join(inflate_stream(ztoc, spans, i, chunks_of(compressed, rng), tail=True)) == content + tail


def test_the_span_size_is_the_least_distance() -> None:
    """A frame opens a span when it begins just the span size behind the span before, and not a byte sooner."""
    tar = header(size=9000) + padded(bytes(9000)) + END
    blob = b"".join(frame(tar[at : at + 1024]) for at in range(0, len(tar), 1024))
    assert list(Spans.of(build(blob, 2048).ztoc).outs) == list(range(0, len(tar), 2048))
    assert list(Spans.of(build(blob, 2049).ztoc).outs) == list(range(0, len(tar), 3072))


TAR = tar_of(random.Random(1), [100_000, 5])
BLOB = frame(TAR[:50_000], checksum=True) + skippable(b"between") + frame(TAR[50_000:])


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_mutated_layers_raise_nothing_foreign(data: st.DataObject) -> None:
    """However a layer is changed or cut, building ends in a zTOC or a `SociError`."""
    blob = bytearray(BLOB)
    for _ in range(data.draw(st.integers(0, 4))):
        blob[data.draw(st.integers(0, 30) | st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        build(bytes(blob[: data.draw(st.integers(0, len(blob)))]), 1000)
    except SociError:
        return


@pytest.mark.parametrize("cut", [0, 1, 4, 5, 7, 100, len(BLOB) - 1])
def test_a_cut_layer_is_refused(cut: int) -> None:
    """A layer that is not all there gets no zTOC."""
    with pytest.raises(SociError):
        build(BLOB[:cut])


@pytest.mark.parametrize(
    ("blob", "reason"),
    [
        (BLOB + b"\0", "cut short"),
        (BLOB + b"\0\0\0\0", "not a zstd frame"),
        (skippable(b"only"), "cut short"),
        (b"\x1f\x8b\x08\x00", "not a zstd frame"),
        (struct.pack("<IB", 0xFD2FB528, 0x08), "reserved bit"),
        (struct.pack("<IBBB", 0xFD2FB528, 0x01, 0x50, 7), "dictionary"),
        (struct.pack("<IBB", 0xFD2FB528, 0x00, 0x50) + b"\x07\0\0", "unknown type"),
        (BLOB[:20] + b"\xff" * 30 + BLOB[50:], "broken"),
    ],
)
def test_what_is_no_zstd_is_refused(blob: bytes, reason: str) -> None:
    """Garbage behind a frame, other formats and frames that nobody can read are refused with a reason."""
    with pytest.raises(InvalidInput, match=reason):
        build(blob)


@pytest.mark.parametrize(
    "head", [struct.pack("<IBB", 0xFD2FB528, 0, 18 << 3), struct.pack("<IBQ", 0xFD2FB528, 0xE0, (1 << 27) + 1)]
)
def test_a_window_that_is_too_large_is_refused(head: bytes) -> None:
    """A frame that wants more than 128 MiB of window is refused before any memory is taken."""
    with pytest.raises(LimitExceeded, match="MAX_WINDOW_BYTES"):
        build(head)


def bomb(blocks: int) -> bytes:
    """A frame of blocks of 4 bytes that each say 128 KiB of zeros."""
    one = struct.pack("<I", (1 << 17) << 3 | 1 << 1)[:3] + b"\0"
    last = struct.pack("<I", (1 << 17) << 3 | 1 << 1 | 1)[:3] + b"\0"
    return struct.pack("<IBB", 0xFD2FB528, 0, 0x50 + 0x18) + one * (blocks - 1) + last


def test_a_bomb_comes_out_in_small_pieces() -> None:
    """The densest stream there is comes out a megabyte at a time, however much of it is fed at once."""
    blob = bomb(4096)
    stream, total = ZstdStream(), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        for piece in stream.feed(blob):
            assert len(piece) <= 1 << 20
            total += len(piece)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    stream.finish()
    assert total == 4096 << 17
    assert peak < 8 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 19, "KiB more than other tests took"


def test_a_bomb_is_indexed_in_little_memory() -> None:
    """Hashing never falls so far behind that what it still has to hash piles up."""
    builder = ZtocBuilder("zstd")
    tracemalloc.start()
    try:
        builder.feed(bomb(4096))
        built = builder.finish()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert built.diff_id == sha256_digest(bytes(4096 << 17))
    assert peak < 16 << 20


def test_spans_that_lie_are_refused() -> None:
    """Too few or too many bytes, compressed or not, never pass for a span."""
    ztoc = build(BLOB, 1000).ztoc
    spans = Spans.of(ztoc)
    assert spans.count == 2
    one, two = (BLOB[slice(*spans.compressed(i))] for i in (0, 1))
    with pytest.raises(Mismatch):
        inflate_span(ztoc, spans, 0, one + b"\0")
    for chunks in ((one, b"\0"), (one[:-1],), ()):
        with pytest.raises(Mismatch):
            list(inflate_stream(ztoc, spans, 0, chunks))
    lying = replace(
        ztoc, checkpoints=encode_zstd_points(replace(parse_zstd_points(ztoc.checkpoints), outs=_q(0, 60_000)))
    )
    with pytest.raises(InvalidInput, match="lacks 10000"):
        inflate_span(lying, Spans.of(lying), 0, one)
    short = replace(
        ztoc, checkpoints=encode_zstd_points(replace(parse_zstd_points(ztoc.checkpoints), outs=_q(0, 40_000)))
    )
    with pytest.raises(InvalidInput, match="more than 40000 bytes"):
        inflate_span(short, Spans.of(short), 0, one)
    with pytest.raises(InvalidInput):
        inflate_span(ztoc, spans, 1, two[:8] + b"\xff" * (len(two) - 8))


def test_a_span_too_large_for_memory_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit of one span in memory only `inflate_stream` gives its content."""
    blob = frame(TAR)
    ztoc = build(blob).ztoc
    spans = Spans.of(ztoc)
    assert spans.count == 1
    monkeypatch.setattr(soci.inflate, "MAX_SPAN_BYTES", 1000)
    with pytest.raises(LimitExceeded, match="inflate_stream"):
        inflate_span(ztoc, spans, 0, blob)
    start, end = spans.uncompressed(0)
    assert b"".join(inflate_stream(ztoc, spans, 0, [blob])) == TAR[start:end]


def test_a_layer_inflated_straight() -> None:
    """The whole layer comes out of `decompressor` frame by frame, and one that is cut short is noticed."""
    decoder = decompressor("zstd")
    assert b"".join(piece for at in range(0, len(BLOB), 7) for piece in decoder.feed(BLOB[at : at + 7])) == TAR
    decoder.finish()
    decoder = decompressor("zstd")
    list(decoder.feed(BLOB[:-1]))
    with pytest.raises(InvalidInput, match="cut short"):
        decoder.finish()


def test_the_index_keeps_zstd_apart() -> None:
    """The entry of a zstd layer has our own media type, and is found again beside a gzip layer's."""
    image = Descriptor(OCI_MANIFEST, sha256_digest(b"image"), 5)
    types = {"application/vnd.oci.image.layer.v1.tar+zstd": SOCIABLE_ZTOC_MEDIA_TYPE,
             "application/vnd.oci.image.layer.v1.tar+gzip": ZTOC_MEDIA_TYPE}  # fmt: skip
    layers = [Descriptor(media_type, sha256_digest(media_type.encode()), 9) for media_type in types]
    entries = tuple(ztoc_entry(layer, sha256_digest(b"ztoc"), 4, 1 << 22) for layer in layers)
    assert [entry.ztoc.media_type for entry in entries] == list(types.values())
    assert parse_index(encode_index(SociIndex.v1(entries, image))).layers == entries


def test_padding_without_end_is_no_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows the end of the archive is bounded."""
    monkeypatch.setattr(soci.inflate, "MAX_TAIL_BYTES", 100)
    blob = frame(END + bytes(1000))
    ztoc = build(blob).ztoc
    with pytest.raises(InvalidInput, match="behind the end"):
        inflate_tail(ztoc, Spans.of(ztoc), blob)
    with pytest.raises(InvalidInput, match="behind the end"):
        list(inflate_stream(ztoc, Spans.of(ztoc), 0, [blob], tail=True))


def _q(*numbers: int) -> array[int]:
    return array("q", numbers)


POINTS = encode_zstd_points(ZstdPoints(5, _q(0, 9), _q(0, 7)))


def test_the_blob_of_checkpoints() -> None:
    """The blob is what its document says, byte by byte, and reads back."""
    assert b"SZST" + struct.pack("<IQI4Q", 1, 5, 2, 0, 0, 9, 7) == POINTS
    assert parse_zstd_points(POINTS) == ZstdPoints(5, _q(0, 9), _q(0, 7))


@pytest.mark.parametrize(
    "blob",
    [
        b"", POINTS[:-1], POINTS + b"\0", b"x" + POINTS[1:], POINTS[:4] + b"\2" + POINTS[5:],
        POINTS[:16] + b"\0\0\0\0", POINTS[:16] + b"\xff\xff\xff\xff" + POINTS[20:], POINTS[:20] + b"\1" + POINTS[21:],
        POINTS[:-1] + b"\xff", POINTS[:15] + b"\xff" + POINTS[16:],
    ],
)  # fmt: skip
def test_broken_checkpoints_are_refused(blob: bytes) -> None:
    """Checkpoints that are cut, of another version or cannot be are refused with `InvalidZtoc`."""
    with pytest.raises(InvalidZtoc):
        parse_zstd_points(blob)


def test_geometry_that_cannot_be() -> None:
    """Checkpoints that do not ascend, leave the layer or promise more than zstd can hold are refused."""
    ztoc = build(BLOB, 1000).ztoc
    for ins, outs in [((0, 0), (0, 9)), ((0, 10**9), (0, 9)), ((0, 9), (0, 0)), ((0, 9), (0, 10**9)), ((0,), (0,))]:
        lying = replace(ztoc, checkpoints=encode_zstd_points(ZstdPoints(1, _q(*ins), _q(*outs))))
        with pytest.raises(InvalidZtoc):
            Spans.of(parse_ztoc(encode_ztoc(lying)))
    huge = replace(ztoc, uncompressed_size=10**12)
    with pytest.raises(InvalidZtoc, match="cannot inflate"):
        Spans.of(huge)
