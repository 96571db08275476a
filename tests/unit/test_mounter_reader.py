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
from soci_cache import LayerStore, locks
from soci_cache.evict import take_away
from soci_mounter import reader as module
from soci_mounter.flights import MISS, READ_AHEAD, Want
from soci_mounter.headers import Headers
from soci_mounter.reader import NEVER, Failed, FileHandle, LayerContent, Miss, Seams, patience
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
        last = min(want.last + want.ahead, self.content.reader.spans.count - 1)
        self.made.fill(self.cache, self.content.reader.missing(range(want.first, last + 1)))

    @property
    def ahead(self) -> list[tuple[int, int]]:
        """First and last spans that were asked for without a reader who waits, of miss and read-ahead alike."""
        return [
            (want.last + 1, want.last + want.ahead) if want.why == MISS else (want.first, want.last)
            for want in self.wants
            if want.why == READ_AHEAD or want.ahead
        ]

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


@pytest.fixture
def large_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of the test counts as a large one, and little is read ahead."""
    monkeypatch.setattr(module, "SMALL_FILE", 1000)
    monkeypatch.setattr(module, "LEAST_STRETCH", 100_000)
    monkeypatch.setattr(module, "SURE_STRETCH", 800_000)
    monkeypatch.setattr(module, "SLACK", 100_000)


async def test_a_small_file_comes_whole(made: Made, tmp_path: Path) -> None:
    """Its first miss asks for all of it, header included, in one ask, of which the reader waits for his part."""
    async with rigged(made, tmp_path) as rig:
        file = rig.open(b"large")
        await file.read(1_000_000, 10)
        at = file.node.data_offset
        first, last = rig.content.covering(at - 512, 1)[0], rig.content.covering(at + len(LARGE) - 1, 1)[-1]
        spans = rig.content.covering(at + 1_000_000, 10)
        asked = [(want.first, want.last, want.why) for want in rig.wants]
        assert asked == [(first, first, MISS), (spans[0], spans[-1], MISS)]
        assert rig.wants[1].ahead == last - spans[-1]
        await file.read(len(LARGE) - 10, 10)
        assert len(rig.wants) == 2


@pytest.mark.usefixtures("large_files")
async def test_reading_here_and_there_fetches_nothing_ahead(made: Made, tmp_path: Path) -> None:
    """Of a large file only what is read comes, and in its neighbourhood the next two spans."""
    async with rigged(made, tmp_path, headers=False) as rig:
        file = rig.open(b"large")
        for offset in (2_500_000, 1_000_000, 1_750_000):
            await file.read(offset, 10)
        spans = [rig.content.covering(file.node.data_offset + at, 10) for at in (2_500_000, 1_000_000, 1_750_000)]
        assert [(want.first, want.last, want.ahead) for want in rig.wants] == [(one[0], one[-1], 0) for one in spans]
        await file.read(1_750_000 - 70_000, 10)  # the span before
        assert rig.wants[-1].ahead == 0
        await file.read(1_750_000 + 140_000, 10)  # two behind
        assert rig.wants[-1].ahead == 2


@pytest.mark.usefixtures("large_files")
async def test_reading_in_order_widens_the_read_ahead(made: Made, tmp_path: Path) -> None:
    """A file read from start to end soon finds its spans here before it needs them, none asked for twice."""
    async with rigged(made, tmp_path) as rig:
        file = rig.open(b"large")
        for offset in range(0, len(LARGE), 100_000):
            assert await file.read(offset, 100_000) == LARGE[offset : offset + 100_000]
            await asyncio.sleep(0.001)
        spans = [span for want in rig.wants for span in range(want.first, want.last + 1 + want.ahead)]
        assert len(spans) == len(set(spans))
        assert len(rig.missed) < 6
        sizes = [last - first + 1 for first, last in rig.ahead]
        assert max(sizes) > 8
        assert sizes[0] <= 2
        end = rig.content.covering(file.node.data_offset + len(LARGE) - 1, 1)[-1]
        assert max(last for _, last in rig.ahead) == end
        assert len(rig.wants) < len(spans) / 3


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


FAILED = Failed(0, 8, 100.0)


@pytest.mark.parametrize(
    ("failed", "offset", "now", "seconds"),
    [
        (NEVER, 0, 0.0, 30.0),
        (FAILED, 0, 100.001, module.LAST_CHANCE),
        (FAILED, 7, 100.5, module.LAST_CHANCE),
        (FAILED, 8, 100.001, module.NO_CHANCE),
        (FAILED, 8, 100.5, module.LAST_CHANCE),
        (FAILED, 9, 100.001, 30.0),
        (FAILED, 0, 101.5, 30.0),
        (FAILED, 8, 101.5, 30.0),
    ],
)
def test_the_kernel_asking_again_does_not_double_the_deadline(
    failed: Failed, offset: int, now: float, seconds: float
) -> None:
    """Once more for a range that failed is short, and the pages that follow it at once are shorter; who comes later
    has time again."""
    assert patience(failed, offset, 1, now, 30.0) == seconds


def test_what_is_known_of_failed_reads() -> None:
    """Repetitions and what follows widen the range; another place, or a second later, begins anew."""
    assert NEVER.again(0, 8, 90.0, 100.0) == FAILED
    assert FAILED.again(0, 1, 100.5, 102.5) == Failed(0, 8, 102.5)
    assert FAILED.again(8, 1, 100.1, 100.2) == Failed(0, 9, 100.2)
    assert FAILED.again(9, 1, 100.1, 100.2) == Failed(9, 10, 100.2)
    assert FAILED.again(3, 1, 101.1, 101.2) == Failed(3, 4, 101.2)


async def test_a_read_after_a_failed_one_succeeds_once_the_cause_is_gone(made: Made, tmp_path: Path) -> None:
    """What is remembered of a failure is how long to wait for a repetition, and nothing else."""
    async with rigged(made, tmp_path, deadline=0.2) as rig:
        rig.fail = RegistryUnavailable("away")
        file = rig.open(b"small")
        for _ in range(3):
            with pytest.raises(SociError):
                await file.read(0, 5)
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
        read = reader.pread
        evicted: list[int] = []

        def evicting(length: int, offset: int) -> bytes:
            if not evicted:
                evicted.append(offset)
                with locks.folder(reader.directory):
                    take_away(reader.directory, reader.spans, [0])
                assert read(length, offset) == bytes(length)
            return read(length, offset)

        reader.pread = evicting  # type: ignore[method-assign]
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
