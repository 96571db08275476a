# SPDX-License-Identifier: Apache-2.0
"""Work that several wait for: nobody's giving up harms another, nothing is left behind."""

from __future__ import annotations

import asyncio
import threading

import pytest

from soci.errors import DeadlineExceeded, Mismatch, Unavailable
from soci_runtime import flights as module
from soci_runtime.flights import Flights, in_thread, join
from support.bus import LIMIT


async def test_all_who_wait_get_the_result() -> None:
    """One piece of work, one result, also for who comes when it is done."""
    begun: list[int] = []

    async def work() -> int:
        begun.append(1)
        await asyncio.sleep(0)
        return 7

    async with Flights() as flights:
        flight = flights.start("x", work())
        assert list(await asyncio.gather(join(flight), join(flight))) == [7, 7]
        assert await join(flight) == 7
    assert begun == [1]


@pytest.mark.parametrize("error", [Mismatch("wrong"), ZeroDivisionError("defect"), TimeoutError("its own")], ids=repr)
async def test_all_who_wait_get_the_error(error: Exception) -> None:
    """As what it is; other flights go on, and one that nobody waits for complains nowhere."""

    async def bad() -> None:
        raise error

    async def good() -> int:
        await release.wait()
        return 1

    release = asyncio.Event()
    async with Flights() as flights:
        other = flights.start("good", good())
        flight = flights.start("bad", bad())
        flights.start("bad, and nobody waits", bad())
        for found in await asyncio.gather(join(flight), join(flight), return_exceptions=True):
            assert found is error
        release.set()
        assert await join(other) == 1


async def test_giving_up_leaves_the_work_to_the_others() -> None:
    """A cancelled waiter, even the one who began, takes nothing with it."""
    release = asyncio.Event()

    async def work() -> int:
        await release.wait()
        return 7

    async with Flights() as flights:
        flight = flights.start("x", work())
        impatient, patient = asyncio.ensure_future(join(flight)), asyncio.ensure_future(join(flight))
        await asyncio.sleep(0)
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        release.set()
        assert await patient == 7


@pytest.mark.parametrize("begun", [True, False])
async def test_the_end_tells_who_waits(*, begun: bool) -> None:
    """Work under way is ended with the group, begun or not, and who waits for it is told."""

    async def work() -> None:
        await asyncio.Event().wait()

    async with Flights() as flights:
        waiting = asyncio.ensure_future(join(flights.start("span 3", work())))
        if begun:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="span 3 was given up"):
        await waiting


async def test_an_error_inside_comes_out_as_itself() -> None:
    """The block's own exception is not wrapped."""

    async def block() -> None:
        async with Flights() as flights:
            flights.start("x", asyncio.sleep(LIMIT * 10))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await block()


async def test_work_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What never ends is ended."""
    monkeypatch.setattr(module, "FLIGHT_LIMIT", 0.05)
    async with Flights() as flights:
        with pytest.raises(DeadlineExceeded, match=r"x took longer than 0\.05 s"):
            await join(flights.start("x", asyncio.sleep(LIMIT * 10)))


async def test_a_thread_is_waited_for() -> None:
    """Cancelling it waits for its end: it may use what is closed behind it."""
    begun, release, done = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert release.wait(LIMIT)
        done.set()
        raise ZeroDivisionError  # told to nobody

    waiting = asyncio.ensure_future(in_thread(work))
    await asyncio.to_thread(begun.wait, LIMIT)
    waiting.cancel()
    await asyncio.sleep(0)
    assert not waiting.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert done.is_set()


async def test_a_thread_gives_result_or_error() -> None:
    """As a plain call would."""
    assert await in_thread(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await in_thread(divmod, 7, 0)
