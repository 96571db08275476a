# SPDX-License-Identifier: Apache-2.0
"""What this node owns for its cluster: compressed spans, fetched from the registry once, checked, and kept for all.

It never asks another node: who asks an owner gets an answer of its own or none, so that no question goes round.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from soci.digest import Digest
from soci.errors import Mismatch, NotFound
from soci_bus.asks import PrepareLayer
from soci_bus.face import LONGEST_ASK, Context
from soci_cache import LayerReader, LayerStore
from soci_cache.compressed import CompressedLayer
from soci_fetcher.source import MISS, Source
from soci_runtime.flights import Flights, in_thread, join

OPEN_LAYERS = 64
"""Layers whose files stay open; the one unused for longest is closed first."""
KEPT_SECONDS = 900.0
"""So long after another node asked for it a layer stays open: while it is, its folder counts as in use, though no
snapshot of this node may use it."""
OWN_SECONDS = 20.0
"""And so long after we used it ourselves."""
TRIES = 3
"""Of a run with wrong bytes."""
MAX_BRINGS = 8
"""Requests to the registry at a time on behalf of the cluster: with a block's size this bounds memory."""
MAX_AHEAD = 6
"""Of these, the most that nobody waits for: a miss always finds some free."""

Key = tuple[Digest, Digest]  # layer and zTOC
Prepare = Callable[[PrepareLayer, Context], Awaitable[object]]


@dataclass(slots=True)
class OpenLayer:
    """A layer's files, open. ``ztoc_size`` is in bytes."""

    compressed: CompressedLayer
    reader: LayerReader
    ztoc_size: int
    users: int = 0
    until: float = 0.0  # by the monotonic clock; then it is closed

    def close(self) -> None:
        """Let go of the files."""
        self.compressed.close()
        self.reader.close()


class Owned:
    """Spans that this node keeps for all. One a process; ``source`` is the registry."""

    def __init__(self, store: LayerStore, source: Source, prepare: Prepare, flights: Flights) -> None:
        self._store = store
        self._source = source
        self._prepare = prepare
        self._group = flights
        self._open: OrderedDict[Key, OpenLayer] = OrderedDict()
        self._old: list[OpenLayer] = []  # their files are gone, but somebody still reads them
        self._preparing: dict[Key, asyncio.Future[object]] = {}
        self._flights: dict[tuple[Key, int], asyncio.Future[None]] = {}
        self._permits = asyncio.Semaphore(MAX_BRINGS)
        self._ahead = asyncio.Semaphore(MAX_AHEAD)

    @asynccontextmanager
    async def opened(self, key: Key, seconds: float = OWN_SECONDS) -> AsyncIterator[OpenLayer]:
        """The layer's files, for the block and so many seconds more; `NotFound` where it is not prepared here."""
        layer = await self._layer(key)
        layer.users += 1
        try:
            yield layer
        finally:
            layer.users -= 1
            layer.until = max(layer.until, time.monotonic() + seconds)

    async def prepare(self, image: str, key: Key, ztoc_size: int) -> None:
        """Have the layer's folder, its zTOC from the registry where it is not here; once, whoever asks."""
        try:
            await self._layer(key)
        except NotFound:
            pass
        else:
            return
        flight = self._preparing.get(key)
        if flight is None:
            ask = PrepareLayer(image, key[0], None, key[1], ztoc_size)
            flight = self._group.start(f"zTOC {key[1]}", self._prepared(ask))
            self._preparing[key] = flight
            flight.add_done_callback(lambda _: self._preparing.pop(key))
        await join(flight)

    async def _prepared(self, ask: PrepareLayer) -> object:
        return await self._prepare(ask, Context(None, LONGEST_ASK))

    def start(self, image: str, key: Key, layer: OpenLayer, run: range, why: str) -> set[asyncio.Future[None]]:
        """Begin to bring what is absent of ``run``, which lies in one block; what must end until it is here.

        Each fails with what the registry raised, `Mismatch` for wrong bytes, `LimitExceeded` where the disk is full.
        """
        missing = layer.compressed.missing(run)
        under_way = {self._flights[key, span] for span in missing if (key, span) in self._flights}
        for part in _runs([span for span in missing if (key, span) not in self._flights]):
            flight = self._group.start(f"spans {part} of {key[0]}", self._bring(image, key, part, why))
            for span in part:
                self._flights[key, span] = flight
            flight.add_done_callback(partial(self._landed, key, part))
            under_way.add(flight)
        return under_way

    async def bring(self, image: str, key: Key, run: range, why: str) -> bytes:
        """The compressed bytes of ``run``, for ourselves; see `start`."""
        async with self.opened(key) as layer:
            for _ in range(2):  # what was kept may be dropped meanwhile
                waits = self.start(image, key, layer, run, why)
                for result in await asyncio.gather(*map(join, waits), return_exceptions=True):
                    if isinstance(result, BaseException):
                        raise result
                if not layer.compressed.missing(run):
                    extent = (
                        layer.compressed.spans.compressed(run.start)[0],
                        layer.compressed.spans.compressed(run[-1])[1],
                    )
                    return await in_thread(layer.compressed.read, *extent)
        raise NotFound(f"what was kept of {key[0]} is dropped as soon as it comes")

    def _landed(self, key: Key, run: range, _: asyncio.Future[None]) -> None:
        for span in run:
            del self._flights[key, span]

    async def _bring(self, image: str, key: Key, run: range, why: str) -> None:
        ahead = nullcontext() if why == MISS else self._ahead
        async with ahead, self._permits, self.opened(key) as layer:
            spans = layer.compressed.spans
            for _ in range(TRIES):
                start, end = spans.compressed(run.start)[0], spans.compressed(run[-1])[1]
                content = await self._source.read(image, *key, start, end, why)
                wrong = await in_thread(layer.compressed.put, run, content)
                if not wrong:
                    return
                self._source.distrust(key[0], start, end)
                run = range(wrong[0], wrong[-1] + 1)
        raise Mismatch(f"{image}: span {run.start} of {key[0]} does not match its digest (after {TRIES} tries)")

    # --- open layers

    async def _layer(self, key: Key) -> OpenLayer:
        found = self._open.get(key)
        if found is not None and not found.compressed.current():
            self._old.append(self._open.pop(key))
            found = None
        if found is None:
            made = await in_thread(self._opened, key)
            found = self._open.get(key)
            if found is not None:  # another one opened it meanwhile
                made.close()
            else:
                found = self._open[key] = made
        self._open.move_to_end(key)
        found.until = max(found.until, time.monotonic() + OWN_SECONDS)
        self._close_idle(but=key)
        return found

    def _opened(self, key: Key) -> OpenLayer:
        reader = self._store.read(*key)
        try:
            size = (reader.directory / "ztoc").stat().st_size
            return OpenLayer(CompressedLayer(reader.directory, reader.spans), reader, size)
        except OSError as error:
            reader.close()
            raise NotFound(f"{reader.directory} is gone") from error
        except BaseException:
            reader.close()
            raise

    def _close_idle(self, but: Key | None = None) -> None:
        for layer in [one for one in self._old if not one.users]:
            self._old.remove(layer)
            layer.close()
        now = time.monotonic()
        idle = [key for key, layer in self._open.items() if not layer.users and key != but]
        extra = len(self._open) - OPEN_LAYERS
        for place, key in enumerate(idle):
            if place < extra or self._open[key].until < now:
                self._open.pop(key).close()

    def sweep(self) -> None:
        """Close what nobody used for long; to be called now and then."""
        self._close_idle()

    def close(self) -> None:
        """Close all; nothing may be under way."""
        for layer in [*self._open.values(), *self._old]:
            layer.close()
        self._open.clear()
        self._old.clear()


def _runs(spans: list[int]) -> list[range]:
    """Ascending numbers as runs of neighbours."""
    if not spans:
        return []
    breaks = [place for place, (one, other) in enumerate(pairwise(spans), 1) if other != one + 1]
    edges = [0, *breaks, len(spans)]
    return [range(spans[first], spans[last - 1] + 1) for first, last in pairwise(edges)]
