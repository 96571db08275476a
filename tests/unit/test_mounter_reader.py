# SPDX-License-Identifier: Apache-2.0
"""The mounter's read path over a real span cache."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from soci.errors import Mismatch, RegistryUnavailable, SociError
from soci.launch import new_traceparent
from soci.tree import LayerTree
from soci_cache import LayerStore
from soci_mounter import reader as module
from soci_mounter.flights import MISS, READ_AHEAD, Want
from soci_mounter.headers import Headers
from soci_mounter.reader import FileHandle, LayerContent, Miss, Seams
from support.mounter_layers import Made, item, make, noise

LARGE = noise(3_000_000, 5)


@pytest.fixture(scope="module")
def made() -> Made:
    return make([item("small", b"small"), item("large", LARGE), item("last", b"last")])


@dataclass
class Rig:
    """A layer's content, its fetcher, and what was heard of it."""

    made: Made
    cache: Path
    content: LayerContent = field(init=False)
    wants: list[Want] = field(default_factory=list)
    missed: list[Miss] = field(default_factory=list)
    fail: SociError | None = None

    async def fetch(self, want: Want) -> None:
        self.wants.append(want)
        await asyncio.sleep(0)
        if self.fail:
            raise self.fail
        self.made.fill(self.cache, range(want.first, want.last + 1))

    def open(self, name: bytes) -> FileHandle:
        tree = LayerTree.of(self.made.ztoc.entries)
        node = tree.lookup(0, name)
        assert node is not None
        return self.content.open("m1", node, tree.node(node))


@asynccontextmanager
async def rigged(made: Made, cache: Path, *, deadline: float = 20.0, headers: bool = True) -> AsyncIterator[Rig]:
    made.put(cache)
    rig = Rig(made, cache)
    seams = Seams(deadline, rig.missed.append, lambda _what, _error: None)
    entries = made.ztoc.entries
    layer = LayerStore(cache).read(made.layer, made.ztoc_digest)
    rig.content = LayerContent(layer, rig.fetch, seams, Headers.of(entries) if headers else None)
    try:
        yield rig
    finally:
        await rig.content.close()


async def test_every_range_of_a_file_is_exact(made: Made, tmp_path: Path) -> None:
    """Reads across spans, at the ends and beyond them give the file's bytes and nothing else."""
    async with rigged(made, tmp_path) as rig:
        file = rig.open(b"large")
        for offset in (0, 1, 65_535, 65_536, 1_000_000, len(LARGE) - 1, len(LARGE), len(LARGE) + 5):
            for length in (1, 4096, 200_000):
                assert await file.read(offset, length) == LARGE[offset : offset + length]
        assert await file.read(0, 0) == b""
        assert await rig.open(b"last").read(0, 100) == b"last"


async def test_a_miss_is_told_and_a_hit_is_not(made: Made, tmp_path: Path) -> None:
    """One event for a read that waited, with its mount, file, spans and launch; none for bytes that are here."""
    async with rigged(made, tmp_path) as rig:
        trace = new_traceparent()
        rig.content.seams.traces["m1"] = trace
        file = rig.open(b"small")
        assert await file.read(0, 5) == b"small"
        assert await file.read(0, 5) == b"small"
        (miss,) = rig.missed
        assert (miss.mount, miss.path, miss.first, miss.length, miss.trace) == ("m1", b"small", 0, 512, trace)
        assert miss.failed is None
        assert all(want.trace == trace for want in rig.wants)


async def test_the_missed_spans_are_asked_for_first_and_alone(made: Made, tmp_path: Path) -> None:
    """What the reader waits for is not lengthened by read-ahead, which comes as asks of its own and ends with the file."""
    async with rigged(made, tmp_path, headers=False) as rig:
        file = rig.open(b"large")
        await file.read(1_000_000, 10)
        spans = rig.content.covering(file.node.data_offset + 1_000_000, 10)
        assert (rig.wants[0].first, rig.wants[0].last, rig.wants[0].why) == (spans[0], spans[-1], MISS)
        ahead = [want for want in rig.wants if want.why == READ_AHEAD]
        assert [(want.first, want.last) for want in ahead] == [(spans[-1] + 1, spans[-1] + module.FIRST_WINDOW)]
        await file.read(len(LARGE) - 10, 10)
        assert (
            max(want.last for want in rig.wants) == rig.content.covering(file.node.data_offset + len(LARGE) - 1, 1)[-1]
        )


async def test_reading_in_order_widens_the_read_ahead(made: Made, tmp_path: Path) -> None:
    """A file read from start to end soon finds its spans here before it needs them."""
    async with rigged(made, tmp_path) as rig:
        file = rig.open(b"large")
        for offset in range(0, len(LARGE), 100_000):
            assert await file.read(offset, 100_000) == LARGE[offset : offset + 100_000]
            await asyncio.sleep(0.001)
        spans = [span for want in rig.wants for span in range(want.first, want.last + 1)]
        assert len(spans) == len(set(spans))
        assert len(rig.missed) < 6
        assert any(want.last - want.first > module.FIRST_WINDOW for want in rig.wants)


async def test_a_wrong_header_is_refused_until_it_is_right(made: Made, tmp_path: Path) -> None:
    """A file whose header says another name fails, each time; the others are served."""
    entries = tuple(replace(entry, mode=0o600) if entry.name == b"small" else entry for entry in made.ztoc.entries)
    async with rigged(made, tmp_path) as rig:
        rig.content._headers = Headers.of(entries)
        for _ in range(2):
            with pytest.raises(Mismatch, match="another mode"):
                await rig.open(b"small").read(0, 5)
        assert await rig.open(b"last").read(0, 4) == b"last"


async def test_headers_are_looked_at_once_a_file(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many handles and reads, one check a file."""
    checked: list[int] = []
    check = Headers.check

    def counting(self: Headers, offset: int, header: bytes) -> None:
        checked.append(offset)
        check(self, offset, header)

    monkeypatch.setattr(Headers, "check", counting)
    async with rigged(made, tmp_path) as rig:
        for _ in range(3):
            assert await rig.open(b"small").read(0, 5) == b"small"
        assert len(checked) == 1


async def test_a_read_repeated_after_its_deadline_is_short_and_healing_ends_it(made: Made, tmp_path: Path) -> None:
    """The kernel's second try of a failed read does not double the deadline, and it succeeds if the cause is gone."""
    async with rigged(made, tmp_path, deadline=30.0) as rig:
        rig.fail = RegistryUnavailable("away")
        file = rig.open(b"small")
        now = asyncio.get_running_loop().time()
        assert file._patience(0, 5, now) == 30.0
        file._failed = (0, 5, now)
        assert file._patience(4, 1, now) == module.LAST_CHANCE
        assert file._patience(5, 1, now) == 30.0
        assert file._patience(0, 1, now + module.REPEAT + 0.1) == 30.0
        rig.fail = None
        assert await file.read(0, 5) == b"small"


async def test_a_file_cut_short_is_an_error_and_no_short_read(made: Made, tmp_path: Path) -> None:
    """When the cache file is truncated under its marks the read fails."""
    async with rigged(made, tmp_path) as rig:
        file = rig.open(b"large")
        assert await file.read(2_000_000, 10) == LARGE[2_000_000:2_000_010]
        os.truncate(rig.content.reader.directory / "layer.tar", 1000)
        with pytest.raises(Mismatch):
            await file.read(2_000_000, 10)


async def test_bytes_read_while_their_span_is_evicted_are_not_believed(made: Made, tmp_path: Path) -> None:
    """A mark that vanished during the read makes the reader fetch and read again."""
    async with rigged(made, tmp_path, headers=False) as rig:
        file = rig.open(b"small")
        assert await file.read(0, 5) == b"small"
        reader = rig.content.reader
        evicted: list[int] = []

        class Evicting:
            def __getattr__(self, name: str) -> object:
                return getattr(reader, name)

            def pread(self, length: int, offset: int) -> bytes:
                if evicted:
                    return reader.pread(length, offset)
                evicted.append(offset)
                with LayerStore(tmp_path).write(made.layer, made.ztoc_digest) as writer:
                    writer._presence.clear(0)
                return bytes(length)

        rig.content.reader = Evicting()  # type: ignore[assignment]
        wants = len(rig.wants)
        assert await file.read(0, 5) == b"small"
        assert len(rig.wants) == wants + 1


async def test_a_closed_layer_is_stale(made: Made, tmp_path: Path) -> None:
    """Handles that outlive their layer fail with ESTALE, waiting ones with an error."""
    async with rigged(made, tmp_path) as rig:
        file = rig.open(b"small")
        await rig.content.close()
        with pytest.raises(OSError) as info:
            await file.read(0, 5)
        assert info.value.errno == errno.ESTALE


async def test_a_member_beyond_the_layer_is_refused(made: Made, tmp_path: Path) -> None:
    """A table of contents that promises bytes behind the layer's end gets no read through."""
    async with rigged(made, tmp_path, headers=False) as rig:
        file = rig.open(b"last")
        lie = rig.content.open("m1", file.node_id, replace(file.node, size=1 << 40))
        with pytest.raises(Mismatch):
            await lie.read(1 << 30, 10)
        assert rig.wants == []
