# SPDX-License-Identifier: Apache-2.0
"""Spans: from the registry, through digest and inflate, into ``layer.tar``.

Bookkeeping is done without an await between look and change, so it needs no lock: ``_flights`` maps each span under
way to the future that all who want it share.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable

from soci.digest import Digest
from soci.errors import InvalidGzip, InvalidInput, Mismatch, SociError, Unavailable
from soci.inflate import inflate_span
from soci_bus.asks import FetchSpans, SpansFetched
from soci_bus.events import NO_LAUNCH, Event, FetchFailed, SpanRejected, SpansArrived
from soci_bus.face import Context
from soci_cache import LayerStore, LayerWriter
from soci_fetcher.runs import cut, runs
from soci_registry import Registry, Repository
from soci_runtime.tracing import step

OPEN_LAYERS = 64
"""Layers whose files stay open; the one unused for longest is closed first."""
CONCURRENT_RUNS = 8
"""Range requests of this process at a time: with `runs.RUN_BYTES` this bounds its memory."""
SPANS_AN_ASK = 4096
"""Spans that one ask may name."""

Flight = asyncio.Future[None]
Key = tuple[Digest, Digest, int]


class SpanFetcher:
    """Answers `FetchSpans`. One a process."""

    def __init__(
        self, store: LayerStore, registry: Registry, publish: Callable[[Event], None], *, attempts: int
    ) -> None:
        self._store = store
        self._registry = registry
        self._publish = publish
        self._attempts = attempts
        self._open: OrderedDict[tuple[Digest, Digest], LayerWriter] = OrderedDict()
        self._flights: dict[Key, Flight] = {}
        self._permits = asyncio.Semaphore(CONCURRENT_RUNS)

    async def fetch(self, ask: FetchSpans, context: Context) -> SpansFetched:
        """Have every asked span in the cache. The first error is raised, after all runs have ended."""
        writer = await self._writer(ask.layer, ask.ztoc)
        if not 0 <= ask.first <= ask.last < writer.spans.count or ask.last - ask.first >= SPANS_AN_ASK:
            raise InvalidInput(f"spans {ask.first}..{ask.last} of {ask.layer}, which has {writer.spans.count}")
        others: list[Flight] = []
        mine: list[int] = []
        for span in writer.missing(range(ask.first, ask.last + 1)):
            flight = self._flights.get((ask.layer, ask.ztoc, span))
            if flight:
                others.append(flight)
            else:
                mine.append(span)
                self._flights[ask.layer, ask.ztoc, span] = asyncio.get_running_loop().create_future()
        todo = list(runs(mine, writer.spans))
        results = await asyncio.gather(*(self._run(ask, context, writer, run) for run in todo), return_exceptions=True)
        shared = await asyncio.gather(*(asyncio.shield(flight) for flight in others), return_exceptions=True)
        for result in (*results, *shared):
            if isinstance(result, BaseException):
                raise result
        moved = sum(result for result in results if isinstance(result, int))
        return SpansFetched(len(todo), moved)

    async def _run(self, ask: FetchSpans, context: Context, writer: LayerWriter, run: range) -> int:
        """One run; every flight of it ends here, well or badly."""
        failure: BaseException | None = None
        try:
            with step("fetch", context.trace, layer=ask.layer, first=run.start, last=run.stop - 1, why=ask.why):
                return await self._request(ask, context, writer, run)
        except BaseException as error:
            failure = error
            raise
        finally:
            for span in run:
                flight = self._flights.pop((ask.layer, ask.ztoc, span))
                if failure is None:
                    flight.set_result(None)
                else:
                    given_up = Unavailable(f"span {span} of {ask.layer}: the fetch under way was given up")
                    flight.set_exception(failure if isinstance(failure, SociError) else given_up)
                    flight.exception()  # seen, even where nobody else waits

    async def _request(self, ask: FetchSpans, context: Context, writer: LayerWriter, run: range) -> int:
        launch = context.trace.launch if context.trace else NO_LAUNCH
        repository = self._registry.repository(ask.image)
        begun = time.monotonic()
        moved = 0
        requests = 0
        try:
            async with self._permits:
                left = list(run)
                for attempt in range(1, self._attempts + 1):
                    piece = range(left[0], left[-1] + 1)
                    content = await _get(repository, ask.layer, writer, piece)
                    requests += 1
                    moved += len(content)
                    rejected = await asyncio.to_thread(_check_and_fill, writer, piece, content)
                    for span, error in rejected:
                        self._publish(SpanRejected(launch, ask.layer, span, str(error)))
                    if not rejected:
                        break
                    if attempt == self._attempts:
                        raise Mismatch(f"{ask.image}: {rejected[0][1]} (after {attempt} tries)")
                    left = [span for span, _ in rejected]
        except SociError as error:
            self._publish(FetchFailed(launch, ask.layer, f"spans {run.start}..{run.stop - 1}", str(error)))
            raise
        seconds = time.monotonic() - begun
        self._publish(SpansArrived(launch, ask.layer, run.start, run.stop - 1, ask.why, moved, requests, seconds))
        return moved

    async def _writer(self, layer: Digest, ztoc: Digest) -> LayerWriter:
        key = (layer, ztoc)
        writer = self._open.get(key)
        if writer is None:
            writer = await asyncio.to_thread(self._store.write, layer, ztoc)
            if key in self._open:  # another ask opened it meanwhile
                writer.close()
                writer = self._open[key]
            self._open[key] = writer
        self._open.move_to_end(key)
        while len(self._open) > OPEN_LAYERS:
            busy = {flight[:2] for flight in self._flights}
            idle = next((other for other in self._open if other not in busy and other != key), None)
            if idle is None:
                break
            self._open.pop(idle).close()
        return writer

    def close(self) -> None:
        """Close all layers; nothing may be under way."""
        for writer in self._open.values():
            writer.close()
        self._open.clear()


async def _get(repository: Repository, layer: Digest, writer: LayerWriter, run: range) -> bytes:
    start, end = writer.spans.compressed(run.start)[0], writer.spans.compressed(run.stop - 1)[1]
    return await repository.blob_range(layer, start, end)


def _check_and_fill(writer: LayerWriter, run: range, content: bytes) -> list[tuple[int, SociError]]:
    """Check, inflate and fill each span that is still absent; the ones that do not match, with the reason."""
    rejected: list[tuple[int, SociError]] = []
    for span, compressed in cut(run, writer.spans, content):
        if writer.present(span):
            continue
        promised = writer.spans.digest(span)
        if "sha256:" + hashlib.sha256(compressed).hexdigest() != promised:
            rejected.append((span, Mismatch(f"span {span} of {writer.layer} does not match its digest {promised}")))
            continue
        try:
            writer.fill(span, inflate_span(writer.ztoc, writer.spans, span, compressed))
        except (InvalidGzip, Mismatch) as error:
            rejected.append((span, error))
    return rejected
