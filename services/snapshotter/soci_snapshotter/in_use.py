# SPDX-License-Identifier: Apache-2.0
"""Which lazy layers this node's snapshots use: what the keeper of the span cache must not free.

The answer comes from the records on disk, through a connection of its own that only reads: no call of containerd's
waits for it. A layer that is being brought is in none of the records yet; the keeper leaves a new folder alone.
"""

from __future__ import annotations

import asyncio
import hashlib
from bisect import bisect_right
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from soci.digest import Digest, parse_digest
from soci.errors import InvalidInput, SociError
from soci_bus.asks import FreeCache, LayersInUse, LayersUsed, UsedLayer
from soci_bus.face import Bus, Context
from soci_runtime.flights import Flights
from soci_runtime.logs import log
from soci_snapshotter.labels import ZTOC, ZTOC_SIZE, read_remote_labels
from soci_snapshotter.mounts import is_lazy
from soci_snapshotter.state import Snapshot
from soci_snapshotter.store import SnapshotStore

PAGE_LAYERS = 1000
"""Layers of one page."""
PAGE_BYTES = 256 << 10
"""Bytes of one page, roughly: a message of the bus has at most 1 MiB, and an image's name may be long."""
LAYER_BYTES = 200
"""Bytes of one layer in a page, beside its image's name."""
TELL_SECONDS = 2.0
"""Seconds in which a fetcher takes note that snapshots went; else it sees so in its next round."""


def layers_of(snapshots: Iterable[Snapshot]) -> list[UsedLayer]:
    """The lazy layers of these snapshots, each once, in the order of their keys. Pure.

    Raises `SociError` where one does not say which layer it shows: to leave it out would have its bytes freed.
    """
    found: dict[tuple[Digest, Digest], UsedLayer] = {}
    for one in snapshots:
        if not is_lazy(one):
            continue
        try:
            wanted, ztoc = read_remote_labels(one.labels), parse_digest(one.labels.get(ZTOC, ""))
            size = int(one.labels.get(ZTOC_SIZE, "") or 0)
        except (InvalidInput, ValueError) as error:
            raise SociError(f"snapshot {one.name[:200]!r} is lazy, but does not say of which layer") from error
        found.setdefault((wanted.layer, ztoc), UsedLayer(wanted.image, wanted.layer, ztoc, size))
    return [found[key] for key in sorted(found)]


def page_of(layers: list[UsedLayer], after: str) -> LayersUsed:
    """The page of ``layers`` (in the order of their keys) behind the key ``after``. Pure."""
    keys = [f"{one.layer} {one.ztoc}" for one in layers]
    generation = hashlib.sha256("\n".join(keys).encode()).hexdigest()
    start = end = bisect_right(keys, after)
    size = 0
    while end < len(layers) and end - start < PAGE_LAYERS:
        size += len(layers[end].image.encode()) + LAYER_BYTES
        if size > PAGE_BYTES and end > start:
            break
        end += 1
    return LayersUsed(tuple(layers[start:end]), generation, keys[end - 1] if end < len(layers) else "")


class InUse:
    """Answers `LayersInUse`, and tells the fetchers when snapshots of lazy layers are gone."""

    def __init__(self, database: Path, bus: Bus, flights: Flights) -> None:
        self._database = database
        self._bus = bus
        self._flights = flights
        self._telling = False

    async def serve(self) -> None:
        """Answer from now on."""
        await self._bus.serve(LayersInUse, self._answer)

    async def _answer(self, ask: LayersInUse, _context: Context) -> LayersUsed:
        return await asyncio.to_thread(self._page, ask.after)

    def _page(self, after: str) -> LayersUsed:
        with closing(SnapshotStore(self._database, read_only=True)) as store:
            return page_of(layers_of(store.all()), after)

    def freed(self) -> None:
        """Lazy layers may be unused now. Returns at once; nobody waits for what comes of it."""
        if not self._telling:  # one that is under way comes late enough for this one too
            self._telling = True
            self._flights.start("the word that layers are unused", self._tell())

    async def _tell(self) -> None:
        try:
            await self._bus.ask(FreeCache(wait=False), timeout=TELL_SECONDS)
        except SociError as error:
            log.debug("no fetcher took note that layers are unused", error=error)
        finally:
            self._telling = False
