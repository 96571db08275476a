# SPDX-License-Identifier: Apache-2.0
"""Spans: from the registry, through digest and inflate, into ``layer.tar``.

Bookkeeping is done without an await between look and change, so it needs no lock: ``_flights`` maps each span under
way to the run that brings it, which all who want it share.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext

from soci.digest import Digest, hex_of, new_hash
from soci.errors import InvalidInput, Mismatch, SociError
from soci_bus.asks import FetchSpans, SpansFetched
from soci_bus.events import NO_LAUNCH, Event, FetchFailed, SpanRejected, SpansArrived
from soci_bus.face import Context
from soci_cache import LayerStore, LayerWriter
from soci_fetcher.large import bring as bring_large
from soci_fetcher.large import decompressed, is_large, seconds_of
from soci_fetcher.links import Links
from soci_fetcher.runs import RUN_BYTES, cut, runs
from soci_registry import Registry
from soci_runtime.flights import Flights, in_thread, join
from soci_runtime.tracing import step

OPEN_LAYERS = 64
"""Layers whose files stay open; the one unused for longest is closed first."""
CONCURRENT_RUNS = 8
"""Range requests of this process at a time: with `runs.RUN_BYTES` this bounds its memory."""
CONCURRENT_AHEAD = 6
"""Of these, the most that read-ahead may take: a reader who waits always finds some free."""
SPANS_AN_ASK = 4096
"""Spans that one ask may name."""
READ_AHEAD = "read-ahead"

Layer = tuple[Digest, Digest]  # layer and zTOC
Run = asyncio.Future[int]  # compressed bytes moved


class SpanFetcher:
    """Answers `FetchSpans`. One a process."""

    def __init__(  # noqa: PLR0913  its ways out
        self,
        store: LayerStore,
        registry: Registry,
        publish: Callable[[Event], None],
        flights: Flights,
        *,
        attempts: int,
        links: Links | None = None,
    ) -> None:
        self._store = store
        self._links = links or Links()
        self._registry = registry
        self._publish = publish
        self._group = flights
        self._attempts = attempts
        self._open: OrderedDict[Layer, LayerWriter] = OrderedDict()
        self._old: list[tuple[Layer, LayerWriter]] = []  # their folder is gone, but runs still use them
        self._flights: dict[tuple[Layer, int], Run] = {}
        self._permits = asyncio.Semaphore(CONCURRENT_RUNS)
        self._ahead = asyncio.Semaphore(CONCURRENT_AHEAD)
        self._large = asyncio.Semaphore(1)  # a run of one span beyond RUN_BYTES: no two in memory

    async def fetch(self, ask: FetchSpans, context: Context) -> SpansFetched:
        """Have every asked span in the cache. The first error is raised, after all runs have ended."""
        key = (ask.layer, ask.ztoc)
        writer = await self._writer(key)
        if not 0 <= ask.first <= ask.last < writer.spans.count or ask.last - ask.first >= SPANS_AN_ASK:
            raise InvalidInput(
                f"spans {ask.first}..{ask.last} of {ask.layer}, which has {writer.spans.count} "
                f"(at most {SPANS_AN_ASK} at a time)"
            )
        missing = writer.missing(range(ask.first, ask.last + 1))
        others = {self._flights[key, span] for span in missing if (key, span) in self._flights}
        todo = list(runs([span for span in missing if (key, span) not in self._flights], writer.spans))
        mine = [self._start(ask, context, writer, run) for run in todo]
        results = await asyncio.gather(*map(join, mine), *map(join, others), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return SpansFetched(len(mine), sum(run.result() for run in mine))

    def _start(self, ask: FetchSpans, context: Context, writer: LayerWriter, run: range) -> Run:
        key = (ask.layer, ask.ztoc)
        what = f"spans {run.start}..{run.stop - 1} of {ask.layer}"
        longer = seconds_of(writer.spans, run.start) if is_large(writer.spans, run.start) else 0.0
        flight = self._group.start(what, self._run(ask, context, writer, run), longer)
        for span in run:
            self._flights[key, span] = flight
        flight.add_done_callback(lambda _: self._landed(key, run))
        return flight

    def _landed(self, key: Layer, run: range) -> None:
        for span in run:
            del self._flights[key, span]
        self._close_idle()

    async def _run(self, ask: FetchSpans, context: Context, writer: LayerWriter, run: range) -> int:
        launch = context.trace.launch if context.trace else NO_LAUNCH
        begun = time.monotonic()
        try:
            with step("fetch", context.trace, layer=ask.layer, first=run.start, last=run.stop - 1, why=ask.why):
                async with self._permit(ask, writer, run):
                    requests, moved = await self._bring(ask, launch, writer, run)
        except SociError as error:
            self._publish(FetchFailed(launch, ask.layer, f"spans {run.start}..{run.stop - 1}", str(error)))
            raise
        seconds = time.monotonic() - begun
        self._publish(SpansArrived(launch, ask.layer, run.start, run.stop - 1, ask.why, moved, requests, seconds))
        return moved

    @asynccontextmanager
    async def _permit(self, ask: FetchSpans, writer: LayerWriter, run: range) -> AsyncIterator[None]:
        start, end = _extent(writer, run)
        large = self._large if end - start > RUN_BYTES else nullcontext()
        ahead = self._ahead if ask.why == READ_AHEAD else nullcontext()
        async with large, ahead, self._permits:
            yield

    async def _bring(self, ask: FetchSpans, launch: str, writer: LayerWriter, run: range) -> tuple[int, int]:
        """How many requests and compressed bytes it took. Spans with wrong bytes are asked for again, and no others."""
        repository = self._registry.repository(ask.image)

        def reject(span: int) -> None:
            self._publish(SpanRejected(launch, ask.layer, span, f"not {writer.spans.digest(span)}"))

        if len(run) == 1 and is_large(writer.spans, run.start):
            return await bring_large(repository, writer, run.start, self._attempts, reject)
        moved = 0
        piece = run
        for attempt in range(1, self._attempts + 1):
            with self._links.request(repository.place.registry) as request:
                content = await repository.blob_range(ask.layer, *_extent(writer, piece))
                request.size = len(content)
            moved += len(content)
            wrong = await in_thread(_check_and_fill, writer, piece, content)
            for span in wrong:
                reject(span)
            if not wrong:
                return attempt, moved
            piece = range(wrong[0], wrong[-1] + 1)
        raise Mismatch(
            f"{ask.image}: span {piece.start} of {ask.layer} does not match its digest "
            f"{writer.spans.digest(piece.start)} (after {self._attempts} tries)"
        )

    # --- open layers

    async def _writer(self, key: Layer) -> LayerWriter:
        writer = self._open.get(key)
        if writer is not None and not writer.current():
            self._old.append((key, self._open.pop(key)))
            writer = None
        if writer is None:
            writer = await in_thread(self._store.write, *key)
            if key in self._open:  # another ask opened it meanwhile
                writer.close()
                writer = self._open[key]
            self._open[key] = writer
        self._open.move_to_end(key)
        self._close_idle(but=key)
        return writer

    def _close_idle(self, but: Layer | None = None) -> None:
        """Close layers beyond `OPEN_LAYERS`, and those whose files are gone, once no run uses them."""
        if len(self._open) <= OPEN_LAYERS and not self._old:
            return
        busy = {key for key, _ in self._flights}
        for key, writer in [pair for pair in self._old if pair[0] not in busy]:
            self._old.remove((key, writer))
            writer.close()
        idle = [key for key in self._open if key not in busy and key != but]
        for key in idle[: max(0, len(self._open) - OPEN_LAYERS)]:
            self._open.pop(key).close()

    def close(self) -> None:
        """Close all layers; nothing may be under way."""
        for writer in [*self._open.values(), *(writer for _, writer in self._old)]:
            writer.close()
        self._open.clear()
        self._old.clear()


def _extent(writer: LayerWriter, run: range) -> tuple[int, int]:
    return writer.spans.compressed(run.start)[0], writer.spans.compressed(run.stop - 1)[1]


def _check_and_fill(writer: LayerWriter, run: range, content: bytes) -> list[int]:
    """Check, inflate and fill each span that is still absent; returns those whose bytes are not the promised ones.

    A span whose bytes are as promised and yet do not inflate is the zTOC's fault: it is raised, for the registry has
    no better ones.
    """
    wrong: list[int] = []
    for span, compressed in cut(run, writer.spans, content):
        if writer.present(span):
            continue
        promised = writer.spans.digest(span)
        state = new_hash(promised)
        state.update(compressed)
        if state.hexdigest() != hex_of(promised):
            wrong.append(span)
            continue
        writer.fill_pieces(span, decompressed(writer, span, (compressed,)))
    return wrong
