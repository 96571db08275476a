# SPDX-License-Identifier: Apache-2.0
"""What every bus does, asked of both: the one in memory and the one over a real NATS."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from soci import errors
from soci.launch import TraceParent
from soci_bus import asks, events
from soci_bus.face import Bus, Context
from soci_bus.memory import MemoryBus
from soci_bus.nats import NatsBus, connect
from soci_bus.wire import MESSAGE_LIMIT, Envelope
from support.bus import D1, D2, LAUNCH, LIMIT, until

Two = Callable[[], AbstractAsyncContextManager[tuple[Bus, Bus]]]
ASK = asks.FindIndex("r/a:1", D1)
FOUND = asks.IndexFound(D2, "explicit", (asks.IndexedLayer(D1, D2, 7),))


def both_have_the_face(memory: MemoryBus, nats: NatsBus) -> tuple[Bus, Bus]:
    """For the type checker: this fails to check where one of the two lacks a method or has it otherwise."""
    return memory, nats


@pytest.fixture(params=["memory", "nats"])
def two(request: pytest.FixtureRequest) -> Two:
    """Opens a bus twice, as two processes of one node would: the first is to serve, the second asks."""
    if request.param == "memory":
        return _in_memory
    url = request.getfixturevalue("nats_url")
    return lambda: _over_nats(url)


@asynccontextmanager
async def _in_memory() -> AsyncIterator[tuple[Bus, Bus]]:
    bus = MemoryBus("n1")
    yield bus, bus


@asynccontextmanager
async def _over_nats(url: str) -> AsyncIterator[tuple[Bus, Bus]]:
    node = "n" + secrets.token_hex(4)
    async with (
        connect(url, node=node, name="server", wait=LIMIT) as server,
        connect(url, node=node, name="asker", wait=LIMIT) as asker,
    ):
        yield server, asker


async def test_an_ask_is_answered(two: Two) -> None:
    """The handler gets the ask, its trace and how long the asker waits; the asker gets the answer."""
    seen: list[tuple[asks.FindIndex, Context]] = []

    async def handler(ask: asks.FindIndex, context: Context) -> asks.IndexFound:
        seen.append((ask, context))
        return FOUND

    trace = TraceParent(LAUNCH, "1" * 16)
    async with two() as (server, asker):
        await server.serve(asks.FindIndex, handler, queue="fetchers")
        assert await asker.ask(ASK, timeout=LIMIT, trace=trace) == FOUND
        assert await asker.ask(ASK, timeout=LIMIT) == FOUND
    assert seen == [(ASK, Context(trace, LIMIT)), (ASK, Context(None, LIMIT))]


@pytest.mark.parametrize("cls", errors.BY_CODE.values(), ids=lambda cls: cls.__name__)
async def test_an_error_reaches_the_asker_as_its_class(two: Two, cls: type[errors.SociError]) -> None:
    """What the handler raises is raised where it was asked, with its text."""

    async def handler(_ask: asks.FindIndex, _context: Context) -> asks.IndexFound:
        raise cls("this is why")

    async with two() as (server, asker):
        await server.serve(asks.FindIndex, handler)
        with pytest.raises(errors.SociError, match=r"^this is why$") as caught:
            await asker.ask(ASK, timeout=LIMIT)
    assert type(caught.value) is cls


@pytest.mark.parametrize("defect", [ZeroDivisionError("secret"), TimeoutError("own"), KeyError("x")], ids=repr)
async def test_a_handler_s_bug_reaches_the_asker(two: Two, defect: Exception) -> None:
    """It is a plain `SociError` that names the class; the server goes on."""

    async def handler(_ask: asks.FindIndex, _context: Context) -> asks.IndexFound:
        raise defect

    async with two() as (server, asker):
        await server.serve(asks.FindIndex, handler)
        for _ in range(2):
            with pytest.raises(errors.SociError, match=f"internal error {type(defect).__name__}") as caught:
                await asker.ask(ASK, timeout=LIMIT)
            assert type(caught.value) is errors.SociError


async def test_an_answer_that_is_too_large_is_an_error(two: Two) -> None:
    """The asker is told, not left to wait."""

    async def handler(_ask: asks.FindIndex, _context: Context) -> asks.IndexFound:
        return asks.IndexFound(D1, "x" * (1 << 20), ())

    async with two() as (server, asker):
        await server.serve(asks.FindIndex, handler)
        with pytest.raises(errors.InvalidMessage):
            await asker.ask(ASK, timeout=LIMIT)


async def test_the_largest_messages_arrive(two: Two) -> None:
    """Bodies just below the limit cross, headers and all, and the connection lives on."""
    large = asks.IndexFound(D1, "x" * (MESSAGE_LIMIT - 200), ())
    ask = asks.FindIndex("x" * (MESSAGE_LIMIT - 200), D1)

    async def handler(asked: asks.FindIndex, _context: Context) -> asks.IndexFound:
        assert asked == ask
        return large

    async with two() as (server, asker):
        await server.serve(asks.FindIndex, handler)
        for _ in range(2):
            assert await asker.ask(ask, timeout=LIMIT, trace=TraceParent(LAUNCH, "1" * 16)) == large


async def test_nobody_there(two: Two) -> None:
    """An ask that nobody serves fails at once."""
    async with two() as (_, asker):
        with pytest.raises(errors.BusUnavailable):
            await asker.ask(ASK, timeout=LIMIT)


async def test_the_deadline_passes(two: Two) -> None:
    """An answer that does not come is `DeadlineExceeded`, and the handler is ended."""
    ended = asyncio.Event()

    async def handler(_ask: asks.FindIndex, _context: Context) -> asks.IndexFound:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    async with two() as (server, asker):
        await server.serve(asks.FindIndex, handler)
        with pytest.raises(errors.DeadlineExceeded):
            await asker.ask(ASK, timeout=0.3)
        await until(ended.is_set, "the handler's end")


async def test_asks_are_answered_side_by_side(two: Two) -> None:
    """A slow answer does not hold up the next ask."""
    meet = asyncio.Barrier(3)

    async def handler(_ask: asks.FindIndex, _context: Context) -> asks.IndexFound:
        await meet.wait()
        return FOUND

    async with two() as (server, asker):
        await server.serve(asks.FindIndex, handler)
        assert await asyncio.gather(*(asker.ask(ASK, timeout=LIMIT) for _ in range(3))) == [FOUND] * 3


async def test_servers_of_one_queue_share(two: Two) -> None:
    """Each ask is answered by one of them, and none is left out for ever."""
    counts = [0, 0]

    def make(which: int) -> Callable[[asks.FindIndex, Context], asyncio.Future[asks.IndexFound]]:
        async def handler(_ask: asks.FindIndex, _context: Context) -> asks.IndexFound:
            counts[which] += 1
            return FOUND

        return handler  # type: ignore[return-value]

    async with two() as (server, asker):
        await server.serve(asks.FindIndex, make(0), queue="fetchers")
        await asker.serve(asks.FindIndex, make(1), queue="fetchers")
        for _ in range(60):
            await asker.ask(ASK, timeout=LIMIT)
    assert sum(counts) == 60
    assert all(counts)


async def _stored(bus: Bus, count: int, **which: str) -> list[Envelope]:
    async with asyncio.timeout(LIMIT):
        while len(found := [one async for one in bus.history(**which)]) < count:
            await asyncio.sleep(0.02)
    return found


async def test_events_are_read_back(two: Two) -> None:
    """Stored events come in their order with node and sequence, and each filter leaves out the others."""
    first, second = secrets.token_hex(16), secrets.token_hex(16)
    told: list[events.Event] = [
        events.FetchFailed(first, D1, "a", "b"),
        events.SpanRejected(first, D1, 3, "c"),
        events.SpanRejected(second, D1, 4, "d"),
    ]
    async with two() as (server, asker):
        for event in told:
            server.publish(event)
        kept = await _stored(asker, 2, id=first)
        assert [one.event for one in kept] == told[:2]
        assert {one.node for one in kept} == {server.node}
        assert 0 < kept[0].sequence < kept[1].sequence
        assert 0 < kept[0].at_ns <= kept[1].at_ns
        assert [one.event for one in await _stored(asker, 1, id=second)] == told[2:]
        assert [one.event for one in await _stored(asker, 1, id=first, happened="rejected")] == told[1:2]
        assert await _stored(asker, 0, noun="miss", id=first) == []
        assert await _stored(asker, 0, id=first[:-1] + "?") == []


async def test_a_long_history_is_whole(two: Two) -> None:
    """More events than come in one piece."""
    launch = secrets.token_hex(16)
    async with two() as (server, asker):
        for number in range(1203):
            server.publish(events.SpanRejected(launch, D1, number, ""))
        kept = await _stored(asker, 1203, id=launch)
        assert [one.event for one in kept] == [events.SpanRejected(launch, D1, number, "") for number in range(1203)]


async def test_history_may_be_left_early(two: Two) -> None:
    """Whoever has read enough may go; the bus works on."""
    launch = secrets.token_hex(16)
    async with two() as (server, asker):
        for number in range(3):
            server.publish(events.SpanRejected(launch, D1, number, ""))
        await _stored(asker, 3, id=launch)
        async for one in asker.history(id=launch):
            assert one.event == events.SpanRejected(launch, D1, 0, "")
            break
        assert len(await _stored(asker, 3, id=launch)) == 3


async def test_watching_shows_what_follows(two: Two) -> None:
    """Events of one id, from the beginning of the block on, and of no other."""
    mine, other = secrets.token_hex(8), secrets.token_hex(8)
    async with two() as (server, asker):
        server.publish(events.IndexBegun(mine, "before"))
        await _stored(asker, 1, id=mine)
        async with asyncio.timeout(LIMIT), asker.watching(mine) as watched:
            for number in range(3):
                server.publish(events.IndexBegun(other, "other"))
                server.publish(events.IndexBegun(mine, str(number)))
            seen = [(await anext(watched)).event for _ in range(3)]
    assert seen == [events.IndexBegun(mine, str(number)) for number in range(3)]


@pytest.mark.parametrize("early", [True, False], ids=["job first", "worker first"])
async def test_a_job_is_done_once(two: Two, *, early: bool) -> None:
    """A job is done once, whichever came first, job or worker, and though it was put there twice."""
    done: list[tuple[asks.BuildIndex, str]] = []

    async def handler(job: asks.BuildIndex, job_id: str) -> None:
        done.append((job, job_id))

    jobs = [(asks.BuildIndex(f"r/{number}:1"), secrets.token_hex(8)) for number in range(3)]
    async with two() as (server, asker):
        if not early:
            await server.work(asks.BuildIndex, handler)
        for job, job_id in jobs:
            await asker.submit(job, job_id)
            await asker.submit(job, job_id)
        if early:
            await server.work(asks.BuildIndex, handler)
        await until(lambda: len(done) >= 3, "three jobs done")
    assert done == jobs


async def test_a_job_that_fails_is_tried_again(two: Two) -> None:
    """A handler that raises gets the job again, three times in all, and then the next job."""
    tries: list[str] = []

    async def handler(_job: asks.BuildIndex, job_id: str) -> None:
        tries.append(job_id)
        if job_id == bad:
            raise ZeroDivisionError

    bad, good = secrets.token_hex(8), secrets.token_hex(8)
    async with two() as (server, asker):
        await server.work(asks.BuildIndex, handler)
        await asker.submit(asks.BuildIndex("r/a"), bad)
        await until(lambda: tries.count(bad) == 3, "three tries")
        await asker.submit(asks.BuildIndex("r/b"), good)
        await until(lambda: good in tries, "the next job")
    assert tries == [bad, bad, bad, good]
