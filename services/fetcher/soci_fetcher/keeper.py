# SPDX-License-Identifier: Apache-2.0
"""The keeper of the span cache: frees what no image uses and what is above the budget, and proves whole layers.

Every fetcher has one; a lock sees to it that one of the node frees at a time. Two tasks, which end with the block of
`keeping`: one frees, in rounds; the other compares layers with their diff_ids, in a thread of low priority. What is in
use is asked of the snapshotter before any lock is taken; while it is away nothing goes.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

from soci.errors import NotFound, SociError
from soci.span import Spans
from soci_bus.asks import CacheFreed, FreeCache
from soci_bus.events import NO_LAUNCH, LayerCompleted, LayerRefused, SpaceFreed
from soci_bus.face import Bus, Context
from soci_bus.in_use import layers_in_use
from soci_cache import LayerStore, LayerWriter
from soci_cache.proof import COMPLETE, OPEN, REJECTED, prove, refused
from soci_cache.survey import HIGH_WATER, LOW_WATER, Key, survey
from soci_cache.tidy import GRACE, Tidied, Wish, make_room, tidy
from soci_runtime.flights import in_stoppable_thread
from soci_runtime.logs import log

PERIOD = 60.0
"""Seconds between two rounds, where nothing calls for one before."""
PAUSE = 1.0
"""Seconds between two rounds at least, whatever calls for them."""
LOOK_BYTES = 256 << 20
LOOK_SHARE = 4
"""A process looks at the cache again once it has filled so many bytes by itself, or one part in `LOOK_SHARE` of what
there was room for: others fill too, and nobody counts for all."""
MOST_TO_PROVE = 4096
"""Whole layers that wait to be proven; others are found by the next look at the cache."""
BUSY_TRIES = 100
"""Times, `PAUSE` / 5 apart, that who asked for a round waits for another process that is at it."""
NICE = 19
"""The priority of the thread that proves layers: the lowest."""

T = TypeVar("T")


@asynccontextmanager
async def keeping(cache: Path, bus: Bus, *, budget: int, grace: float = GRACE) -> AsyncIterator[Keeper]:
    """A keeper at work on the cache, whose budget (0: automatic) is in bytes. Leaving the block ends it."""
    with ThreadPoolExecutor(1, "prover", initializer=_lowest_priority) as thread:
        keeper = Keeper(cache, bus, thread, budget=budget, grace=grace)
        failure: BaseException | None = None
        async with asyncio.TaskGroup() as tasks:
            work = [tasks.create_task(one) for one in (keeper.free_in_rounds(), keeper.prove_layers())]
            try:
                yield keeper
            except BaseException as error:  # noqa: BLE001  raised again below, outside the group, as itself
                failure = error
            for task in work:
                task.cancel()
        if failure is not None:
            raise failure


def _lowest_priority() -> None:
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


class Keeper:
    """See the module. ``told`` and ``make_room`` are for the `LayerStore` of the same process, in any thread."""

    def __init__(
        self, cache: Path, bus: Bus, thread: ThreadPoolExecutor, *, budget: int = 0, grace: float = GRACE
    ) -> None:
        self._cache = cache
        self._bus = bus
        self._thread = thread
        self._budget = budget
        self._grace = grace
        self._loop = asyncio.get_running_loop()
        self._store = LayerStore(cache)
        self._round = asyncio.Event()
        self._whole: OrderedDict[Key, None] = OrderedDict()  # to be proven
        self._proving = asyncio.Event()
        self._room = 0  # bytes that may still come before the cache is looked at again
        self._spare = 0
        self._over = False

    # --- what others tell

    def told(self, writer: LayerWriter, size: int) -> None:
        """A span was filled."""
        whole = (writer.layer, writer.name) if writer.full() else None
        self._loop.call_soon_threadsafe(self._filled, size, whole)

    def make_room(self, _place: Path, size: int) -> None:
        """Free so much, where the disk is full. Blocks on the disk."""
        try:
            freed = make_room(self._cache, size)
        except SociError as error:
            log.error("no room can be made in the span cache", error=error)
            return
        self._loop.call_soon_threadsafe(self._made_room, freed)

    async def free(self, ask: FreeCache, _context: Context) -> CacheFreed:
        """Answer `FreeCache`."""
        if not ask.wait:
            self._round.set()
            return CacheFreed()
        done, unknown = await self._tidy(0.0 if ask.at_once else self._grace, dry_run=ask.dry_run)
        for _ in range(BUSY_TRIES):
            if not done.busy:
                break
            await asyncio.sleep(PAUSE / 5)
            done, unknown = await self._tidy(0.0 if ask.at_once else self._grace, dry_run=ask.dry_run)
        if not ask.dry_run:
            self._tell(done, "asked")
        why = "another process frees" if done.busy else unknown or "; ".join(done.troubles)
        return CacheFreed(tuple(done.layers), done.spans, done.freed, done.used, done.budget, why)

    @property
    def room(self) -> int:
        """Bytes that may be filled which nobody needs yet: below the low water mark, or they would go soon."""
        return max(0, self._spare)

    def _filled(self, size: int, whole: Key | None) -> None:
        self._room -= size
        self._spare -= size
        if self._room < 0:
            self._round.set()
        if whole is not None:
            self._to_prove(whole)

    def _made_room(self, freed: int) -> None:
        log.warning("the disk of the span cache was full", freed=freed)
        self._bus.publish(SpaceFreed(NO_LAUNCH, "disk-full", 0, 0, freed, 0, 0))
        self._round.set()

    # --- freeing

    async def free_in_rounds(self) -> None:
        """Free what is to be freed, now and again, for ever."""
        while True:
            self._round.clear()
            wait = PERIOD
            try:
                done, unknown = await self._tidy(self._grace)
                self._tell(done, "budget" if done.spans else "unused")
                if unknown:
                    log.debug("nothing is freed: nobody says what is in use", why=unknown)
                elif done.again_in is not None:
                    wait = min(wait, done.again_in)
                self._room = min(LOOK_BYTES, (int(done.budget * HIGH_WATER) - done.used) // LOOK_SHARE)
                self._spare = int(done.budget * LOW_WATER) - done.used
            except SociError as error:
                log.warning("the span cache was not looked after", error=error)
            await asyncio.sleep(PAUSE)
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, wait - PAUSE)):
                    await self._round.wait()

    async def _tidy(self, grace: float, *, dry_run: bool = False) -> tuple[Tidied, str]:
        """One round; with it, why nobody knows what is in use."""
        unknown, in_use = "", None
        try:
            in_use = frozenset((one.layer, one.ztoc) for one in await layers_in_use(self._bus))
        except SociError as error:
            unknown = f"it is not known which layers are in use: {error}"
        done = await in_stoppable_thread(
            lambda stopped: tidy(self._cache, Wish(in_use, self._budget, grace, dry_run=dry_run, stopped=stopped))
        )
        return done, unknown

    def _tell(self, done: Tidied, why: str) -> None:
        """An event and a line for what went, for the budget that was crossed, and for what could not be freed."""
        for trouble in done.troubles:
            log.warning("not freed", why=trouble)
        if done.busy:
            return
        over, self._over = self._over, done.over > 0
        if not done.freed and not done.layers and over == self._over:
            return
        about = {"layers": len(done.layers), "spans": done.spans, "freed": done.freed}
        about |= {"used": done.used, "budget": done.budget, "over": done.over}
        self._bus.publish(SpaceFreed(NO_LAUNCH, why, **about))
        if done.over:
            log.warning("the span cache is above its budget, and nothing more can be freed", why=why, **about)
        else:
            log.info("span cache freed", why=why, **about)

    # --- proving

    def _to_prove(self, key: Key) -> None:
        if len(self._whole) < MOST_TO_PROVE:
            self._whole[key] = None
            self._proving.set()

    async def prove_layers(self) -> None:
        """Prove layers as they become whole, and those that a process left unproven which was killed, for ever."""
        looked = -PERIOD
        while True:
            now = time.monotonic()
            if now - looked >= PERIOD:
                looked = now
                for one in await self._unproven():
                    self._to_prove(one)
            while self._whole:
                key, _ = self._whole.popitem(last=False)
                await self._prove(key)
            self._proving.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(PERIOD):
                    await self._proving.wait()

    async def _unproven(self) -> list[Key]:
        def look(stopped: Callable[[], bool]) -> list[Key]:  # noqa: ARG001  it is short
            held = survey(self._cache)
            return [one.key for one in held if one.full and one.verdict == OPEN]

        try:
            return await self._in_thread(look)
        except OSError as error:
            log.warning("the span cache cannot be looked at", error=error)
            return []

    async def _prove(self, key: Key) -> None:
        def work(stopped: Callable[[], bool]) -> tuple[int | None, int]:
            spans = Spans.of(self._store.table(*key))
            return prove(self._store.directory(*key), spans, stopped), spans.uncompressed_size

        begun = time.monotonic()
        try:
            verdict, size = await self._in_thread(work)
        except NotFound:
            return
        except SociError as error:
            log.warning("a whole layer was not proven", layer=key[0], error=error)
            return
        about = {"layer": key[0], "ztoc": key[1], "seconds": round(time.monotonic() - begun, 3)}
        if verdict == REJECTED:
            self._bus.publish(LayerRefused(NO_LAUNCH, *key, str(refused(*key))))
            log.error("a layer is not what its image promises, and is not served any more", **about)
        elif verdict is not None:
            self._bus.publish(LayerCompleted(NO_LAUNCH, *key, verdict == COMPLETE, size))
            log.info("layer complete", proven=verdict == COMPLETE, **about)

    async def _in_thread(self, work: Callable[[Callable[[], bool]], T]) -> T:
        """As `in_stoppable_thread`, in the thread of low priority."""
        stop = threading.Event()
        working = self._loop.run_in_executor(self._thread, work, stop.is_set)
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            stop.set()
            await asyncio.wait([working])
            with suppress(SociError, OSError, asyncio.CancelledError):
                working.result()
            raise
