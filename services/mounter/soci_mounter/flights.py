# SPDX-License-Identifier: Apache-2.0
"""Outstanding fetches of one layer's spans: whoever needs a span that is under way waits for the same *flight*.

Only read-ahead is not waited for: who needs its spans says so in an ask of his own, for a fetcher brings first what
readers wait for, and nothing twice.

A flight covers a run of neighbouring spans and tries until they are here or until the latest deadline of those who
wait for it has passed. Every error is tried again, whatever its kind: a registry that answers nonsense now may be
healed before the reader's time is over, and nothing of a failure is remembered after it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from soci.errors import DeadlineExceeded, SociError, Unavailable
from soci.launch import TraceParent

ASK_TIMEOUT = 5.0
"""Seconds that one ask may take; after it the spans are looked at again, and what is still absent is asked anew. A
fetcher that was killed holds its reader up for no longer than this."""
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 2.0
"""Seconds between two tries of one flight: doubled from the first to the longest, give or take `JITTER`."""
JITTER = 0.25
AHEAD_FLIGHTS = 8
"""Read-ahead flights of one layer at once; more are not started."""

MISS = "miss"
READ_AHEAD = "read-ahead"


class Spans(Protocol):
    """What says which spans are here: `soci_cache.LayerReader`."""

    def missing(self, spans: range) -> list[int]:
        """Those of ``spans`` that are absent."""
        ...


@dataclass(frozen=True, slots=True)
class Want:
    """One ask for spans ``first``..``last``, both included; ``ahead`` more behind them are wanted, and not waited for.

    ``attempt`` counts a flight's tries from 0.
    """

    first: int
    last: int
    why: str
    attempt: int
    timeout: float
    trace: TraceParent | None
    ahead: int = 0


Fetch = Callable[[Want], Awaitable[None]]
"""Have spans filled. It raises, as `SociError`, what went wrong."""
Trouble = Callable[[str, BaseException], None]
"""Told of each failed try."""


@dataclass(slots=True, eq=False)
class _Flight:
    first: int
    last: int
    why: str
    deadline: float
    trace: TraceParent | None
    ahead: int = 0
    failed: SociError | None = None  # what the newest try raised
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


def runs(spans: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending span ids as runs of neighbours, ``(first, last)``, both included."""
    found: list[tuple[int, int]] = []
    for span in spans:
        if found and found[-1][1] == span - 1:
            found[-1] = found[-1][0], span
        else:
            found.append((span, span))
    return found


class Flights:
    """All flights of one layer. Used from one event loop."""

    def __init__(self, spans: Spans, fetch: Fetch, trouble: Trouble) -> None:
        self._spans = spans
        self._fetch = fetch
        self._trouble = trouble
        self._by_span: dict[int, _Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ahead = 0
        self._closed = False

    async def need(self, wanted: range, deadline: float, trace: TraceParent | None = None) -> None:
        """Return once all of ``wanted`` are here.

        At ``deadline`` (the loop's clock) it raises what the last try raised, or `DeadlineExceeded`. Cancelling one
        waiter leaves the flight to the others.
        """
        loop = asyncio.get_running_loop()
        error: SociError | None = None
        while missing := self.begin(wanted, deadline, trace):
            left = deadline - loop.time()
            if left <= 0:
                raise error or DeadlineExceeded(f"spans {wanted.start} to {wanted.stop - 1} did not come in time")
            flights = {self._by_span[span] for span in missing}
            await asyncio.wait([flight.done for flight in flights], timeout=left)
            error = next((flight.failed for flight in flights if flight.failed), error)

    def begin(self, wanted: range, deadline: float, trace: TraceParent | None = None, ahead: int = 0) -> list[int]:
        """Have a flight under way for each absent span of ``wanted``; returns the absent spans.

        A flight for its last span asks for the ``ahead`` spans behind it, too.
        """
        if self._closed:
            raise Unavailable("the layer is being unmounted")
        missing = self._spans.missing(wanted)
        for first, last in runs(span for span in missing if not self._needed(span)):
            self._start(_Flight(first, last, MISS, deadline, trace, ahead if last == wanted[-1] else 0))
        for span in missing:
            flight = self._by_span[span]
            flight.deadline = max(flight.deadline, deadline)
        return missing

    def ahead(self, spans: range, deadline: float, trace: TraceParent | None = None) -> bool:
        """Fetch what is absent of ``spans`` in the background; one try. False where too much is under way for that."""
        missing = [span for span in self._spans.missing(spans) if span not in self._by_span]
        for first, last in runs(missing):
            if self._ahead >= AHEAD_FLIGHTS or self._closed:
                return False
            self._start(_Flight(first, last, READ_AHEAD, deadline, trace))
        return True

    async def close(self) -> None:
        """Give up all flights; who waits for one gets `Unavailable`."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _needed(self, span: int) -> bool:
        flight = self._by_span.get(span)
        return flight is not None and flight.why == MISS

    def _start(self, flight: _Flight) -> None:
        for span in range(flight.first, flight.last + 1):
            self._by_span[span] = flight
        self._ahead += flight.why == READ_AHEAD
        task = asyncio.get_running_loop().create_task(self._fly(flight))
        self._tasks.add(task)
        # Landing hangs on the task and not in `_fly`: a task that is cancelled before its first step never runs.
        task.add_done_callback(lambda ended: self._land(flight, ended))

    def _land(self, flight: _Flight, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._ahead -= flight.why == READ_AHEAD
        for span in range(flight.first, flight.last + 1):
            if self._by_span.get(span) is flight:
                del self._by_span[span]
        if not task.cancelled() and (defect := task.exception()):
            flight.failed = Unavailable(f"fetching failed: {type(defect).__name__}: {defect}")
        flight.done.set_result(None)

    async def _fly(self, flight: _Flight) -> None:
        loop = asyncio.get_running_loop()
        pause = FIRST_PAUSE
        for attempt in count():
            missing = self._spans.missing(range(flight.first, flight.last + 1))
            if not missing:
                return
            left = flight.deadline - loop.time()
            timeout = max(min(ASK_TIMEOUT, left), FIRST_PAUSE)
            want = Want(
                missing[0], missing[-1], flight.why, attempt, timeout, flight.trace, 0 if attempt else flight.ahead
            )
            flight.failed = await self._try(want)
            left = flight.deadline - loop.time()
            if flight.failed is None or flight.why == READ_AHEAD or left <= 0:
                return
            await asyncio.sleep(min(pause * random.uniform(1 - JITTER, 1 + JITTER), left))  # noqa: S311
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _try(self, want: Want) -> SociError | None:
        try:
            async with asyncio.timeout(want.timeout):
                await self._fetch(want)
        except SociError as error:
            failed = error
        except TimeoutError:
            failed = DeadlineExceeded(f"no answer within {want.timeout:.3g} s")
        except Exception as error:  # noqa: BLE001  a defect of ours must not leave readers waiting
            failed = Unavailable(f"fetching failed: {type(error).__name__}: {error}")
            failed.__cause__ = error
        else:
            if not self._spans.missing(range(want.first, want.last + 1)):
                return None
            failed = Unavailable(f"spans {want.first} to {want.last} are said to be fetched, but are not here")
        self._trouble(f"spans {want.first} to {want.last} were not fetched", failed)
        return failed
