# SPDX-License-Identifier: Apache-2.0
"""Whole blobs out of a real registry into announced files: as a stream, in chunks, and through everything that breaks."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path

import pytest

from soci.digest import Digest, sha256_digest
from soci.errors import FailedPrecondition, Mismatch, NotFound, RegistryUnavailable, SociError
from soci_cache import arriving
from soci_cache.arriving import COMING, COMPLETE, FAILED, ArrivingReader, ArrivingWriter, announce, forget, progress
from soci_dev.faults import Corrupt, Delay, Drop, Fault, Hook, IgnoreRange, Seen, Short, Status, always, first
from soci_dev.proxy import Proxy
from soci_fetcher import whole as module
from soci_fetcher.whole import Permits, WholeBlobs
from soci_registry import NoCredentials, Registry, RegistrySettings
from support.bus import until
from support.fetching import PATIENCE
from support.images import noise

CHUNK = 100_000
SIZE = 1_050_000
RANGED = replace(PATIENCE, range_skip_max=0)
"""So that this blob, which is small, is a large one."""


@pytest.fixture(scope="module")
def content() -> bytes:
    return noise(secrets.randbelow(1 << 30), SIZE)


@pytest.fixture(scope="module")
def layer(content: bytes) -> Digest:
    return sha256_digest(content)


@pytest.fixture
async def image(registry: str, proxy: Proxy, content: bytes) -> str:
    """An image of a repository that holds the blob, seen through the proxy."""
    name = "w/" + secrets.token_hex(6)
    async with Registry(settings=PATIENCE, credentials=NoCredentials()) as client:
        await client.repository(f"{registry}/{name}:1").push_blob(content)
    proxy.reset()
    return f"{proxy.address}/{name}:1"


@pytest.fixture
def blob(tmp_path: Path) -> Path:
    announce(tmp_path / "blob")
    return tmp_path / "blob"


@asynccontextmanager
async def bringing(
    settings: RegistrySettings = RANGED, *, downloads: int = -1, per_image: int = 3
) -> AsyncIterator[WholeBlobs]:
    async with Registry(settings=settings, credentials=NoCredentials()) as client:
        yield WholeBlobs(client, Permits(downloads, per_image), chunk=CHUNK)


def ranges(seen: list[Seen]) -> list[str]:
    return [one.range for one in seen if one.is_blob]


def watching(seen: list[Seen], then: Hook | None = None) -> Hook:
    """A hook that keeps what it saw."""

    def hook(one: Seen) -> Fault | None:
        seen.append(one)
        return then(one) if then else None

    return hook


def chunk(number: int) -> str:
    start = number * CHUNK
    return f"bytes={start}-{min(start + CHUNK, SIZE) - 1}"


async def test_a_large_blob_comes_in_chunks(
    proxy: Proxy, image: str, layer: Digest, content: bytes, blob: Path
) -> None:
    """One range to see that there are ranges, then each chunk once, from the front, several at a time but no more than
    allowed."""
    seen: list[Seen] = []
    proxy.hook = watching(seen, lambda _: Delay(0.02))
    async with bringing() as blobs:
        assert await blobs.bring(image, layer, SIZE, blob) == SIZE
    assert blob.read_bytes() == content
    assert progress(blob) == (SIZE, COMPLETE)
    probe, *chunks = ranges(seen)
    assert probe == f"bytes={SIZE - 1}-{SIZE - 1}"
    assert sorted(chunks) == sorted(chunk(number) for number in range(11))
    assert set(chunks[:3]) == {chunk(number) for number in range(3)}
    assert proxy.counts.peak == 3


async def test_a_small_blob_is_one_request(proxy: Proxy, image: str, layer: Digest, content: bytes, blob: Path) -> None:
    """A stream, without a range, and without a question before it where the size is known."""
    seen: list[Seen] = []
    proxy.hook = watching(seen)
    async with bringing(PATIENCE) as blobs:
        assert await blobs.bring(image, layer, SIZE, blob) == SIZE
        assert (ranges(seen), proxy.counts.head) == ([""], 0)
        assert await blobs.bring(image, layer, SIZE, blob) == SIZE, "what is complete is not fetched again"
        assert len(ranges(seen)) == 1
    assert blob.read_bytes() == content
    assert progress(blob) == (SIZE, COMPLETE)


async def test_a_size_that_nobody_told(proxy: Proxy, image: str, layer: Digest, content: bytes, blob: Path) -> None:
    """The registry is asked for it first."""
    async with bringing() as blobs:
        assert await blobs.bring(image, layer, None, blob) == SIZE
        announce(blob.with_name("other"))
        with pytest.raises(NotFound):
            await blobs.bring(image, Digest("sha256:" + "e" * 64), None, blob.with_name("other"))
    assert blob.read_bytes() == content


async def test_a_server_without_ranges(proxy: Proxy, image: str, layer: Digest, content: bytes, blob: Path) -> None:
    """It is noticed at the first range; then all comes as one stream, once."""
    seen: list[Seen] = []
    proxy.hook = watching(seen, always(IgnoreRange()))
    async with bringing(replace(RANGED, range_bad_answer_tries=2)) as blobs:
        assert await blobs.bring(image, layer, SIZE, blob) == SIZE
    assert blob.read_bytes() == content
    assert ranges(seen)[-1] == ""
    assert all(one == f"bytes={SIZE - 1}-{SIZE - 1}" for one in ranges(seen)[:-1])


@pytest.mark.parametrize("fault", [Short(5_000), Drop(), Status(503)], ids=repr)
async def test_a_broken_chunk_is_asked_for_again_alone(
    proxy: Proxy, image: str, layer: Digest, content: bytes, blob: Path, fault: Fault
) -> None:
    """The others are not, nor are the bytes of it that came."""
    seen: list[Seen] = []
    broken = first(1, fault)
    proxy.hook = watching(seen, lambda one: broken(one) if one.range == chunk(4) else None)
    async with bringing() as blobs:
        await blobs.bring(image, layer, SIZE, blob)
    assert blob.read_bytes() == content
    start, end = chunk(4).removeprefix("bytes=").split("-")
    rest = f"bytes={int(start) + fault.keep}-{end}" if isinstance(fault, Short) else chunk(4)
    probe = f"bytes={SIZE - 1}-{SIZE - 1}"
    assert sorted(ranges(seen)) == sorted([probe, *map(chunk, range(11)), rest])


@pytest.mark.parametrize("settings", [RANGED, PATIENCE], ids=["chunks", "stream"])
async def test_wrong_bytes(proxy: Proxy, image: str, layer: Digest, blob: Path, settings: RegistrySettings) -> None:
    """They are a `Mismatch`; the blob is never complete, its reader hears of it, and the file is of no more use."""
    proxy.hook = lambda one: Corrupt(7) if one.range in {"", chunk(4)} else None
    async with bringing(settings) as blobs:
        with pytest.raises(Mismatch):
            await blobs.bring(image, layer, SIZE, blob)
        assert progress(blob)[1] == FAILED
        proxy.hook = None
        with pytest.raises(FailedPrecondition):
            await blobs.bring(image, layer, SIZE, blob)


@pytest.mark.parametrize("settings", [RANGED, PATIENCE], ids=["chunks", "stream"])
@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1, 0])
async def test_a_wrong_size(
    proxy: Proxy, image: str, layer: Digest, blob: Path, settings: RegistrySettings, size: int
) -> None:
    """A manifest that says another size than the blob has is refused, and no more is written than it says."""
    async with bringing(replace(settings, range_bad_answer_tries=2)) as blobs:
        with pytest.raises(SociError):
            await blobs.bring(image, layer, size, blob)
    assert progress(blob)[1] == FAILED
    assert blob.stat().st_size <= size


async def test_a_blob_that_is_not_there(proxy: Proxy, image: str, blob: Path) -> None:
    """The registry's word is final."""
    async with bringing() as blobs:
        with pytest.raises(NotFound):
            await blobs.bring(image, Digest("sha256:" + "e" * 64), SIZE, blob)
    assert progress(blob)[1] == FAILED


async def test_a_registry_that_is_away(proxy: Proxy, image: str, layer: Digest, content: bytes, blob: Path) -> None:
    """An error, but what came stays and the next ask goes on behind it: nothing before it is fetched again."""
    settings = replace(RANGED, range_tries=2, tries=2)
    proxy.hook = lambda one: Status(503) if one.range in {chunk(number) for number in range(6, 11)} else None
    async with bringing(settings, per_image=1) as blobs:
        with pytest.raises(RegistryUnavailable):
            await blobs.bring(image, layer, SIZE, blob)
        assert progress(blob) == (6 * CHUNK, COMING)
        seen: list[Seen] = []
        proxy.hook = watching(seen)
        assert await blobs.bring(image, layer, SIZE, blob) == SIZE
    assert blob.read_bytes() == content
    assert progress(blob) == (SIZE, COMPLETE)
    assert set(ranges(seen)[1:]) == {chunk(number) for number in range(6, 11)}


async def test_a_damaged_prefix_is_noticed(image: str, layer: Digest, blob: Path) -> None:
    """What an earlier writer left counts for the digest as it is now."""
    with closing(arriving_writer(blob)) as writer:
        writer.write(0, bytes(CHUNK))
        writer.advance(CHUNK)
    async with bringing() as blobs:
        with pytest.raises(Mismatch):
            await blobs.bring(image, layer, SIZE, blob)


def arriving_writer(blob: Path) -> ArrivingWriter:
    writer = ArrivingWriter.claim(blob)
    assert writer is not None
    return writer


async def test_two_asks_are_one_download(
    monkeypatch: pytest.MonkeyPatch, proxy: Proxy, image: str, layer: Digest, content: bytes, blob: Path
) -> None:
    """The second waits for the first, in whatever process that is; where the first gives up, it goes on."""
    monkeypatch.setattr(module, "FOLLOW_SECONDS", 0.01)
    proxy.hook = always(Delay(0.05))
    async with bringing() as blobs, bringing() as others:
        one = asyncio.ensure_future(blobs.bring(image, layer, SIZE, blob))
        await until(lambda: progress(blob)[0] > 0, "the first chunk")
        two = asyncio.ensure_future(others.bring(image, layer, SIZE, blob))
        assert await one == await two == SIZE
        assert proxy.counts.blob_bytes == SIZE + 1

        other = blob.with_name("other")
        announce(other)
        one = asyncio.ensure_future(blobs.bring(image, layer, SIZE, other))
        two = asyncio.ensure_future(others.bring(image, layer, SIZE, other))
        await until(lambda: progress(other)[0] > 0, "the first chunk")
        one.cancel()
        assert await two == SIZE
        assert other.read_bytes() == content


async def test_nobody_wants_it_any_more(proxy: Proxy, image: str, layer: Digest, blob: Path) -> None:
    """Deleting the file ends the download soon."""
    proxy.hook = always(Delay(0.02))
    async with bringing(per_image=1) as blobs:
        one = asyncio.ensure_future(blobs.bring(image, layer, SIZE, blob))
        await until(lambda: progress(blob)[0] > 0, "the first chunk")
        forget(blob)
        with pytest.raises(FailedPrecondition):
            await one
        assert proxy.counts.blob_bytes < SIZE
        with pytest.raises(FailedPrecondition):
            await blobs.bring(image, layer, SIZE, blob)


async def test_a_reader_right_behind(proxy: Proxy, image: str, layer: Digest, content: bytes, blob: Path) -> None:
    """It has the first bytes long before the last ones are there, and in the end all of them."""
    proxy.hook = always(Delay(0.02))
    got = bytearray()
    behind: list[int] = []

    def read() -> None:
        with closing(ArrivingReader(blob, stopped=lambda: False)) as reader:
            while piece := reader.read(50_000):
                got.extend(piece)
                behind.append(progress(blob)[0])

    async with bringing(per_image=2) as blobs:
        reading = asyncio.ensure_future(asyncio.to_thread(read))
        await blobs.bring(image, layer, SIZE, blob)
        await reading
    assert bytes(got) == content
    assert behind[0] < SIZE


async def test_limits_of_an_image_and_in_all(proxy: Proxy, image: str, layer: Digest, tmp_path: Path) -> None:
    """Two layers of one image share its requests; two images share those of all."""
    files = [tmp_path / str(number) for number in range(4)]
    for file in files:
        announce(file)
    proxy.hook = always(Delay(0.01))
    async with bringing(per_image=2) as blobs:
        await asyncio.gather(*(blobs.bring(image, layer, SIZE, file) for file in files[:2]))
    assert proxy.counts.peak == 2
    proxy.reset()
    async with bringing(downloads=3, per_image=2) as blobs:
        other = image.removesuffix(":1") + ":2"
        await asyncio.gather(
            *(blobs.bring(name, layer, SIZE, file) for name, file in zip((image, other), files[2:], strict=True))
        )
        assert blobs._permits._images._held == {}
    assert proxy.counts.peak == 3


async def test_an_ask_that_is_given_up_keeps_what_came(proxy: Proxy, image: str, layer: Digest, blob: Path) -> None:
    """It leaves its bytes to the next one, and no lock."""
    proxy.hook = always(Delay(0.05))
    async with bringing(per_image=1) as blobs:
        one = asyncio.ensure_future(blobs.bring(image, layer, SIZE, blob))
        await until(lambda: progress(blob)[0] > 0, "the first chunk")
        one.cancel()
        with pytest.raises(asyncio.CancelledError):
            await one
        arrived, state = progress(blob)
        assert (0 < arrived < SIZE, state) == (True, COMING)
        assert not arriving.is_written(blob)
        proxy.hook = None
        assert await blobs.bring(image, layer, SIZE, blob) == SIZE
    assert proxy.counts.blob_bytes < 2 * SIZE
