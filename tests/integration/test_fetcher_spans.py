# SPDX-License-Identifier: Apache-2.0
"""Spans out of a real registry, through a proxy that spoils them, into the span cache."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from soci.digest import Digest, sha256_digest
from soci.errors import InvalidGzip, InvalidInput, Mismatch, NotFound, RegistryUnavailable, SociError, Unavailable
from soci.span import Spans
from soci.zinfo import RECORD_BYTES
from soci.ztoc_encode import encode_ztoc
from soci_bus.events import FetchFailed, SpanRejected, SpansArrived
from soci_bus.face import Context
from soci_dev.faults import Corrupt, Delay, Drop, Seen, Short, Status, always, first
from soci_dev.proxy import Proxy
from soci_fetcher import opened, schedule
from support.bus import LAUNCH, LIMIT, until
from support.fetching import CONTEXT, PATIENCE, check, fetching, push_layer, spans_of, whole
from support.images import noise
from support.mounter_layers import Made, everything, item, make

_HEADER_BYTES = 12  # of the checkpoints: how many, and the span size


@pytest.fixture(scope="module")
def made() -> Made:
    """A gzip layer of some twenty spans, most of which start within a byte."""
    return make([*everything(), item("text", noise(5, 2_000_000))], span_size=1 << 17)


@pytest.fixture(scope="module")
def count(made: Made) -> int:
    """How many spans it has."""
    assert len(made.ztoc.span_digests) >= 20
    return len(made.ztoc.span_digests)


@pytest.fixture
async def reference(registry: str, proxy: Proxy, made: Made) -> str:
    """The layer in the registry, seen through the proxy, whose counts are at zero."""
    name = await push_layer(registry, made)
    proxy.reset()
    return f"{proxy.address}/{name}:1"


class Gate:
    """A hook that holds all blobs back until it is opened."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.waiting = 0

    def __call__(self, seen: Seen) -> None:
        if seen.is_blob:
            self.waiting += 1
            self.open.wait(LIMIT)


@pytest.fixture
def gate(proxy: Proxy) -> Iterator[Gate]:
    """Blobs wait for it."""
    found = Gate()
    proxy.hook = found
    yield found
    found.open.set()


async def test_a_whole_layer(tmp_path: Path, proxy: Proxy, reference: str, made: Made, count: int) -> None:
    """All spans come in one request of exactly their bytes; a second ask moves nothing."""
    async with fetching(tmp_path) as one:
        made.put(tmp_path)
        size = made.ztoc.compressed_size - Spans.of(made.ztoc).compressed(0)[0]
        fetched = await whole(one, reference, made)
        assert (fetched.requests, fetched.compressed_bytes) == (1, size)
        assert check(one.store, made) == list(range(count))
        assert proxy.counts.blob_bytes == size
        (event,) = one.told(SpansArrived)
        assert (event.id, event.first, event.last, event.why) == (LAUNCH, 0, count - 1, "miss")
        assert (event.compressed_bytes, event.requests) == (size, 1)
        again = await whole(one, reference, made)
        assert (again.requests, again.compressed_bytes) == (0, 0)
        assert proxy.counts.blob_bytes == size
    with one.store.read(made.layer, made.ztoc_digest) as reader:
        length = made.ztoc.uncompressed_size
        assert reader.pread(length, 0) == made.tar[:length]


async def test_only_what_is_missing_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str, made: Made, count: int
) -> None:
    """Neighbours share a request, up to the limit; what is here splits them."""
    geometry = Spans.of(made.ztoc)
    made.put(tmp_path)
    made.fill(tmp_path, [2, 5])
    monkeypatch.setattr(schedule, "RUN_BYTES", geometry.compressed(8)[1] - geometry.compressed(6)[0])
    async with fetching(tmp_path) as one:
        fetched = await one.spans.fetch(spans_of(reference, made, 0, 9), CONTEXT)
        assert sorted((event.first, event.last) for event in one.told(SpansArrived))[:2] == [(0, 1), (3, 4)]
        assert fetched.requests == len(one.told(SpansArrived)) >= 4
        assert check(one.store, made) == list(range(10))
        assert count > 10


@pytest.mark.parametrize("fault", [Corrupt(5), Short(1000), Drop(), Status(500), Status(429)], ids=repr)
async def test_a_passing_fault_gives_right_bytes(
    tmp_path: Path, proxy: Proxy, reference: str, made: Made, fault: Corrupt | Short | Drop | Status
) -> None:
    """Whatever happens to the first answer, the next one counts; wrong bytes are told of, span by span."""
    made.put(tmp_path)
    proxy.hook = first(1, fault)
    async with fetching(tmp_path) as one:
        fetched = await one.spans.fetch(spans_of(reference, made, 3, 7), CONTEXT)
        assert check(one.store, made) == [3, 4, 5, 6, 7]
        rejected = [(event.id, event.span) for event in one.told(SpanRejected)]
        assert rejected == ([(LAUNCH, 3)] if isinstance(fault, Corrupt) else [])
        if isinstance(fault, Corrupt):  # of the second try only the one span is moved again
            geometry = Spans.of(made.ztoc)
            sizes = [geometry.compressed(7)[1] - geometry.compressed(3)[0]]
            sizes.append(geometry.compressed(3)[1] - geometry.compressed(3)[0])
            assert fetched.compressed_bytes == sum(sizes)
            assert one.told(SpansArrived)[0].requests == 2
        assert one.told(FetchFailed) == []


async def test_bytes_that_are_always_wrong(tmp_path: Path, proxy: Proxy, reference: str, made: Made) -> None:
    """After all tries it is `Mismatch`; the wrong span is not marked, its right neighbours are, and it can heal."""
    made.put(tmp_path)
    proxy.hook = always(Corrupt(0))
    async with fetching(tmp_path, attempts=4) as one:
        with pytest.raises(Mismatch, match=r"span 3 .*after 4 tries"):
            await one.spans.fetch(spans_of(reference, made, 3, 5), CONTEXT)
        assert 3 not in check(one.store, made)
        assert [event.span for event in one.told(SpanRejected)] == [3] * 4
        (failed,) = one.told(FetchFailed)
        assert (failed.id, failed.what) == (LAUNCH, "spans 3..5")
        assert one.told(SpansArrived) == []
        proxy.hook = None
        await one.spans.fetch(spans_of(reference, made, 3, 5), CONTEXT)
        assert check(one.store, made) == [3, 4, 5]


async def test_a_ztoc_whose_checkpoints_are_wrong(tmp_path: Path, registry: str, proxy: Proxy, made: Made) -> None:
    """Bytes as promised that do not inflate are the zTOC's fault: no second request, nothing marked."""
    spoiled = bytearray(made.ztoc.checkpoints)
    at = next(
        at
        for at in range(_HEADER_BYTES + 2 * RECORD_BYTES + 16, len(spoiled), RECORD_BYTES)
        if spoiled[at] not in {0, 7}
    )
    spoiled[at] += 1  # in which bit of its first byte the span starts
    content = encode_ztoc(replace(made.ztoc, checkpoints=bytes(spoiled)))
    bad = replace(made, ztoc_bytes=content, ztoc_digest=sha256_digest(content))
    name = await push_layer(registry, bad)
    proxy.reset()
    bad.put(tmp_path)
    async with fetching(tmp_path) as one:
        with pytest.raises((InvalidGzip, Mismatch), match="zTOC"):
            await whole(one, f"{proxy.address}/{name}:1", bad)
        assert proxy.counts.get == 1
        assert len(one.told(FetchFailed)) == 1


@pytest.mark.parametrize(
    ("fault", "error"), [(Status(404), NotFound), (Status(403), SociError), (Drop(), Unavailable)], ids=repr
)
async def test_a_registry_that_cannot(
    tmp_path: Path, proxy: Proxy, reference: str, made: Made, fault: Status | Drop, error: type[SociError]
) -> None:
    """Its error is raised and told, and the next ask tries anew."""
    made.put(tmp_path)
    proxy.hook = always(fault)
    settings = replace(PATIENCE, range_deadline=0.5)
    async with fetching(tmp_path, settings=settings) as one:
        with pytest.raises(error):
            await whole(one, reference, made)
        assert len(one.told(FetchFailed)) == 1
        assert check(one.store, made) == []
        proxy.hook = None
        await one.spans.fetch(spans_of(reference, made, 0, 0), CONTEXT)
        assert check(one.store, made) == [0]
    assert issubclass(RegistryUnavailable, Unavailable)


async def test_who_wants_the_same_spans_shares_a_request(
    tmp_path: Path, proxy: Proxy, gate: Gate, reference: str, made: Made
) -> None:
    """Spans under way are not asked for again; the rest of an ask is."""
    made.put(tmp_path)
    async with fetching(tmp_path) as one, asyncio.TaskGroup() as group:
        wide = group.create_task(one.spans.fetch(spans_of(reference, made, 2, 6), CONTEXT))
        await until(lambda: gate.waiting, "the request under way")
        same = group.create_task(one.spans.fetch(spans_of(reference, made, 2, 6), CONTEXT))
        inside = group.create_task(one.spans.fetch(spans_of(reference, made, 4, 4), CONTEXT))
        across = group.create_task(one.spans.fetch(spans_of(reference, made, 5, 8), CONTEXT))
        await until(lambda: len(one.spans._wants) == 7, "all asks heard")
        gate.open.set()
    assert [task.result().requests for task in (wide, same, inside, across)] == [1, 0, 0, 1]
    assert proxy.counts.get == 2
    assert check(one.store, made) == [2, 3, 4, 5, 6, 7, 8]
    assert one.spans._wants == {}


async def test_an_asker_that_gives_up_does_not_harm_the_others(
    tmp_path: Path, proxy: Proxy, gate: Gate, reference: str, made: Made
) -> None:
    """Even the one who began: the request goes on, and who joined it gets the bytes."""
    made.put(tmp_path)
    async with fetching(tmp_path) as one:
        begun = asyncio.ensure_future(one.spans.fetch(spans_of(reference, made, 2, 6), CONTEXT))
        await until(lambda: gate.waiting, "the request under way")
        joined = asyncio.ensure_future(one.spans.fetch(spans_of(reference, made, 3, 4), Context(None, LIMIT)))
        await asyncio.sleep(0)
        begun.cancel()
        with pytest.raises(asyncio.CancelledError):
            await begun
        gate.open.set()
        assert (await joined).requests == 0
        assert check(one.store, made) == [2, 3, 4, 5, 6]
        assert proxy.counts.get == 1


async def test_what_everybody_gave_up_still_arrives(tmp_path: Path, gate: Gate, reference: str, made: Made) -> None:
    """A slow link's bytes are not thrown away because a reader's time was over: the next try finds them."""
    made.put(tmp_path)
    async with fetching(tmp_path) as one:
        begun = asyncio.ensure_future(one.spans.fetch(spans_of(reference, made, 2, 6), CONTEXT))
        await until(lambda: gate.waiting, "the request under way")
        begun.cancel()
        gate.open.set()
        await until(lambda: check(one.store, made) == [2, 3, 4, 5, 6], "the spans")


async def test_all_who_share_a_failure_are_told(tmp_path: Path, proxy: Proxy, reference: str, made: Made) -> None:
    """One request fails, each of its askers gets the same class of error, and no future is left unread."""
    made.put(tmp_path)
    gate = Gate()

    def hook(seen: Seen) -> Status | None:
        gate(seen)
        return Status(404) if seen.is_blob else None

    proxy.hook = hook
    async with fetching(tmp_path) as one:
        asks = [asyncio.ensure_future(one.spans.fetch(spans_of(reference, made, 1, 2), CONTEXT)) for _ in range(3)]
        await until(lambda: gate.waiting, "the request under way")
        gate.open.set()
        for error in await asyncio.gather(*asks, return_exceptions=True):
            assert type(error) is NotFound


async def test_readers_go_past_read_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate, reference: str, made: Made
) -> None:
    """However much is read ahead, some requests are left for who waits."""
    made.put(tmp_path)
    monkeypatch.setattr(schedule, "RUN_BYTES", 140_000)
    async with fetching(tmp_path) as one, asyncio.TaskGroup() as group:
        group.create_task(one.spans.fetch(spans_of(reference, made, 0, 11, "read-ahead"), CONTEXT))
        await until(
            lambda: len(one.spans._flights) == schedule.RUNS_AT_ONCE and gate.waiting, "as much read-ahead as may be"
        )
        group.create_task(one.spans.fetch(spans_of(reference, made, 15, 15), CONTEXT))
        await until(lambda: len(one.spans._flights) > schedule.RUNS_AT_ONCE, "the reader's request")
        gate.open.set()
    assert check(one.store, made) == [*range(12), 15]


async def test_two_fetchers_of_one_cache(tmp_path: Path, reference: str, made: Made, count: int) -> None:
    """Both may fill the same spans at the same time: every byte is right, and each sees the other's work."""
    made.put(tmp_path)
    async with fetching(tmp_path) as one, fetching(tmp_path) as two:
        await asyncio.gather(
            *(
                one.spans.fetch(spans_of(reference, made, i, min(i + 4, count - 1)), CONTEXT)
                for i in range(0, count, 3)
            ),
            *(
                two.spans.fetch(spans_of(reference, made, i, min(i + 4, count - 1)), CONTEXT)
                for i in range(1, count, 3)
            ),
        )
        assert check(one.store, made) == list(range(count))
        assert (await whole(two, reference, made)).requests == 0


@pytest.mark.parametrize(("start", "end"), [(-1, 0), (0, -1), (5, 4), (0, 1000), (1000, 1000), (0, 1 << 40)])
async def test_spans_that_are_none(
    tmp_path: Path, proxy: Proxy, reference: str, made: Made, start: int, end: int
) -> None:
    """They are refused before anything is asked for."""
    made.put(tmp_path)
    async with fetching(tmp_path) as one:
        with pytest.raises(InvalidInput):
            await one.spans.fetch(spans_of(reference, made, start, end), CONTEXT)
    assert proxy.counts.requests == 0


async def test_a_layer_that_is_not_prepared(tmp_path: Path, reference: str, made: Made) -> None:
    """`NotFound`: the one who asks must prepare it first."""
    async with fetching(tmp_path) as one:
        with pytest.raises(NotFound):
            await whole(one, reference, made)


async def test_a_layer_that_was_made_anew(tmp_path: Path, reference: str, made: Made) -> None:
    """An open layer whose folder was deleted is opened again: bytes go where readers look."""
    made.put(tmp_path)
    async with fetching(tmp_path) as one:
        await one.spans.fetch(spans_of(reference, made, 0, 1), CONTEXT)
        shutil.rmtree(one.store.directory(made.layer, made.ztoc_digest))
        made.put(tmp_path)
        await one.spans.fetch(spans_of(reference, made, 1, 2), CONTEXT)
        assert check(one.store, made) == [1, 2]
        assert one.spans.layers.old == []


async def test_a_layer_made_anew_while_spans_are_on_their_way(
    tmp_path: Path, gate: Gate, reference: str, made: Made
) -> None:
    """Who waits for spans of the old files is told so; the next ask fills the new ones."""
    made.put(tmp_path)
    async with fetching(tmp_path) as one:
        waiting = asyncio.ensure_future(one.spans.fetch(spans_of(reference, made, 0, 3), CONTEXT))
        await until(lambda: gate.waiting, "the request under way")
        shutil.rmtree(one.store.directory(made.layer, made.ztoc_digest))
        made.put(tmp_path)
        again = asyncio.ensure_future(one.spans.fetch(spans_of(reference, made, 2, 5), CONTEXT))
        with pytest.raises(Unavailable, match="made anew"):
            await waiting
        gate.open.set()
        await again
        assert check(one.store, made) == [2, 3, 4, 5]
        await until(lambda: not one.spans._flights and not one.spans.layers.old, "the old files closed")
        assert one.spans._wants == {}


async def test_spans_ahead_are_brought_and_not_waited_for(
    tmp_path: Path, proxy: Proxy, reference: str, made: Made, count: int
) -> None:
    """An ask is answered once its own spans are here; those behind them follow, in the same request where they may."""
    made.put(tmp_path)
    async with fetching(tmp_path) as one:
        ask = replace(spans_of(reference, made, 3, 3), ahead=2)
        assert (await one.spans.fetch(ask, CONTEXT)).requests == 1
        await until(lambda: check(one.store, made) == [3, 4, 5], "the spans ahead")
        assert proxy.counts.get == 1
        beyond = replace(spans_of(reference, made, count - 1, count - 1), ahead=1000)
        await one.spans.fetch(beyond, CONTEXT)
        for ahead in (-1, 5000):
            with pytest.raises(InvalidInput):
                await one.spans.fetch(replace(ask, ahead=ahead), CONTEXT)


async def test_a_miss_does_not_wait_for_read_ahead_that_has_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: Proxy, reference: str, made: Made
) -> None:
    """It leaves the queue at once, as a request of its own; the rest of the read-ahead follows, nothing twice."""
    made.put(tmp_path)
    monkeypatch.setattr(schedule, "REQUESTS", (4, 1, 1, 1))
    monkeypatch.setattr(schedule, "RUN_BYTES", 300_000)
    monkeypatch.setattr(schedule, "JOINS", 0)
    asked: list[str] = []

    def hook(seen: Seen) -> Delay | None:
        if seen.is_blob:
            asked.append(seen.range)
        return Delay(0.3)

    proxy.hook = hook
    async with fetching(tmp_path) as one, asyncio.TaskGroup() as group:
        group.create_task(one.spans.fetch(spans_of(reference, made, 0, 12, "read-ahead"), CONTEXT))
        await until(lambda: asked, "the first read-ahead")
        await one.spans.fetch(spans_of(reference, made, 9, 9), CONTEXT)
    assert asked[1].startswith(f"bytes={Spans.of(made.ztoc).compressed(9)[0]}-")
    arrived = [span for event in one.told(SpansArrived) for span in range(event.first, event.last + 1)]
    assert sorted(arrived) == list(range(13))


async def test_open_layers_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: str, proxy: Proxy
) -> None:
    """The one unused for longest is closed; it serves again when it is asked for."""
    monkeypatch.setattr(opened, "OPEN_LAYERS", 2)
    layers = [make(everything()[:3], span_size=size << 14) for size in (1, 2, 4, 8)]
    async with fetching(tmp_path) as one:
        for made in [*layers, layers[0]]:
            made.put(tmp_path)
            name = await push_layer(registry, made)
            await one.spans.fetch(spans_of(f"{proxy.address}/{name}:1", made, 0, 0), CONTEXT)
            assert len(one.spans.layers.open) <= 2
        assert [Digest(key[1]) for key in one.spans.layers.open] == [layers[3].ztoc_digest, layers[0].ztoc_digest]
