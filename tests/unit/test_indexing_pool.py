# SPDX-License-Identifier: Apache-2.0
"""zTOCs built in worker processes and in threads."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from soci.build import DEFAULT_BUILD_TOOL
from soci.digest import sha256_digest
from soci.errors import InvalidGzip, InvalidInput, InvalidTar, Mismatch, Unavailable
from soci_indexing.pool import BuildPool
from soci_runtime.workers import cores
from support.vectors import content, label, vectors

GOLDEN = [vector for vector in vectors(loads=True) if vector["span_size"]]


async def pieces(data: bytes, size: int = 10_000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def children() -> set[int]:
    """Processes that any thread of ours began."""
    return {int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


@pytest.mark.parametrize("workers", [1, 2])
async def test_every_golden_layer_is_built_the_same(workers: int) -> None:
    """Threads and processes give the golden zTOCs, with the digests of blob and tar, several layers at once."""
    async with BuildPool(workers) as pool:
        built = await asyncio.gather(
            *(
                pool.build(pieces(content(v["input"])), v["algorithm"], v["span_size"], DEFAULT_BUILD_TOOL)
                for v in GOLDEN
            )
        )
    for vector, one in zip(GOLDEN, built, strict=True):
        assert sha256_digest(one.ztoc_bytes) == vector["ztoc_digest"], label(vector)
        assert one.layer == vector["input_digest"]
        assert one.layer_size == len(content(vector["input"]))
        assert one.ztoc.max_span_id == vector["max_span_id"]


@pytest.mark.parametrize("workers", [1, 2])
async def test_an_error_is_of_the_builders_class_and_the_pool_goes_on(workers: int) -> None:
    """What the builder refuses at the first byte, in the middle or at the end arrives as the same error."""
    good = vectors(name="spans")[0]
    async with BuildPool(workers) as pool:
        for wrong, data, algorithm in (
            (InvalidGzip, b"not gzip" * 100_000, "gzip"),
            (InvalidTar, b"not tar" * 1_000, "uncompressed"),
            (InvalidGzip, content("bad-truncated.tar.gz"), "gzip"),
            (InvalidInput, b"", "zip"),
        ):
            with pytest.raises(wrong):
                await pool.build(pieces(data), algorithm, 4096, "x")  # type: ignore[arg-type]
            built = await pool.build(pieces(content(good["input"])), "gzip", good["span_size"], DEFAULT_BUILD_TOOL)
            assert sha256_digest(built.ztoc_bytes) == good["ztoc_digest"]


async def test_a_layer_beyond_all_buffers_whose_build_fails_does_not_hang() -> None:
    """The rest of a refused layer is neither waited for nor read."""
    given = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal given
        while True:
            given += 1
            yield b"\x00not gzip" * 100_000

    async with BuildPool(2) as pool:
        with pytest.raises(InvalidGzip):
            await pool.build(endless(), "gzip", 4096, "x")
    assert given < 100


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_stream_that_breaks_leaves_a_working_pool(workers: int) -> None:
    """The stream's own error comes out; the next layer is built right."""

    async def broken() -> AsyncIterator[bytes]:
        yield content("spans.tar.gz")[:20_000]
        raise Mismatch("broken on the way")

    good = vectors(name="spans")[0]
    async with BuildPool(workers) as pool:
        with pytest.raises(Mismatch, match="broken on the way"):
            await pool.build(broken(), "gzip", 4096, "x")
        built = await pool.build(pieces(content(good["input"])), "gzip", good["span_size"], DEFAULT_BUILD_TOOL)
    assert sha256_digest(built.ztoc_bytes) == good["ztoc_digest"]


async def test_no_process_stays() -> None:
    """Workers end with the pool, also those of a build that was cancelled in its middle."""
    before = children()
    fed = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield content("spans.tar.gz")[:20_000]
        fed.set()
        await asyncio.Event().wait()

    async with BuildPool(2) as pool:
        task = asyncio.create_task(pool.build(slow(), "gzip", 4096, "x"))
        await fed.wait()
        assert len(children() - before) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert children() == before
        await pool.build(pieces(content("spans.tar.gz")), "gzip", 4096, "x")
        assert len(children() - before) == 1
    assert children() == before


async def test_a_worker_that_dies_is_an_error_not_a_hang() -> None:
    """SIGKILL of the worker is `Unavailable`; another one takes the next layer."""
    before = children()

    async def murdered() -> AsyncIterator[bytes]:
        yield content("spans.tar.gz")[:20_000]
        for process in children() - before:
            os.kill(process, signal.SIGKILL)
        while True:
            yield content("spans.tar.gz")[20_000:]

    async with BuildPool(2) as pool:
        with pytest.raises(Unavailable):
            await pool.build(murdered(), "gzip", 4096, "x")
        await pool.build(pieces(content("spans.tar.gz")), "gzip", 4096, "x")


async def test_as_many_workers_as_cores() -> None:
    """Nothing said, the pool has a worker a core, and never more than its limit."""
    assert BuildPool().workers == min(cores(), 8)
    assert BuildPool(0).workers == 1
    assert BuildPool(1000).workers == 8
