# SPDX-License-Identifier: Apache-2.0
"""Single flight, retries and deadlines of span fetches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci.errors import DeadlineExceeded, Mismatch, RegistryUnavailable, SociError, Unavailable
from soci_mounter import flights as module
from soci_mounter.flights import AHEAD_FLIGHTS, MISS, READ_AHEAD, Flights, Want, runs


class Layer:
    """Which spans are here, and a fetcher that the test drives."""

    def __init__(self, count: int = 100) -> None:
        self.here = [False] * count
        self.wants: list[Want] = []
        self.troubles: list[BaseException] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.fail: Callable[[Want], SociError | None] = lambda _want: None

    def missing(self, spans: range) -> list[int]:
        return [span for span in spans if not self.here[span]]

    async def fetch(self, want: Want) -> None:
        self.wants.append(want)
        await self.gate.wait()
        if error := self.fail(want):
            raise error
        for span in range(want.first, want.last + 1):
            self.here[span] = True


@asynccontextmanager
async def layer_and_flights() -> AsyncIterator[tuple[Layer, Flights]]:
    layer = Layer()
    flights = Flights(layer, layer.fetch, lambda _what, error: layer.troubles.append(error))
    try:
        yield layer, flights
    finally:
        await flights.close()


def soon(seconds: float = 30.0) -> float:
    return asyncio.get_running_loop().time() + seconds


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.004)


@given(st.sets(st.integers(0, 60)))
def test_runs_hold_each_span_once(spans: set[int]) -> None:
    """Runs name exactly the given spans, in order, and no two runs touch."""
    found = runs(sorted(spans))
    assert [span for first, last in found for span in range(first, last + 1)] == sorted(spans)
    assert all(before[1] + 1 < after[0] for before, after in pairwise(found))


async def test_many_readers_of_one_span_share_one_fetch() -> None:
    """However many readers want a span, it is asked for once while the ask is under way."""
    async with layer_and_flights() as (layer, flights):
        layer.gate.clear()
        readers = [asyncio.create_task(flights.need(range(3, 5), soon())) for _ in range(50)]
        late = asyncio.create_task(flights.need(range(4, 7), soon()))
        await asyncio.sleep(0.01)
        layer.gate.set()
        await asyncio.gather(*readers, late)
        assert [(want.first, want.last) for want in layer.wants] == [(3, 4), (5, 6)]


async def test_spans_that_are_here_ask_nobody() -> None:
    """A read of present spans makes no fetch, and one with a hole in the middle asks for the hole alone."""
    async with layer_and_flights() as (layer, flights):
        layer.here[0:3] = [True, False, True]
        await flights.need(range(1), soon())
        assert layer.wants == []
        await flights.need(range(3), soon())
        assert [(want.first, want.last, want.why) for want in layer.wants] == [(1, 1, MISS)]


async def test_cancelling_one_reader_leaves_the_fetch_to_the_others() -> None:
    """The reader that began the fetch may go; who waits with it still gets the span, with no second ask."""
    async with layer_and_flights() as (layer, flights):
        layer.gate.clear()
        first = asyncio.create_task(flights.need(range(1), soon()))
        await asyncio.sleep(0)
        second = asyncio.create_task(flights.need(range(1), soon()))
        await asyncio.sleep(0.01)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        layer.gate.set()
        await second
        assert len(layer.wants) == 1


@pytest.mark.parametrize("error", [RegistryUnavailable("away"), Mismatch("other bytes"), SociError("odd")])
async def test_every_kind_of_error_is_tried_again(error: SociError) -> None:
    """A span that fails a few times, in whatever way, comes in the end, and each failure is told."""
    async with layer_and_flights() as (layer, flights):
        layer.fail = lambda want: error if want.attempt < 3 else None
        await flights.need(range(1), soon())
        assert [want.attempt for want in layer.wants] == [0, 1, 2, 3]
        assert layer.troubles == [error] * 3


async def test_the_deadline_ends_a_read_with_the_last_error() -> None:
    """A reader whose bytes cannot be had fails at its deadline with what went wrong last, and not before."""
    async with layer_and_flights() as (layer, flights):
        layer.fail = lambda _want: RegistryUnavailable("away")
        deadline = soon(0.05)
        with pytest.raises(RegistryUnavailable):
            await flights.need(range(1), deadline)
        assert asyncio.get_running_loop().time() >= deadline
        assert len(layer.wants) > 1


async def test_a_fetch_that_never_ends_does_not_hold_a_reader_beyond_its_deadline() -> None:
    """With a fetcher that does not answer, the reader gets `DeadlineExceeded`."""
    async with layer_and_flights() as (layer, flights):
        layer.gate.clear()
        with pytest.raises(DeadlineExceeded):
            await flights.need(range(1), soon(0.05))


async def test_an_ask_that_gets_no_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetcher that was killed under an ask costs one ask's time, not the read."""
    monkeypatch.setattr(module, "ASK_TIMEOUT", 0.02)
    async with layer_and_flights() as (layer, flights):
        layer.gate.clear()

        async def fetch(want: Want) -> None:
            if want.attempt == 1:
                layer.gate.set()
            await layer.fetch(want)

        flights._fetch = fetch
        await flights.need(range(1), soon())
        assert [want.attempt for want in layer.wants] == [0, 1]


async def test_failure_is_not_remembered() -> None:
    """After a read that failed at its deadline, the next one succeeds as soon as the cause is gone."""
    async with layer_and_flights() as (layer, flights):
        layer.fail = lambda _want: Mismatch("other bytes")
        with pytest.raises(Mismatch):
            await flights.need(range(1), soon(0.02))
        layer.fail = lambda _want: None
        await flights.need(range(1), soon())


async def test_a_late_reader_keeps_a_failing_fetch_going() -> None:
    """A flight goes on until the latest deadline of those who wait for it."""
    async with layer_and_flights() as (layer, flights):
        layer.fail = lambda _want: RegistryUnavailable("away")
        short = asyncio.create_task(flights.need(range(1), soon(0.03)))
        patient = asyncio.create_task(flights.need(range(1), soon()))
        with pytest.raises(RegistryUnavailable):
            await short
        layer.fail = lambda _want: None
        await patient


async def test_a_fetcher_that_lies_is_not_believed() -> None:
    """Success without the span being here counts as a failure."""
    async with layer_and_flights() as (layer, flights):

        async def lie(_want: Want) -> None:
            pass

        flights._fetch = lie
        with pytest.raises(Unavailable, match="not here"):
            await flights.need(range(1), soon(0.02))
        assert layer.troubles


async def test_a_defect_of_the_fetching_code_reaches_readers_as_an_error() -> None:
    """Even a foreign exception becomes a `SociError`, at the deadline."""
    async with layer_and_flights() as (layer, flights):

        def defect(_want: Want) -> SociError | None:
            raise ZeroDivisionError

        layer.fail = defect
        with pytest.raises(Unavailable, match="ZeroDivisionError"):
            await flights.need(range(1), soon(0.02))


async def test_read_ahead_is_bounded_and_gives_way() -> None:
    """At most so many asks for read-ahead are under way; who needs one of its spans says so, once, and waits."""
    async with layer_and_flights() as (layer, flights):
        layer.gate.clear()
        begun = [flights.ahead(range(4 * i, 4 * i + 4), soon()) for i in range(AHEAD_FLIGHTS + 2)]
        await asyncio.sleep(0)
        assert begun == [True] * AHEAD_FLIGHTS + [False] * 2
        assert [(want.first, want.last, want.why) for want in layer.wants] == [
            (4 * i, 4 * i + 3, READ_AHEAD) for i in range(AHEAD_FLIGHTS)
        ]
        readers = [asyncio.create_task(flights.need(range(1, 3), soon())) for _ in range(3)]
        await asyncio.sleep(0.01)
        assert [(want.first, want.last, want.why) for want in layer.wants[AHEAD_FLIGHTS:]] == [(1, 2, MISS)]
        assert flights.ahead(range(4), soon())  # all of it is under way
        layer.gate.set()
        await asyncio.gather(*readers)
        assert len(layer.wants) == AHEAD_FLIGHTS + 1
        await asyncio.sleep(0.01)
        assert flights.ahead(range(90, 100), soon())
        await asyncio.sleep(0.01)
        assert all(layer.here[90:100])


async def test_an_ask_says_what_the_file_goes_on_to() -> None:
    """The spans behind a miss are named in its ask, where it reaches them, and nobody waits for them."""
    async with layer_and_flights() as (layer, flights):
        layer.here[4] = True
        flights.begin(range(2, 8), soon(), None, 5)
        await flights.need(range(2, 8), soon())
        assert [(want.first, want.last, want.ahead) for want in layer.wants] == [(2, 3, 0), (5, 7, 5)]


async def test_a_failed_read_ahead_is_left_alone_until_somebody_needs_it() -> None:
    """Read-ahead is tried once; a reader that waited for it starts a fetch of its own."""
    async with layer_and_flights() as (layer, flights):
        layer.fail = lambda want: RegistryUnavailable("away") if want.why == READ_AHEAD else None
        flights.ahead(range(2), soon())
        await asyncio.sleep(0.02)
        assert len(layer.wants) == 1
        flights.ahead(range(2), soon())
        await flights.need(range(2), soon())
        assert [want.why for want in layer.wants] == [READ_AHEAD, READ_AHEAD, MISS]


async def test_closing_ends_all_waiting() -> None:
    """When a layer is unmounted its readers fail at once, and later ones too."""
    async with layer_and_flights() as (layer, flights):
        layer.gate.clear()
        reader = asyncio.create_task(flights.need(range(1), soon()))
        await asyncio.sleep(0.01)
        await flights.close()
        with pytest.raises(Unavailable):
            await reader
        with pytest.raises(Unavailable):
            await flights.need(range(1), soon())
