# SPDX-License-Identifier: Apache-2.0
"""Background fill, from a real registry through a proxy that counts and holds back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from soci.span import Spans
from soci_bus.asks import UsedLayer
from soci_bus.events import SpansArrived
from soci_cache.presence import FILLED, HEADER
from soci_dev.faults import Delay, Seen, Status, always
from soci_dev.proxy import Proxy
from soci_fetcher import fill, pace, schedule
from soci_fetcher.fill import Filler
from support.bus import LIMIT, until
from support.fetching import CONTEXT, PATIENCE, Fetching, check, fetching, push_layer, spans_of
from support.images import noise
from support.mounter_layers import Made, everything, item, make

SILENCE = 0.05
PLENTY = 1 << 40


@pytest.fixture(scope="module")
def made() -> Made:
    """A gzip layer of some twenty spans."""
    return make([*everything(), item("text", noise(9, 2_000_000))], span_size=1 << 17)


@pytest.fixture
async def reference(registry: str, proxy: Proxy, made: Made) -> str:
    """The layer in the registry, seen through the proxy, whose counts are at zero."""
    name = await push_layer(registry, made)
    proxy.reset()
    return f"{proxy.address}/{name}:1"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small steps, short waits, and no link so quick that a fill is let through before a miss."""
    for name in ("PERIOD", "FULL_PERIOD", "FIRST_PAUSE"):
        monkeypatch.setattr(fill, name, 0.01)
    monkeypatch.setattr(pace, "MOST", 400_000)
    monkeypatch.setattr(pace, "STEP", 100_000)
    monkeypatch.setattr(schedule, "TAIL", -1.0)


class Log:
    """A hook: first byte of each range in order; the first request is held back for ``hold`` seconds, others a bit."""

    def __init__(self) -> None:
        self.ranges: list[int] = []
        self.hold = 0.0

    def __call__(self, seen: Seen) -> Delay | None:
        if not (seen.is_blob and seen.range):
            return None
        self.ranges.append(int(seen.range.removeprefix("bytes=").partition("-")[0]))
        return Delay(self.hold if len(self.ranges) == 1 else 3 * fill.LOOK)


@pytest.fixture
def log(proxy: Proxy) -> Log:
    proxy.hook = found = Log()
    return found


@asynccontextmanager
async def filling(
    one: Fetching, reference: str, made: Made, *, room: int = PLENTY, silence: float = SILENCE
) -> AsyncIterator[None]:
    """The layer is in use, and a filler at work."""

    async def in_use() -> tuple[UsedLayer, ...]:
        return (UsedLayer(reference, made.layer, made.ztoc_digest, len(made.ztoc_bytes)),)

    assert one.quiet is not None
    filler = Filler(one.spans, one.quiet, in_use, lambda: room, silence=silence)
    filler._pace = pace.Pace(300_000)
    work = asyncio.create_task(filler.run())
    try:
        yield
    finally:
        work.cancel()
        await asyncio.wait([work])


def whole(one: Fetching, made: Made) -> bool:
    """Is all of the layer here?"""
    return check(one.store, made) == list(range(len(made.ztoc.span_digests)))


async def test_an_idle_node_completes_its_layers(tmp_path: Path, proxy: Proxy, reference: str, made: Made) -> None:
    """What no read needed is brought in the background, once, in few requests, and marked so."""
    made.put(tmp_path)
    async with fetching(tmp_path) as one:
        await one.spans.fetch(spans_of(reference, made, 3, 4), CONTEXT)
        async with filling(one, reference, made):
            await until(lambda: whole(one, made), "a whole layer")
        marks = (one.store.directory(made.layer, made.ztoc_digest) / "spans").read_bytes()[HEADER:]
        assert [span for span, mark in enumerate(marks) if mark != FILLED] == [3, 4]
        geometry = Spans.of(made.ztoc)
        doubled = 8 * geometry.count  # neighbours may share a byte, which two requests then bring
        assert proxy.counts.blob_bytes <= made.ztoc.compressed_size + doubled
        assert {event.why for event in one.told(SpansArrived)} == {"miss", "fill"}
        assert proxy.counts.get <= geometry.count // 2


async def test_nothing_is_filled_while_a_reader_waits(tmp_path: Path, log: Log, reference: str, made: Made) -> None:
    """A reader at any fetcher of the node keeps all of them from filling, until he has his bytes."""
    made.put(tmp_path)
    log.hold = 20 * SILENCE
    async with fetching(tmp_path) as one, fetching(tmp_path) as other:
        reading = asyncio.create_task(other.spans.fetch(spans_of(reference, made, 7, 7), CONTEXT))
        await until(lambda: log.ranges, "the reader's request")
        async with filling(one, reference, made):
            await reading
            assert len(log.ranges) == 1
            await until(lambda: whole(one, made), "a whole layer")


async def test_fill_waits_for_silence(tmp_path: Path, log: Log, reference: str, made: Made) -> None:
    """It begins neither at the start nor after a reader before the node was quiet for as long as it is told."""
    made.put(tmp_path)
    async with fetching(tmp_path) as one, filling(one, reference, made, silence=LIMIT):
        await asyncio.sleep(3 * SILENCE)
        await one.spans.fetch(spans_of(reference, made, 3, 3), CONTEXT)
        await asyncio.sleep(3 * SILENCE)
        assert len(log.ranges) == 1


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same fetcher", "another one"])
async def test_a_miss_goes_before_fill(
    tmp_path: Path, log: Log, reference: str, made: Made, *, elsewhere: bool
) -> None:
    """A miss while the layer is filled is asked for before any further fill, and the fill under way is cut off."""
    made.put(tmp_path)
    geometry = Spans.of(made.ztoc)
    log.hold = 2 * LIMIT
    calm = replace(PATIENCE, header_timeout=2 * LIMIT, range_deadline=2 * LIMIT)  # the cut alone ends it
    async with (
        fetching(tmp_path, settings=calm) as one,
        fetching(tmp_path) as two,
        filling(one, reference, made),
    ):
        await until(lambda: log.ranges, "the first fill")
        reader = two if elsewhere else one
        last = geometry.count - 1
        reading = asyncio.create_task(reader.spans.fetch(spans_of(reference, made, last, last), CONTEXT))
        await until(lambda: len(log.ranges) > 1, "the reader's request")
        await until(lambda: not [flight for flight in one.spans._flights if flight.lead.rank], "no fill under way")
        await reading
        assert log.ranges[1] == geometry.compressed(last)[0]
        await until(lambda: whole(one, made), "a whole layer")


async def test_a_miss_takes_over_what_is_being_filled(
    tmp_path: Path, proxy: Proxy, log: Log, reference: str, made: Made
) -> None:
    """A reader who comes for spans that a fill is bringing waits for it: nothing is fetched twice."""
    made.put(tmp_path)
    log.hold = 10 * fill.LOOK
    async with fetching(tmp_path) as one:
        async with filling(one, reference, made):
            await until(lambda: log.ranges, "the first fill")
            reading = asyncio.create_task(one.spans.fetch(spans_of(reference, made, 0, 0), CONTEXT))
            await reading
            assert len(log.ranges) == 1
            await until(lambda: whole(one, made), "a whole layer")
        assert log.ranges.count(log.ranges[0]) == 1
        assert proxy.counts.blob_bytes <= made.ztoc.compressed_size + 8 * len(made.ztoc.span_digests)


async def test_no_room_no_fill(tmp_path: Path, log: Log, reference: str, made: Made) -> None:
    """What the cache has no room for is not fetched; what readers want still is."""
    made.put(tmp_path)
    async with fetching(tmp_path) as one, filling(one, reference, made, room=0):
        await asyncio.sleep(5 * SILENCE)
        assert log.ranges == []
        await one.spans.fetch(spans_of(reference, made, 3, 3), CONTEXT)
        await asyncio.sleep(5 * SILENCE)
        assert len(log.ranges) == 1


async def test_a_registry_that_is_away_is_tried_later(
    tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, reference: str, made: Made
) -> None:
    """Errors end no filler: it goes on when the registry is back."""
    monkeypatch.setattr(fill, "LONGEST_PAUSE", 0.05)
    made.put(tmp_path)
    proxy.hook = always(Status(403))
    async with fetching(tmp_path) as one, filling(one, reference, made):
        await until(lambda: proxy.counts.get > 1, "tries in vain")
        proxy.hook = None
        await until(lambda: whole(one, made), "a whole layer")


async def test_one_fetcher_of_a_node_fills(tmp_path: Path, log: Log, reference: str, made: Made) -> None:
    """While one is at it, the others let it."""
    made.put(tmp_path)
    log.hold = 10 * SILENCE
    async with fetching(tmp_path) as one, fetching(tmp_path) as two:
        async with filling(one, reference, made), filling(two, reference, made):
            await until(lambda: log.ranges, "the first fill")
            await asyncio.sleep(5 * SILENCE)
            assert len(log.ranges) == 1
            await until(lambda: whole(one, made), "a whole layer")
        assert not (one.told(SpansArrived) and two.told(SpansArrived))
