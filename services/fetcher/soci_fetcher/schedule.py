# SPDX-License-Identifier: Apache-2.0
"""Which spans are fetched next, and in which requests. Pure: no clock, no task.

Spans wait one by one, each in a class: a *miss* before *read-ahead*, before a *load order*, before background *fill*.
Requests are made of them only when one may begin, around the most urgent span, so that what was asked for meanwhile,
by whomever, is merged, and a miss never waits behind a request that has not begun.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Container, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Final

from soci.span import Spans
from soci_fetcher.large import is_large
from soci_fetcher.runs import RUN_BYTES
from soci_fetcher.source import FILL, LOAD_ORDER, MISS, READ_AHEAD

CLASSES: Final = (MISS, READ_AHEAD, LOAD_ORDER, FILL)
"""The most urgent first; a span's *rank* is its class's place here."""
FILL_RANK: Final = CLASSES.index(FILL)
REQUESTS: Final = (16, 8, 6, 3)
"""By rank: with fewer requests under way than this, of all ranks, one more may begin. Misses have a reserve."""
BYTES: Final = (192 << 20, 96 << 20, 64 << 20, 48 << 20)
"""By rank: so many compressed bytes may be under way, of all ranks; one request alone is never too many."""
RUNS_AT_ONCE: Final = 3
"""What nobody waits for takes the bytes of so many full requests, for the link is shared with the next miss."""
RUN_UNKNOWN: Final = 4 << 20
"""Compressed bytes of one request while nothing is known of the link."""
RUN_SECONDS: Final = 0.25
TRIPS_A_RUN: Final = 8
"""So long a request may take, or so many round trips: none of its spans is here before its end, but many small ones
wait more than they bring."""
RUN_SLOW: Final = 1 << 20
"""However slow the link is, so many bytes may go together; at most it is `RUN_BYTES`."""
JOINS: Final = 3
JOIN_SECONDS: Final = 0.05
"""With a miss go less urgent spans of so many times its bytes, at most, if they keep its reader no longer than this."""
GAP_MOST: Final = 4 << 20
"""Compressed bytes that may be fetched along, unasked, to save one request."""
TAIL: Final = 0.1
"""Seconds: a fill that a miss finds under way is cut off where it would take longer than this still."""
QUEUED_MOST: Final = 1 << 18
"""Spans that may wait in one process."""

Key = Hashable


@dataclass(frozen=True, slots=True)
class Link:
    """What was seen of the way to a registry: bytes a second, seconds of a round trip; 0 where it is not known."""

    speed: float = 0.0
    trip: float = 0.0

    @property
    def gap(self) -> int:
        """Bytes that cost less than a request does."""
        return min(int(self.speed * self.trip), GAP_MOST)

    @property
    def run(self) -> int:
        """Bytes of one request."""
        if not self.speed:
            return min(RUN_UNKNOWN, RUN_BYTES)
        seconds = max(RUN_SECONDS, TRIPS_A_RUN * self.trip)
        return min(max(int(self.speed * seconds), RUN_SLOW), RUN_BYTES)

    def along(self, size: int) -> int:
        """Bytes of less urgent spans that go with a miss of ``size`` bytes.

        As many as it has cost its reader nothing: beside it, in a request of their own, they would take half of the
        link.
        """
        quick = min(JOINS * size, int(self.speed * JOIN_SECONDS)) if self.speed else JOINS * size
        return max(size, quick, self.gap)


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One request: ``spans`` of a layer, those of ``wanted`` in it (ascending) asked for, the others lie between."""

    key: Key
    spans: range
    wanted: tuple[int, ...]
    rank: int
    size: int  # compressed bytes


@dataclass(slots=True)
class _Layer:
    geometry: Spans
    waiting: dict[int, tuple[int, int]] = field(default_factory=dict)  # span → rank and order


def extent(geometry: Spans, run: range) -> tuple[int, int]:
    """The compressed bytes of neighbouring spans."""
    return geometry.compressed(run.start)[0], geometry.compressed(run.stop - 1)[1]


def run_around(span: int, waiting: Callable[[int], int | None], geometry: Spans, link: Link) -> range:
    """The request that brings ``span``, and what waits near it. ``waiting`` gives a span's rank.

    Spans as urgent as this one join up to `Link.run`, less urgent ones up to `Link.along`.
    """
    run = range(span, span + 1)
    if is_large(geometry, span):
        return run
    rank = waiting(span) or 0

    def urgent(other: int) -> bool:
        found = waiting(other)
        return found is not None and found <= rank

    run = _grown(run, urgent, geometry, link.gap, link.run)
    start, end = extent(geometry, run)
    most = min(link.run, end - start + link.along(end - start)) if rank == 0 else link.run
    return _grown(run, lambda other: waiting(other) is not None, geometry, link.gap, most)


def _grown(run: range, joins: Callable[[int], bool], geometry: Spans, gap: int, most: int) -> range:
    """``run`` with what ``joins`` behind it, then before it, over gaps of at most ``gap`` bytes, to ``most`` bytes."""
    for span in range(run.stop, geometry.count):
        larger = range(run.start, span + 1)
        beyond = geometry.compressed(span)[0] - geometry.compressed(run.stop - 1)[1] > gap
        if beyond or is_large(geometry, span) or _size(geometry, larger) > most:
            break
        if joins(span):
            run = larger
    for span in range(run.start - 1, -1, -1):
        larger = range(span, run.stop)
        beyond = geometry.compressed(run.start)[0] - geometry.compressed(span)[1] > gap
        if beyond or is_large(geometry, span) or _size(geometry, larger) > most:
            break
        if joins(span):
            run = larger
    return run


def _size(geometry: Spans, run: range) -> int:
    start, end = extent(geometry, run)
    return end - start


def pieces(run: Run, geometry: Spans, kept: Container[int], gap: int) -> list[Run]:
    """``run`` without the spans that are not ``kept``: so many requests as its gaps then make."""
    found: list[list[int]] = []
    for span in (span for span in run.wanted if span in kept):
        if found and geometry.compressed(span)[0] - geometry.compressed(found[-1][-1])[1] <= gap:
            found[-1].append(span)
        else:
            found.append([span])
    made = []
    for wanted in found:
        spans = range(wanted[0], wanted[-1] + 1)
        made.append(Run(run.key, spans, tuple(wanted), run.rank, _size(geometry, spans)))
    return made


class Schedule:
    """What waits, and what is under way, in one process."""

    def __init__(self) -> None:
        self._layers: dict[Key, _Layer] = {}
        self._heaps: tuple[list[tuple[int, Key, int]], ...] = ([], [], [], [])
        self._order = 0
        self.flying: set[Run] = set()
        self._bytes = 0
        self.queued = 0

    def want(self, key: Key, geometry: Spans, spans: Iterable[int], rank: int) -> None:
        """Have ``spans`` wait, or wait in a more urgent class."""
        layer = self._layers.setdefault(key, _Layer(geometry))
        for span in spans:
            now = layer.waiting.get(span)
            if now is not None and now[0] <= rank:
                continue
            self.queued += now is None
            self._order += 1
            layer.waiting[span] = rank, self._order
            heapq.heappush(self._heaps[rank], (self._order, key, span))

    def forget(self, key: Key, spans: Iterable[int]) -> None:
        """Nobody needs these any more."""
        layer = self._layers.get(key)
        for span in spans if layer else ():
            if layer and layer.waiting.pop(span, None):
                self.queued -= 1
        if layer and not layer.waiting:
            del self._layers[key]

    def waits(self, rank: int) -> bool:
        """Whether a span of this rank or a more urgent one waits or is under way."""
        return any(self._head(of) for of in range(rank + 1)) or any(run.rank <= rank for run in self.flying)

    def take(self, link: Callable[[Key], Link], may_fill: Callable[[], bool] = lambda: True) -> Run | None:
        """The next request, which is under way from now on; None where none may begin now.

        ``may_fill`` is asked before a fill begins: whether nobody waits elsewhere.
        """
        for rank in range(len(CLASSES)):
            head = self._head(rank)
            if head is None:
                continue
            if len(self.flying) >= REQUESTS[rank]:
                return None
            if rank == FILL_RANK and (self.waits(FILL_RANK - 1) or not may_fill()):
                return None
            key, span = head
            layer = self._layers[key]

            def waiting(other: int, layer: _Layer = layer) -> int | None:
                found = layer.waiting.get(other)
                return None if found is None else found[0]

            spans = run_around(span, waiting, layer.geometry, link(key))
            size = _size(layer.geometry, spans)
            most = min(BYTES[rank], RUNS_AT_ONCE * link(key).run) if rank else BYTES[rank]
            if self.flying and self._bytes + size > most:
                return None
            run = Run(key, spans, tuple(one for one in spans if one in layer.waiting), rank, size)
            self.forget(key, run.wanted)
            self.begin(run)
            return run
        return None

    def begin(self, run: Run) -> None:
        """``run`` is under way: it counts against the limits."""
        self.flying.add(run)
        self._bytes += run.size

    def end(self, run: Run) -> None:
        """``run`` is over, however it ended."""
        self.flying.remove(run)
        self._bytes -= run.size

    def _head(self, rank: int) -> tuple[Key, int] | None:
        heap = self._heaps[rank]
        while heap:
            order, key, span = heap[0]
            layer = self._layers.get(key)
            if layer and layer.waiting.get(span) == (rank, order):
                return key, span
            heapq.heappop(heap)  # it was taken, forgotten, or is more urgent now
        return None


def hinders(run: Run, seconds: float, link: Link) -> bool:
    """Whether a fill that began ``seconds`` ago is cut off for a miss: not where it is all but here."""
    return run.rank == FILL_RANK and (not link.speed or run.size / link.speed - seconds > TAIL)
