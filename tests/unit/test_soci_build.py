# SPDX-License-Identifier: Apache-2.0
"""Building zTOCs: any gzip stream, in any pieces, gives checkpoints that inflate to the same bytes."""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import gzip
import os
import random
import threading
import time
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import soci.build
import soci.checkpoint
from soci.beside import Beside
from soci.build import Built, ZtocBuilder
from soci.checkpoint import GzipCheckpoints
from soci.digest import sha256_digest
from soci.errors import InvalidGzip, InvalidInput, InvalidTar, InvalidZtoc, LimitExceeded, SociError, Unsupported
from soci.inflate import inflate_span, inflate_tail
from soci.span import Spans
from soci.toc import Algorithm
from soci.zinfo import WINDOW_BYTES, parse_zinfo
from soci.ztoc import parse_ztoc
from support.tars import END, header, padded
from support.vectors import content

FLUSHES = [zlib.Z_NO_FLUSH, zlib.Z_PARTIAL_FLUSH, zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH, zlib.Z_BLOCK]


def build(blob: bytes, algorithm: Algorithm = "gzip", span_size: int = 1 << 16, seed: int = 0) -> Built:
    """Build with pieces of random sizes."""
    builder, sizes, at = ZtocBuilder(algorithm, span_size), random.Random(seed), 0
    while at < len(blob):
        size = sizes.choice([1, 7, 512, 4096, 1 << 17])
        builder.feed(memoryview(blob)[at : at + size])
        at += size
    return builder.finish()


def random_tar(rng: random.Random) -> bytes:
    """A tar of files that compress well, badly and not at all."""
    out = b""
    for number in range(rng.randrange(1, 6)):
        size = rng.choice([0, 1, 700, 40_000, 150_000])
        data = rng.choice(
            [rng.randbytes(size), bytes(size), b"".join(rng.choices([b"lorem ", b"ipsum\n", b"x"], k=size))[:size]]
        )
        out += header(b"file%d" % number, size=size) + padded(data)
    return out + END + bytes(rng.choice([0, 8192]))


def random_gzip(data: bytes, rng: random.Random) -> bytes:
    """``data`` as one or more gzip members of random settings, flushed at random places."""
    out, at = b"", 0
    for number in range(members := rng.randrange(1, 4)):
        end = len(data) if number == members - 1 else rng.randrange(at, len(data) + 1)
        deflate = zlib.compressobj(
            rng.randrange(10), zlib.DEFLATED, 16 + rng.randrange(9, 16), rng.randrange(1, 10), rng.randrange(5)
        )
        while at < end:
            step = min(end - at, rng.choice([1, 100, 30_000, 200_000]))
            out += deflate.compress(data[at : at + step]) + deflate.flush(rng.choice(FLUSHES))
            at += step
        out += deflate.flush()
    return out


def plain_checkpoints(blob: bytes, span_size: int) -> list[tuple[int, int, int, bytes]]:
    """The rule for checkpoints, as straight as it can be written: a ring of 32 KiB, 16 KiB of input at a time."""
    z, stream = soci.checkpoint._libz(), soci.checkpoint._Stream()
    ring = ctypes.create_string_buffer(WINDOW_BYTES)
    assert z.inflateInit2_(ctypes.byref(stream), 47, z.zlibVersion(), ctypes.sizeof(stream)) == 0
    found, total_in, total_out, last = [], 0, 0, 0
    for start in range(0, len(blob), 16_384):
        piece = ctypes.create_string_buffer(blob[start : start + 16_384], len(blob[start : start + 16_384]))
        stream.next_in, stream.avail_in = ctypes.addressof(piece), len(piece)
        while stream.avail_in:
            if not stream.avail_out:
                stream.next_out, stream.avail_out = ctypes.addressof(ring), WINDOW_BYTES
            before = stream.avail_in, stream.avail_out
            code = z.inflate(ctypes.byref(stream), 5)
            assert code in (0, 1, -5)
            total_in += before[0] - stream.avail_in
            total_out += before[1] - stream.avail_out
            if code == 1:
                z.inflateReset2(ctypes.byref(stream), 47)
                continue
            state = stream.data_type
            if state & 128 and not state & 64 and (total_out == 0 or total_out - last > span_size):
                at = WINDOW_BYTES - stream.avail_out
                found.append((total_in, total_out, state & 7, ring.raw[at:] + ring.raw[:at]))
                last = total_out
    z.inflateEnd(ctypes.byref(stream))
    return found


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from([0, 1, 1000, 40_000, 1 << 22]))
def test_any_gzip_stream_builds_and_inflates(seed: int, span_size: int) -> None:
    """Levels, windows, flushes and members of every kind: checkpoints by the rule, and every span inflates exactly."""
    rng = random.Random(seed)
    tar = random_tar(rng)
    blob = random_gzip(tar, rng)
    built = build(blob, span_size=span_size, seed=seed)
    assert built == build(blob, span_size=span_size, seed=seed + 1)
    assert (built.layer, built.layer_size, built.diff_id) == (sha256_digest(blob), len(blob), sha256_digest(tar))
    ztoc = parse_ztoc(built.ztoc_bytes)
    assert ztoc == built.ztoc

    found = parse_zinfo(ztoc.checkpoints)
    assert [(*point, bytes(found.window(i))) for i, point in enumerate(found.points())] == plain_checkpoints(
        blob, span_size
    )

    try:
        spans = Spans.of(ztoc)
    except InvalidZtoc:
        # Only this may keep a well-formed layer from being mounted: an empty block or member at the very start.
        assert [out for _, out, _ in found.points()].count(0) > 1
        return
    pieces = []
    for i in range(spans.count):
        compressed = blob[slice(*spans.compressed(i))]
        assert spans.digest(i) == sha256_digest(compressed)
        pieces.append(inflate_span(ztoc, spans, i, compressed))
    pieces.append(inflate_tail(ztoc, spans, blob[slice(*spans.compressed(spans.count - 1))]))
    assert b"".join(pieces) == tar


class Late(Beside):
    """Work beside that is not done until somebody waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self.done = 0

    def work(self, job: Callable[[Any], object], data: bytes | memoryview) -> None:
        self.do(job, data)

    def do(self, job: Callable[..., Any], *words: Any) -> None:
        self.jobs.append((job, words))

    def mark(self) -> Any:
        return len(self.jobs)

    def wait(self, mark: Any) -> None:
        while self.done < (mark or 0):
            job, words = self.jobs[self.done]
            job(*words)
            self.done += 1

    def close(self) -> None:
        self.wait(len(self.jobs))


@pytest.mark.parametrize("algorithm", ["gzip", "uncompressed", "zstd"])
def test_the_work_beside_may_lag_behind(algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    """However late the other thread gets to its work, memory that it still needs is not written over."""
    rng = random.Random(3)
    data = b"".join(b"%d lines of text\n" % rng.randrange(1000) for _ in range(600_000))
    tar = header(size=len(data)) + padded(data) + END
    packed: dict[str, Callable[[bytes], bytes]] = {
        "gzip": gzip.compress,
        "uncompressed": bytes,
        "zstd": zstandard.ZstdCompressor().compress,
    }
    blob = packed[algorithm](tar)
    builder = ZtocBuilder(algorithm)
    builder.feed(blob)
    expected = builder.finish()
    assert expected.diff_id == sha256_digest(tar)
    monkeypatch.setattr(soci.build, "Beside", Late)
    builder = ZtocBuilder(algorithm)
    builder.feed(blob)
    assert builder.finish() == expected


class Held(Beside):
    """Work beside that is not begun until somebody waits for it, or ends it."""

    def __init__(self) -> None:
        super().__init__()
        self._beside = True
        self.begin = threading.Event()

    def do(self, job: Callable[..., Any], *words: Any) -> None:
        def held() -> None:
            self.begin.wait()
            job(*words)

        super().do(held)

    def wait(self, mark: Any) -> None:
        if mark is not None:
            self.begin.set()
        super().wait(mark)

    def close(self) -> None:
        self.begin.set()
        super().close()


@pytest.mark.parametrize("beside", [Beside, Held])
def test_the_first_error_of_the_layer_is_raised(beside: type[Beside], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the tar is broken and behind that the gzip too, it is the tar's error, whichever thread is ahead."""
    monkeypatch.setattr(soci.build, "Beside", beside)
    rest = bytes(1_500_000) + os.urandom(600_000)  # more than is put out at a time
    broken = gzip.compress(header(size=3, checksum_off_by=1) + rest, 1)
    for blob in (broken[:300_000] + bytes(100_000), broken[:300_000]):
        builder = ZtocBuilder("gzip")
        with pytest.raises(InvalidTar):  # noqa: PT012  (either may raise it)
            builder.feed(blob)
            builder.finish()
    builder = ZtocBuilder("gzip")
    with pytest.raises(InvalidGzip):
        builder.feed(gzip.compress(header(size=len(rest)) + rest, 1)[:300_000] + bytes(100_000))


@pytest.mark.parametrize("beside", [Beside, Held])
def test_a_builder_that_failed_is_gone_at_once(beside: type[Beside], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error, once dropped, keeps nothing of it: neither buffers nor members wait for a collection of garbage."""
    monkeypatch.setattr(soci.build, "Beside", beside)
    rest = bytes(1_500_000) + os.urandom(600_000)
    tar_first = gzip.compress(header(size=3, checksum_off_by=1) + rest, 1)
    gc.collect()
    gc.disable()
    try:
        for blob in (tar_first, tar_first[:300_000] + bytes(100_000), gzip.compress(rest[:1000]), b"no gzip"):
            builder = ZtocBuilder("gzip")
            alive = weakref.ref(builder), weakref.ref(builder._way), weakref.ref(builder._beside)
            try:
                builder.feed(blob)
                builder.finish()
            except SociError:
                pass
            else:
                pytest.fail("it is broken")
            del builder
            assert [one() for one in alive] == [None] * 3
    finally:
        gc.enable()


def test_nothing_is_done_after_a_failure() -> None:
    """A job that fails is the last one, and every wait from then on says why."""
    beside, done = Held(), []

    def fail() -> None:
        raise InvalidTar("broken")

    for job in (lambda: done.append(1), fail, lambda: done.append(2)):
        beside.do(job)
    for _ in range(2):
        with pytest.raises(InvalidTar, match="broken"):
            beside.wait(beside.mark())
    beside.close()
    assert done == [1]


def test_the_thread_beside_ends() -> None:
    """A builder that is done, and one that failed, leave no thread behind."""
    before = threading.active_count()
    blob = gzip.compress(header(size=1 << 20) + os.urandom(1 << 20) + END, 1)
    builder = ZtocBuilder("gzip")
    builder.feed(blob)
    builder.finish()
    assert threading.active_count() == before
    builder = ZtocBuilder("gzip")
    with pytest.raises(InvalidGzip):
        builder.feed(blob[:600_000] + bytes(600_000))
    assert threading.active_count() == before


def test_the_time_zone_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are written in UTC, wherever a layer is indexed."""
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        built = build(content("pax-types.tar.gz"), span_size=1 << 22)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert built.ztoc_bytes == content("pax-types.span4194304.ztoc")


def test_an_empty_plain_layer() -> None:
    """Nothing at all is a plain tar without members and spans."""
    built = ZtocBuilder("uncompressed").finish()
    assert (built.ztoc.max_span_id, built.ztoc.entries, built.ztoc.span_digests) == (-1, (), ())
    assert Spans.of(parse_ztoc(built.ztoc_bytes)).count == 0


@pytest.mark.parametrize(
    ("blob", "algorithm", "error"),
    [
        (b"", "gzip", InvalidGzip),
        (b"\x1f", "gzip", InvalidGzip),
        (gzip.compress(END)[:10], "gzip", InvalidGzip),
        (gzip.compress(END)[:-1], "gzip", InvalidGzip),
        (gzip.compress(END) + b"\0", "gzip", InvalidGzip),
        (gzip.compress(END) + b"\x1f", "gzip", InvalidGzip),
        (gzip.compress(END) + zlib.compress(b"x"), "gzip", InvalidGzip),
        (zlib.compress(END), "gzip", InvalidGzip),
        (END, "gzip", InvalidGzip),
        (gzip.compress(b"no tar" * 100), "gzip", InvalidTar),
        (gzip.compress(header()[:100]), "gzip", InvalidTar),
        (gzip.compress(END), "uncompressed", InvalidTar),
        (header(size=9), "uncompressed", InvalidTar),
    ],
)
def test_broken_layers_are_refused(blob: bytes, algorithm: Algorithm, error: type[SociError]) -> None:
    """A blob that is not what it should be, or not all of it, gets no zTOC."""
    with pytest.raises(error):
        build(blob, algorithm)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_mutated_layers_raise_nothing_foreign(data: st.DataObject) -> None:
    """However a gzip layer is changed or cut, building ends in a zTOC or a `SociError`."""
    blob = bytearray(content(data.draw(st.sampled_from(["pax-types.tar.gz", "members.tar.gz", "gzip-fname.tar.gz"]))))
    for _ in range(data.draw(st.integers(0, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        build(bytes(blob[: data.draw(st.integers(0, len(blob)))]), span_size=1000)
    except SociError:
        return


def test_span_sizes_that_cannot_be() -> None:
    """A plain tar needs a span size; nothing takes a negative one, or an unknown compression."""
    wrong: list[tuple[Any, int]] = [
        ("uncompressed", 0),
        ("uncompressed", 2**63),
        ("gzip", -1),
        ("gzip", 2**63),
        ("zstd", -1),
        ("lz4", 1),
    ]
    for algorithm, span_size in wrong:
        with pytest.raises(InvalidInput):
            ZtocBuilder(algorithm, span_size)


def test_too_many_spans_stop_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints cost 32 KiB each: a stream of tiny blocks is stopped at a limit, not when memory is out."""
    deflate = zlib.compressobj(1, zlib.DEFLATED, 31)
    blob = b"".join(deflate.compress(b"%d" % i) + deflate.flush(zlib.Z_FULL_FLUSH) for i in range(100))
    for name, limit in (("MAX_SPANS", 50), ("MAX_ZTOC_BYTES", 50 * 32_785)):
        with monkeypatch.context() as patch:
            patch.setattr(soci.checkpoint, name, limit)
            found = GzipCheckpoints(0)
            with pytest.raises(LimitExceeded, match="larger span size"):
                found.feed(blob, lambda _: None)
            assert len(found.points) <= 50
    monkeypatch.setattr(soci.build, "MAX_SPANS", 3)
    with pytest.raises(LimitExceeded, match="MAX_SPANS"):
        build(bytes(2048), "uncompressed", 100)


def test_without_libz_the_error_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the shared library is missing, building a gzip layer says what to install; plain layers still build."""

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    soci.checkpoint._libz.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr(ctypes.util, "find_library", lambda _: None)
    with pytest.raises(Unsupported, match="install zlib"):
        ZtocBuilder("gzip")
    assert build(END, "uncompressed").ztoc.uncompressed_size == 1024
    monkeypatch.undo()
    soci.checkpoint._libz.cache_clear()


def test_a_bomb_does_not_fill_memory() -> None:
    """A layer that inflates to far more than its size is walked in constant memory."""
    bomb = gzip.compress(header(size=1 << 28) + bytes(1 << 28) + END, 9)
    before = _resident()
    builder = ZtocBuilder("gzip", 1 << 26)
    builder.feed(bomb)
    assert builder.finish().ztoc.uncompressed_size == 512 + (1 << 28) + 1024
    assert _resident() - before < 64 << 20


def _resident() -> int:
    """Bytes of memory in use now."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
