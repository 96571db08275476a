# SPDX-License-Identifier: Apache-2.0
"""Work that several askers wait for, and that goes on when one of them gives up.

An asker that was cancelled or whose time is over must not take the answer from the others, nor throw away bytes that
are on their way: the next ask finds them here. So each piece of work is a task of its own, in one task group that
ends with the process, and every one has a limit.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, ParamSpec, Self, TypeVar

from soci.errors import DeadlineExceeded, SociError, Unavailable

FLIGHT_LIMIT = 300.0
"""Seconds of one piece of work, whoever waits for it: the longest that an ask may take. What is known to be
long may have more: those who ask again find it under way."""

T = TypeVar("T")
P = ParamSpec("P")


class Flights:
    """The task group; a context manager. Leaving it ends what is under way, and who waits gets `Unavailable`."""

    def __init__(self) -> None:
        self._group = asyncio.TaskGroup()
        self._tasks: set[asyncio.Task[None]] = set()
        self.ending = False  # nothing more should begin

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.ending = True
        for task in self._tasks:
            task.cancel()
        await self._group.__aexit__(None, None, None)

    def start(self, what: str, work: Coroutine[Any, Any, T], longer: float = 0.0) -> asyncio.Future[T]:
        """Begin ``work``; the future has its result or error. Wait for it only with `join`.

        ``longer`` are seconds beyond `FLIGHT_LIMIT`, for what is known to be long.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not future.done():  # cancelled before it began
                work.close()
                _fail(future, _given_up(what))

        task = self._group.create_task(_fly(what, work, future, FLIGHT_LIMIT + longer))
        self._tasks.add(task)
        task.add_done_callback(ended)
        return future


async def join(future: asyncio.Future[T]) -> T:
    """Wait for a flight; cancelling the wait leaves the flight alone."""
    return await asyncio.shield(future)


async def _fly(what: str, work: Coroutine[Any, Any, T], future: asyncio.Future[T], seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds) as limit:
            result = await work
    except asyncio.CancelledError:
        _fail(future, _given_up(what))
        raise
    except Exception as error:  # noqa: BLE001  it is raised to those who wait
        late = DeadlineExceeded(f"{what} took longer than {seconds:g} s")
        _fail(future, late if limit.expired() else error)
    else:
        future.set_result(result)


def _given_up(what: str) -> Unavailable:
    return Unavailable(f"{what} was given up: the service is going down")


def _fail(future: asyncio.Future[T], error: Exception) -> None:
    future.set_exception(error)
    future.exception()  # seen, even where nobody waits any more


async def in_thread(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """As `asyncio.to_thread`, but cancelling it waits for the thread: it may use files that are closed behind us."""
    loop = asyncio.get_running_loop()
    work = loop.run_in_executor(None, lambda: function(*args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        work.exception()  # seen: nobody wants to know any more
        raise


async def in_stoppable_thread(work: Callable[[Callable[[], bool]], T]) -> T:
    """Run ``work`` in a thread. It is given a function that is true once the wait was cancelled: it is to end soon
    then, and has ended before the cancelling goes on, so that nothing writes behind us.
    """
    stop = threading.Event()
    working = asyncio.ensure_future(asyncio.to_thread(work, stop.is_set))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        stop.set()
        with suppress(SociError):
            await working
        raise
