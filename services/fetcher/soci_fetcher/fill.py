# SPDX-License-Identifier: Apache-2.0
"""Background fill: the layers that this node's snapshots use become whole while nobody waits for anything.

Of a node's fetchers one fills at a time. It begins once no reader has waited for a while, stops the moment that one
does, whichever fetcher the reader is at, and goes no further than the cache's budget.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

from soci.errors import LimitExceeded, NotFound, SociError
from soci_bus.asks import FetchSpans, UsedLayer
from soci_bus.face import LONGEST_ASK, Context
from soci_fetcher.opened import Layer, Opened
from soci_fetcher.pace import Pace, Round
from soci_fetcher.quiet import Quiet
from soci_fetcher.source import FILL
from soci_fetcher.spans import SPANS_AN_ASK, SpanFetcher
from soci_runtime.logs import log

LOOK: Final = 0.02
"""Seconds between two looks whether a reader came, while a fill is under way."""
PERIOD: Final = 15.0
"""Seconds until it is looked again for layers that are not whole."""
FULL_PERIOD: Final = 60.0
"""The same where there was no room for them."""
FIRST_PAUSE: Final = 5.0
LONGEST_PAUSE: Final = 600.0
"""Seconds after an error, of a layer or of all: doubled from the first to the longest."""
NO_CONTEXT: Final = Context(None, LONGEST_ASK)


class Filler:
    """Fills layers, for ever, in `run`. One a process."""

    def __init__(
        self,
        spans: SpanFetcher,
        quiet: Quiet,
        in_use: Callable[[], Awaitable[tuple[UsedLayer, ...]]],
        room: Callable[[], int],
        *,
        silence: float,
    ) -> None:
        """``in_use`` says which layers are to be filled, ``room`` how many bytes the cache has for them.

        ``silence``: seconds without a reader who waits, before it begins.
        """
        self._spans = spans
        self._quiet = quiet
        self._in_use = in_use
        self._room = room
        self._silence = silence
        self._pace = Pace()
        self._aside: dict[Layer, tuple[float, float]] = {}  # layers that failed: until when, and for how long

    async def run(self) -> None:
        """Fill whenever it is quiet."""
        pause = 0.0
        while True:
            await self._hush()
            try:
                wait, pause = await self._layers(), 0.0
            except LimitExceeded as error:
                log.warning("no layer is filled in the background: there is no room", error=error)
                wait = FULL_PERIOD
            except SociError as error:
                wait = pause = _longer(pause)
                log.info("filling layers in the background stopped", error=error, seconds=round(wait))
            await asyncio.sleep(wait)

    async def _hush(self) -> None:
        while (left := self._silence - self._quiet.silence()) > 0:  # noqa: ASYNC110  other processes end it
            await asyncio.sleep(max(left, LOOK))

    async def _layers(self) -> float:
        """Fill all that is not whole; how long to wait then. 0: a reader came. A layer that fails stops no other."""
        with self._quiet.filling() as alone:
            in_use = {(used.layer, used.ztoc): used for used in await self._in_use()} if alone else {}
            self._aside = {key: found for key, found in self._aside.items() if key in in_use}
            for key, used in in_use.items():
                until, pause = self._aside.get(key, (0.0, 0.0))
                if time.monotonic() < until:
                    continue
                try:
                    opened = await self._spans.layers.use(key, used.image)
                    try:
                        wait = await self._layer(used, opened)
                    finally:
                        self._spans.layers.done(opened)
                except LimitExceeded:
                    raise
                except SociError as error:
                    pause = _longer(pause)
                    self._aside[key] = time.monotonic() + pause, pause
                    if not isinstance(error, NotFound):  # it may not be prepared yet
                        log.info("a layer is not filled for now", layer=used.layer, error=error, seconds=round(pause))
                    continue
                self._aside.pop(key, None)
                if wait is not None:
                    return wait
        return PERIOD

    async def _layer(self, used: UsedLayer, opened: Opened) -> float | None:
        """Fill one layer; None when it is whole, else how long to wait."""
        geometry = opened.writer.spans
        usual = self._spans.miss_seconds
        while missing := opened.writer.missing(range(geometry.count)):
            first, last = missing[0], missing[0]
            for span in missing:
                size = geometry.compressed(span)[1] - geometry.compressed(first)[0]
                if size > self._pace.size or span - first >= SPANS_AN_ASK:
                    break
                last = span
            size = geometry.uncompressed(last)[1] - geometry.uncompressed(first)[0]
            if size > self._room():
                return FULL_PERIOD
            begun = time.monotonic()
            moved = await self._fetch(FetchSpans(used.image, used.layer, used.ztoc, first, last, FILL))
            disturbed = self._quiet.silence() < self._silence
            misses = self._spans.miss_seconds / usual if usual else 1.0
            self._pace = self._pace.after(Round(moved or 0, time.monotonic() - begun, disturbed, misses))
            if disturbed or moved is None:
                return 0.0
        return None

    async def _fetch(self, ask: FetchSpans) -> int | None:
        """Bytes that it moved; None where a reader came between."""
        work = asyncio.ensure_future(self._spans.fetch(ask, NO_CONTEXT))
        try:
            while not (await asyncio.wait([work], timeout=LOOK))[0]:
                self._spans.mind_readers()
            return work.result().compressed_bytes
        except SociError:
            if self._quiet.silence() < self._silence:
                return None
            raise
        finally:
            if not work.done():
                work.cancel()
                await asyncio.wait([work])


def _longer(pause: float) -> float:
    return min(max(pause * 2, FIRST_PAUSE), LONGEST_PAUSE)
