# SPDX-License-Identifier: Apache-2.0
"""zstd layers from a real registry into the span cache: frame by frame, or as one span too large for memory."""

from __future__ import annotations

import os
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from soci.digest import sha256_digest
from soci.errors import InvalidInput, LimitExceeded, Mismatch
from soci.zstd import ZstdPoints, encode_zstd_points, parse_zstd_points
from soci.ztoc import encode_ztoc
from soci_bus.events import SpanRejected, SpansArrived
from soci_dev.faults import Corrupt, Short, always, first
from soci_dev.proxy import Proxy
from soci_fetcher import large, runs
from support.fetching import CONTEXT, check, fetching, push_layer, spans_of, whole
from support.images import noise
from support.mounter_layers import Made, everything, item, make_zstd

SMALL_RUN = 100_000


@pytest.fixture(scope="module")
def framed() -> Made:
    return make_zstd([*everything(), item("text", noise(5, 2_000_000))], frame_bytes=100_000)


@pytest.fixture(scope="module")
def single() -> Made:
    return make_zstd([*everything(), item("text", noise(5, 2_000_000))])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits so small that the layers here are large."""
    monkeypatch.setattr(large, "LARGE_BYTES", 1 << 20)
    monkeypatch.setattr(large, "RUN_BYTES", SMALL_RUN)
    monkeypatch.setattr(large, "READ_BYTES", 10_000)


async def served(proxy: Proxy, made: Made) -> str:
    name = await push_layer(proxy.upstream, made)
    proxy.reset()
    return f"{proxy.address}/{name}:1"


async def test_frames_come_span_by_span(tmp_path: Path, proxy: Proxy, framed: Made) -> None:
    """One span is one range of the blob; all of them together are the tar."""
    reference = await served(proxy, framed)
    framed.put(tmp_path)
    async with fetching(tmp_path) as fetcher:
        await fetcher.spans.fetch(spans_of(reference, framed, 3, 4), CONTEXT)
        assert check(fetcher.store, framed) == [3, 4]
        assert proxy.counts.body_bytes < len(framed.blob) / 4
        await whole(fetcher, reference, framed)
        assert check(fetcher.store, framed) == list(range(len(framed.ztoc.span_digests)))
        assert proxy.counts.body_bytes == len(framed.blob)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("fault", [None, Corrupt(10), Short(500)], ids=str)
async def test_a_span_too_large_for_memory(tmp_path: Path, proxy: Proxy, single: Made, fault: object) -> None:
    """It comes in ranges through a nameless file; a passing fault costs another try, and nothing stays behind."""
    reference = await served(proxy, single)
    single.put(tmp_path)
    if fault is not None:
        proxy.hook = first(1, fault)  # type: ignore[arg-type]
    async with fetching(tmp_path) as fetcher:
        await whole(fetcher, reference, single)
        assert check(fetcher.store, single) == [0]
        (arrived,) = fetcher.told(SpansArrived)
        tries = 1 + len(fetcher.told(SpanRejected))
        assert (tries > 1) == isinstance(fault, Corrupt)
        assert arrived.requests == tries * -(-len(single.blob) // SMALL_RUN)
        assert arrived.compressed_bytes == tries * len(single.blob)
        place = fetcher.store.directory(single.layer, single.ztoc_digest)
        assert {path.name for path in place.iterdir()} <= {"journal", "layer.tar", "spans", "tail", "ztoc"}


@pytest.mark.usefixtures("small")
async def test_wrong_bytes_of_a_large_span_are_never_written(tmp_path: Path, proxy: Proxy, single: Made) -> None:
    """Not even where nobody could see them: the file stays a hole, the span unmarked, and the error names the digest."""
    reference = await served(proxy, single)
    single.put(tmp_path)
    proxy.hook = always(Corrupt(1000))
    async with fetching(tmp_path) as fetcher:
        with pytest.raises(Mismatch, match=single.ztoc.span_digests[0]):
            await whole(fetcher, reference, single)
        assert len(fetcher.told(SpanRejected)) == 3
        tar = fetcher.store.directory(single.layer, single.ztoc_digest) / "layer.tar"
        assert tar.stat().st_blocks == 0
        assert check(fetcher.store, single) == []
        proxy.hook = None
        await whole(fetcher, reference, single)
        assert check(fetcher.store, single) == [0]


@pytest.mark.usefixtures("small")
async def test_a_large_span_that_is_not_what_its_ztoc_says(tmp_path: Path, proxy: Proxy, single: Made) -> None:
    """The bytes have their digest, and are more or fewer than the table of contents needs: the zTOC's fault."""
    content = encode_ztoc(replace(single.ztoc, uncompressed_size=single.ztoc.uncompressed_size + 65_536))
    lying = replace(single, ztoc_bytes=content, ztoc_digest=sha256_digest(content))
    reference = await served(proxy, lying)
    lying.put(tmp_path)
    async with fetching(tmp_path) as fetcher:
        with pytest.raises(InvalidInput, match="is wrong"):
            await whole(fetcher, reference, lying)
        assert check(fetcher.store, lying) == []
        assert fetcher.told(SpanRejected) == []


async def test_frames_whose_checkpoints_are_wrong(tmp_path: Path, proxy: Proxy, framed: Made) -> None:
    """A span that is said to begin elsewhere in the tar: its bytes are too many, the one before has too few."""
    points = parse_zstd_points(framed.ztoc.checkpoints)
    points.outs[2] += 512
    blob = encode_zstd_points(ZstdPoints(points.span_size, points.ins, points.outs))
    content = encode_ztoc(replace(framed.ztoc, checkpoints=blob))
    lying = replace(framed, ztoc_bytes=content, ztoc_digest=sha256_digest(content))
    reference = await served(proxy, lying)
    lying.put(tmp_path)
    async with fetching(tmp_path) as fetcher:
        with pytest.raises(InvalidInput, match="is wrong"):
            await fetcher.spans.fetch(spans_of(reference, lying, 1, 1), CONTEXT)
        assert check(fetcher.store, lying) == []


async def test_memory_is_bounded_whatever_a_span_holds(
    tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer of a hundred megabytes that is one small frame, and one of many megabytes compressed."""
    monkeypatch.setattr(large, "LARGE_BYTES", 8 << 20)
    monkeypatch.setattr(large, "RUN_BYTES", 1 << 20)
    monkeypatch.setattr(runs, "RUN_BYTES", 1 << 20)
    for made in (make_zstd([item("zeros", bytes(100 << 20))]), make_zstd([item("noise", os.urandom(32 << 20))])):
        reference = await served(proxy, made)
        made.put(tmp_path)
        async with fetching(tmp_path) as fetcher:
            tracemalloc.start()
            await whole(fetcher, reference, made)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert check(fetcher.store, made) == [0]
            assert peak < 24 << 20


@pytest.mark.usefixtures("small")
async def test_a_full_disk_is_told(tmp_path: Path, proxy: Proxy, single: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for any span: the setting that was crossed, and no mark."""
    reference = await served(proxy, single)
    single.put(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    async with fetching(tmp_path) as fetcher:
        monkeypatch.setattr(tempfile, "TemporaryFile", full)
        with pytest.raises(LimitExceeded, match="full"):
            await whole(fetcher, reference, single)
        assert check(fetcher.store, single) == []
