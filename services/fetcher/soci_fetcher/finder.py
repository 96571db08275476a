# SPDX-License-Identifier: Apache-2.0
"""Index look-ups, shared: all layers of an image ask the same question at almost the same time."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from soci.digest import Digest
from soci.errors import LimitExceeded, NoIndex
from soci.launch import TraceParent
from soci_bus.asks import FindIndex, IndexFound
from soci_bus.face import Context
from soci_fetcher.discovery import find_index
from soci_fetcher.links import Links
from soci_registry import Registry
from soci_runtime.flights import Flights, join
from soci_runtime.tracing import step

REMEMBERED = 1024
"""Look-ups whose answer is remembered; the one unused for longest goes first."""
UNDER_WAY = 256
"""Look-ups that may be under way at a time."""
SUCCESS_TTL = 300.0
"""Seconds for which an index that was found is not looked for again."""

Key = tuple[str, Digest, Digest | None]


@dataclass(slots=True)
class _Known:
    answer: asyncio.Future[IndexFound]
    until: float  # by the clock


class Finder:
    """Answers `FindIndex`. One a process. Bookkeeping is done without an await in it, so it needs no lock."""

    def __init__(  # noqa: PLR0913  three are settings
        self,
        registry: Registry,
        flights: Flights,
        *,
        v1: bool,
        v2: bool,
        failure_ttl: float,
        links: Links | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._flights = flights
        self._v1, self._v2 = v1, v2
        self._failure_ttl = failure_ttl
        self._links = links or Links()
        self._clock = clock
        self._known: OrderedDict[Key, _Known] = OrderedDict()
        self._under_way: dict[Key, asyncio.Future[IndexFound]] = {}

    async def find(self, ask: FindIndex, context: Context) -> IndexFound:
        """The image's index. That there is none is remembered for ``failure_ttl`` seconds only."""
        key = (ask.image, ask.manifest, ask.explicit)
        known = self._known.get(key)
        if known and known.until > self._clock():
            self._known.move_to_end(key)
            return self._with_link(ask, await join(known.answer))
        answer = self._under_way.get(key)
        if answer is None:
            if len(self._under_way) >= UNDER_WAY:
                raise LimitExceeded(f"{UNDER_WAY} index look-ups are under way already; try again")
            answer = self._flights.start(f"{ask.image}: the index look-up", self._look_up(ask, context.trace))
            self._under_way[key] = answer
            answer.add_done_callback(lambda done: self._remember(key, done))
        return self._with_link(ask, await join(answer))

    def _with_link(self, ask: FindIndex, found: IndexFound) -> IndexFound:
        speed, round_trip = self._links.seen(self._registry.repository(ask.image).place.registry)
        return replace(found, bytes_per_second=speed, round_trip=round_trip)

    async def _look_up(self, ask: FindIndex, trace: TraceParent | None) -> IndexFound:
        with step("find-index", trace, image=ask.image):
            repository = self._registry.repository(ask.image)
            return await find_index(repository, ask, v1=self._v1, v2=self._v2)

    def _remember(self, key: Key, answer: asyncio.Future[IndexFound]) -> None:
        del self._under_way[key]
        error = answer.exception()
        if error is None or isinstance(error, NoIndex):
            self._known[key] = _Known(answer, self._clock() + (SUCCESS_TTL if error is None else self._failure_ttl))
            self._known.move_to_end(key)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
