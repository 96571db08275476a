# SPDX-License-Identifier: Apache-2.0
"""Spans: asked for, scheduled, brought from a source, through digest and inflate, into ``layer.tar``.

Bookkeeping is done without an await between look and change, so it needs no lock. Each absent span that somebody asked
for is one `Want`, which all who want it share; it waits (`soci_fetcher.schedule`), flies in a request of ours, or
another process of this node is at it (`soci_fetcher.claims`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Final

from soci.errors import InvalidInput, Mismatch, SociError, Unavailable
from soci_bus.asks import FetchSpans, SpansFetched
from soci_bus.events import Event, FetchFailed, SpanRejected, SpansArrived
from soci_bus.face import Context
from soci_cache import LayerStore
from soci_fetcher import checked
from soci_fetcher.large import bring as bring_large
from soci_fetcher.large import is_large, seconds_of
from soci_fetcher.opened import Opened, OpenLayers
from soci_fetcher.quiet import Quiet
from soci_fetcher.schedule import (
    CLASSES,
    FILL_RANK,
    QUEUED_MOST,
    Key,
    Link,
    Run,
    Schedule,
    extent,
    hinders,
    pieces,
)
from soci_fetcher.source import MISS, READ_AHEAD, Source
from soci_fetcher.wants import Asked, Flight, Want
from soci_runtime.flights import Flights, in_thread
from soci_runtime.tracing import step

SPANS_AN_ASK: Final = 4096
"""Spans that one ask may name."""
AHEAD_RANK: Final = CLASSES.index(READ_AHEAD)
POLL: Final = 0.005
"""Seconds between looks at spans that another process of this node brings."""
CLAIMS_A_POLL: Final = 64
"""Of these, how many claims are tried at each look."""
PATIENCE: Final = 10.0
"""Seconds for which a reader waits for another process of this node, which may stand still. Then we bring the span."""

Seen = Callable[[str], tuple[float, float]]
"""Bytes a second and seconds of a round trip to an image's registry; zeros where they are not known."""


class SpanFetcher:
    """Answers `FetchSpans`. One a process."""

    def __init__(  # noqa: PLR0913  its ways out
        self,
        store: LayerStore,
        source: Source,
        publish: Callable[[Event], None],
        flights: Flights,
        *,
        attempts: int,
        quiet: Quiet | None = None,
        seen: Seen = lambda _image: (0.0, 0.0),
    ) -> None:
        """``quiet`` hears while readers wait; None where nothing is filled in the background."""
        self._source = source
        self._publish = publish
        self._group = flights
        self._attempts = attempts
        self._quiet = quiet
        self._seen = seen
        self.layers = OpenLayers(store)
        self._wants: dict[tuple[Key, int], Want] = {}
        self._schedule = Schedule()
        self._flights: set[Flight] = set()
        self._elsewhere: dict[tuple[Key, int], Want] = {}
        self._watching = False
        self._threads = asyncio.Semaphore(checked.THREADS)
        self.miss_seconds = 0.0  # what misses took lately, a moving mean

    async def fetch(self, ask: FetchSpans, context: Context) -> SpansFetched:
        """Have every asked span in the cache. The first error is raised, after all that was asked for has ended."""
        opened = await self.layers.use((ask.layer, ask.ztoc), ask.image)
        try:
            _check(ask, opened.writer.spans.count)
            asked = Asked(ask, context.trace)
            rank = CLASSES.index(ask.why if ask.why in CLASSES else READ_AHEAD)
            waits = self._want(opened, range(ask.first, ask.last + 1), rank, asked)
            if ask.ahead:
                further = range(ask.last + 1, min(ask.last + 1 + ask.ahead, opened.writer.spans.count))
                asked_ahead = Asked(replace(ask, why=READ_AHEAD), context.trace)
                self._want(opened, further, max(rank, AHEAD_RANK), asked_ahead)
            self._begin_runs()
            if waits:
                with self._quiet.broken() if self._quiet and rank < FILL_RANK else nullcontext():
                    await asyncio.wait(waits)
        finally:
            self.layers.done(opened)
        for done in waits:
            if error := done.exception():
                raise error
        if waits and ask.why == MISS:
            took = time.monotonic() - asked.begun
            self.miss_seconds += (took - self.miss_seconds) / 8 if self.miss_seconds else took
        return SpansFetched(asked.requests, asked.moved)

    def mind_readers(self) -> None:
        """Fill nothing if a reader waits, at whichever fetcher of this node."""
        if self._quiet and self._quiet.waits():
            self._cut_fills()

    def close(self) -> None:
        """Close all layers; nothing may be under way."""
        self.layers.close()

    # --- what waits

    def _want(self, opened: Opened, spans: range, rank: int, asked: Asked) -> list[asyncio.Future[None]]:
        missing = opened.writer.missing(spans)
        if self._schedule.queued + len(missing) > QUEUED_MOST:
            raise Unavailable(f"more than {QUEUED_MOST} spans wait to be fetched")
        if self.layers.old:
            self._drop_old(opened)
        waiting: list[int] = []
        waits = []
        for span in missing:
            want = self._wants.get((opened.key, span))
            if want is None:
                want = self._wants[opened.key, span] = Want(opened, span, rank, asked)
                opened.users += 1
                waiting.append(span)
            elif rank < want.rank:
                want.rank, want.asked = rank, (want.asked if want.flying else asked)
                if not want.flying and (opened.key, span) not in self._elsewhere:
                    waiting.append(span)
            waits.append(want.done)
        self._schedule.want(opened.key, opened.writer.spans, waiting, rank)
        if missing and rank == 0:
            self._cut_fills()
        return waits

    def _drop_old(self, opened: Opened) -> None:
        """The layer's folder was made anew: what is wanted of the one before is nobody's any more."""
        for want in [want for (key, _), want in self._wants.items() if key == opened.key]:
            if want.opened is not opened:
                self._give_up(want, "the layer was freed, and made anew")

    def _give_up(self, want: Want, why: str) -> None:
        self._schedule.forget(want.opened.key, [want.span])
        self._elsewhere.pop((want.opened.key, want.span), None)
        self._arrived(want, Unavailable(why))

    def _cut_fills(self) -> None:
        """End fills that readers would wait behind, but for those that bring what a reader wants, or are all but here.

        Who asked for them is told so, and may ask again.
        """
        for want in [want for want in self._wants.values() if want.rank == FILL_RANK and not want.flying]:
            self._give_up(want, "a reader came before it")
        now = time.monotonic()
        for flight in self._flights:
            if flight.reading is None or flight.cut:
                continue
            wanted = any(self._rank(flight, span) < FILL_RANK for span in flight.run.wanted)
            if not wanted and hinders(flight.run, now - flight.begun, self._link(flight.run.key)):
                flight.cut = True
                flight.reading.reschedule(asyncio.get_running_loop().time())

    def _rank(self, flight: Flight, span: int) -> int:
        want = self._wants.get((flight.run.key, span))
        return want.rank if want and want.opened is flight.opened else FILL_RANK

    def _link(self, key: Key) -> Link:
        opened = self.layers.open.get(key)  # type: ignore[call-overload]
        return Link(*self._seen(opened.image)) if opened else Link()

    # --- what flies

    def _begin_runs(self) -> None:
        while run := self._schedule.take(self._link, lambda: not (self._quiet and self._quiet.waits())):
            self._schedule.end(run)
            wants = [self._wants[run.key, span] for span in run.wanted]
            opened = wants[0].opened
            kept = {want.span for want in wants if self._claim(want)}
            for piece in pieces(run, opened.writer.spans, kept, self._link(run.key).gap):
                self._start(piece, opened)

    def _claim(self, want: Want) -> bool:
        """Whether we may bring the span. It is here, or another process is at it, where not."""
        key = want.opened.key
        if not want.opened.writer.present(want.span):
            if not want.opened.claims.take(want.span) and not want.overdue(PATIENCE, time.monotonic()):
                self._elsewhere[key, want.span] = want
                self._watch()
                return False
            if not want.opened.writer.present(want.span):
                return True
            want.opened.claims.free(want.span)
        self._arrived(want)
        return False

    def _start(self, run: Run, opened: Opened) -> None:
        wants = [self._wants[run.key, span] for span in run.wanted]
        for want in wants:
            want.flying = True
        lead = min(wants, key=lambda want: (want.rank, want.asked.begun))
        flight = Flight(run, opened, lead, set(run.wanted))
        self._flights.add(flight)
        self._schedule.begin(run)
        geometry, first = opened.writer.spans, run.spans.start
        what = f"spans {first}..{run.spans.stop - 1} of {opened.writer.layer}"
        longer = seconds_of(geometry, first) if is_large(geometry, first) else 0.0
        flying = self._group.start(what, self._fly(flight), longer)
        flying.add_done_callback(lambda ended: self._landed(flight, ended))

    def _landed(self, flight: Flight, ended: asyncio.Future[None]) -> None:
        self._flights.remove(flight)
        self._schedule.end(flight.run)
        for span in flight.claimed:
            flight.opened.claims.free(span)
        error = ended.exception()
        for span in flight.run.wanted:
            want = self._wants.get((flight.run.key, span))
            if want is None or want.opened is not flight.opened:
                continue
            if error is not None:
                self._arrived(want, error)
            elif want.opened.writer.present(span):
                self._arrived(want)
            elif want.rank == FILL_RANK:
                self._arrived(want, Unavailable("a reader came before it"))
            else:  # it was cut off, and somebody began to wait for it meanwhile
                want.flying = False
                self._schedule.want(flight.run.key, flight.opened.writer.spans, [span], want.rank)
        if not self._group.ending:
            self._begin_runs()

    def _arrived(self, want: Want, error: BaseException | None = None) -> None:
        """The span is here, or could not be had."""
        if self._wants.get((want.opened.key, want.span)) is want:
            del self._wants[want.opened.key, want.span]
        if error is None:
            want.done.set_result(None)
        else:
            want.done.set_exception(error)
            want.done.exception()  # seen, even where nobody waits any more
        self.layers.done(want.opened)

    async def _fly(self, flight: Flight) -> None:
        asked, run, layer = flight.lead.asked, flight.run, flight.opened.writer.layer
        first, last, why = run.spans.start, run.spans.stop - 1, CLASSES[flight.lead.rank]
        try:
            with step("fetch", asked.trace, layer=layer, first=first, last=last, why=why):
                await self._bring(flight, why)
        except SociError as error:
            self._publish(FetchFailed(asked.launch, layer, f"spans {first}..{last}", str(error)))
            raise
        except TimeoutError:
            if flight.cut:
                return
            raise
        seconds = time.monotonic() - asked.begun
        self._publish(SpansArrived(asked.launch, layer, first, last, why, flight.moved, flight.requests, seconds))

    async def _bring(self, flight: Flight, why: str) -> None:
        """Fetch, check and fill. Spans with wrong bytes are asked for again, and no others."""
        writer, run = flight.opened.writer, flight.run
        layer, ztoc = flight.opened.key
        image = flight.lead.asked.ask.image

        def reject(span: int) -> None:
            self._source.distrust(layer, *writer.spans.compressed(span))
            text = f"not {writer.spans.digest(span)}"
            self._publish(SpanRejected(flight.lead.asked.launch, layer, span, text))

        async def read(start: int, end: int) -> bytes:
            async with asyncio.timeout(None) as limit:
                flight.reading = limit
                try:
                    content = await self._source.read(image, layer, ztoc, start, end, why)
                finally:
                    flight.reading = None
            for tally in (flight, flight.lead.asked):
                tally.requests += 1
                tally.moved += len(content)
            return content

        if len(run.spans) == 1 and is_large(writer.spans, run.spans.start):
            how = self._attempts, checked.MARKS[run.rank]
            await bring_large(read, writer, run.spans.start, how, reject)
            return
        todo, piece = self._with_gaps(flight), run.spans
        for _ in range(self._attempts):
            content = await read(*extent(writer.spans, piece))
            wrong = sorted(await self._fill(flight, piece, content, todo))
            for span in wrong:
                reject(span)
            todo = {span for span in wrong if span in run.wanted}
            if not todo:
                return
            piece = range(min(todo), max(todo) + 1)
        raise Mismatch(
            f"{image}: span {piece.start} of {layer} does not match its digest "
            f"{writer.spans.digest(piece.start)} (after {self._attempts} tries)"
        )

    def _with_gaps(self, flight: Flight) -> set[int]:
        """The spans of the run that are filled: those wanted, and those between that nobody else is at."""
        opened = flight.opened
        for span in flight.run.spans:
            unasked = span not in flight.claimed and (opened.key, span) not in self._wants
            if unasked and not opened.writer.present(span) and opened.claims.take(span):
                flight.claimed.add(span)
        return set(flight.claimed)

    async def _fill(self, flight: Flight, piece: range, content: bytes, todo: set[int]) -> list[int]:
        """Check and fill in threads, what readers wait for first; each span is told of once it is here."""
        writer = flight.opened.writer
        left = 0

        async def one(batch: list[checked.Piece], rank: int) -> list[int]:
            async with nullcontext() if rank == 0 else self._threads:
                wrong = await in_thread(checked.fill, writer, batch, checked.MARKS[rank])
            nonlocal left
            left -= 1
            # The last ones are told of when the flight has landed, and what it took is known.
            for span, _ in batch if left or wrong else ():
                if span not in wrong:
                    self._filled(flight, span)
            return wrong

        def rank_of(batch: list[checked.Piece]) -> int:
            wanted = [self._rank(flight, span) for span, _ in batch if span in flight.run.wanted]
            return min(wanted, default=flight.run.rank or 1)

        found = [(rank_of(batch), batch) for batch in checked.batches(piece, writer, content, todo)]
        found.sort(key=lambda pair: pair[0])
        left = len(found)
        ended = await asyncio.gather(*(one(batch, rank) for rank, batch in found), return_exceptions=True)
        for result in ended:
            if isinstance(result, BaseException):
                raise result
        return [span for result in ended if not isinstance(result, BaseException) for span in result]

    def _filled(self, flight: Flight, span: int) -> None:
        if span in flight.claimed:
            flight.claimed.remove(span)
            flight.opened.claims.free(span)
        want = self._wants.get((flight.run.key, span))
        if want is not None and want.opened is flight.opened and want.flying:
            self._arrived(want)

    # --- what other processes bring

    def _watch(self) -> None:
        if not self._watching:
            self._watching = True
            self._group.start("watching other fetchers", self._look()).add_done_callback(self._looked)

    def _looked(self, ended: asyncio.Future[None]) -> None:
        self._watching = False
        if error := ended.exception():
            for key, want in list(self._elsewhere.items()):
                del self._elsewhere[key]
                self._arrived(want, error)

    async def _look(self) -> None:
        while self._elsewhere:
            await asyncio.sleep(POLL)
            tries = CLAIMS_A_POLL
            for (key, span), want in list(self._elsewhere.items()):
                if want.opened.writer.present(span):
                    del self._elsewhere[key, span]
                    self._arrived(want)
                elif tries:
                    tries -= 1
                    del self._elsewhere[key, span]
                    ours = want.opened.claims.take(span)  # the other one is gone, and has not brought it
                    if ours:
                        want.opened.claims.free(span)
                    if ours or want.overdue(PATIENCE, time.monotonic()):
                        self._schedule.want(key, want.opened.writer.spans, [span], want.rank)
                    else:  # to the end: all get their turn
                        self._elsewhere[key, span] = want
            self._begin_runs()


def _check(ask: FetchSpans, count: int) -> None:
    if not 0 <= ask.first <= ask.last < count or not 0 <= ask.ahead < SPANS_AN_ASK - (ask.last - ask.first):
        raise InvalidInput(
            f"spans {ask.first}..{ask.last} of {ask.layer}, which has {count} (at most {SPANS_AN_ASK} at a time)"
        )
