# SPDX-License-Identifier: Apache-2.0
"""Which spans are fetched next, and in which requests."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soci.digest import Digest
from soci.span import Spans
from soci_fetcher.pace import LATE, LEAST, MOST, SLOW, STEP, Pace, Round
from soci_fetcher.runs import RUN_BYTES
from soci_fetcher.schedule import (
    BYTES,
    CLASSES,
    GAP_MOST,
    JOINS,
    REQUESTS,
    RUN_SLOW,
    RUN_UNKNOWN,
    Link,
    Run,
    Schedule,
    hinders,
    pieces,
)

MIB = 1 << 20
MISS, AHEAD, ORDER, FILL = range(4)
FAST_FAR = Link(100 * MIB, 0.02)  # 2 MiB are on their way at a time
UNKNOWN = Link()


def layer(*sizes: int) -> Spans:
    """Spans of so many compressed bytes, ten times as large when inflated."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    starts = [0, *ends[:-1]]
    outs = [10 * start for start in starts]
    return Spans(10 * ends[-1], len(sizes), (Digest("sha256:" + "0" * 64),) * len(sizes), starts, ends, outs, None)


EVEN = layer(*[MIB] * 100)


def taken(found: Schedule, link: Link = UNKNOWN) -> list[tuple[int, int, int]]:
    """All runs that may begin now: first, last, rank."""
    runs = []
    while run := found.take(lambda _key: link):
        runs.append((run.spans.start, run.spans.stop - 1, run.rank))
    return runs


def all_runs(found: Schedule, link: Link) -> list[tuple[int, int, int]]:
    """All runs, each over as soon as it has begun."""
    runs = []
    while run := found.take(lambda _key: link):
        runs.append((run.spans.start, run.spans.stop - 1, run.rank))
        found.end(run)
    return runs


@pytest.mark.parametrize(
    ("asked", "link", "expected"),
    [
        ([([5], MISS)], UNKNOWN, [(5, 5, MISS)]),
        ([(range(3, 6), MISS)], UNKNOWN, [(3, 5, MISS)]),
        # What several asked for, in whatever order, is one request.
        ([([4], MISS), ([3], MISS), ([5], MISS)], UNKNOWN, [(3, 5, MISS)]),
        # A large ask is cut at what a request may have.
        ([(range(10), MISS)], UNKNOWN, [(0, 3, MISS), (4, 7, MISS), (8, 9, MISS)]),
        ([(range(32), MISS)], FAST_FAR, [(0, 15, MISS), (16, 31, MISS)]),
        # A gap is fetched along where it costs less than a request.
        ([([3], MISS), ([5], MISS)], UNKNOWN, [(3, 3, MISS), (5, 5, MISS)]),
        ([([3], MISS), ([5], MISS)], FAST_FAR, [(3, 5, MISS)]),
        ([([3], MISS), ([7], MISS)], FAST_FAR, [(3, 3, MISS), (7, 7, MISS)]),
        # The most urgent is first, whenever it came; what waits beside it goes along as far as it costs little.
        (
            [(range(10, 14), FILL), (range(8), AHEAD), ([20], MISS)],
            UNKNOWN,
            [(20, 20, MISS), (0, 3, AHEAD), (4, 7, AHEAD), (10, 13, FILL)],
        ),
        ([(range(8), AHEAD), ([3], MISS)], UNKNOWN, [(3, 6, MISS), (0, 2, AHEAD), (7, 7, AHEAD)]),
        ([(range(1, 20), AHEAD), ([0], MISS)], FAST_FAR, [(0, 3, MISS), (4, 19, AHEAD)]),
        ([([2], ORDER), ([3], AHEAD)], UNKNOWN, [(2, 3, AHEAD)]),
        # Asked for again, less urgently: nothing changes.
        ([([5], MISS), ([5], FILL)], UNKNOWN, [(5, 5, MISS)]),
        ([(range(4), FILL)], UNKNOWN, [(0, 3, FILL)]),
        ([(range(4), FILL), ([50], AHEAD)], UNKNOWN, [(50, 50, AHEAD), (0, 3, FILL)]),
        ([(range(4), FILL), ([50], ORDER)], UNKNOWN, [(50, 50, ORDER), (0, 3, FILL)]),
    ],
)
def test_which_requests_are_made(
    asked: list[tuple[list[int] | range, int]], link: Link, expected: list[tuple[int, int, int]]
) -> None:
    """The table of decisions, one layer."""
    found = Schedule()
    for spans, rank in asked:
        found.want("layer", EVEN, spans, rank)
    assert all_runs(found, link) == expected


def test_misses_have_a_reserve() -> None:
    """However much of the other classes is under way, a miss begins at once; read-ahead and the others leave it."""
    found = Schedule()
    for n in range(40):
        found.want(n, EVEN, [0], AHEAD)
    assert len(taken(found)) == REQUESTS[AHEAD]
    for n in range(40):
        found.want(n, EVEN, [50], MISS)
    assert {rank for _, _, rank in taken(found)} == {MISS}
    assert len(found.flying) == REQUESTS[MISS]
    assert not found.take(lambda _key: UNKNOWN)
    found.end(next(iter(found.flying)))
    run = found.take(lambda _key: UNKNOWN)
    assert run
    assert run.rank == MISS


def test_bytes_under_way_are_bounded() -> None:
    """Large spans fill a class's bytes before its requests; one alone is never too large."""
    found, large = Schedule(), layer(*[60 * MIB] * 8)
    found.want("layer", large, range(0, 8, 2), MISS)
    assert len(taken(found)) == BYTES[MISS] // (60 * MIB)
    other, whole = Schedule(), layer(1, 60 * MIB)
    other.want("layer", whole, [1], FILL)
    assert taken(other) == [(1, 1, FILL)]


@pytest.mark.parametrize(("link", "runs"), [(UNKNOWN, 3), (Link(8 * MIB, 0.01), 3), (FAST_FAR, 3)])
def test_read_ahead_leaves_the_link_to_the_next_miss(link: Link, runs: int) -> None:
    """However much is to be read ahead, only so much is under way that a miss soon has its share of the link."""
    found, geometry = Schedule(), layer(*[MIB // 4] * 400)
    found.want("layer", geometry, range(400), AHEAD)
    assert len(taken(found, link)) == runs
    found.want("other", geometry, [7], MISS)
    assert taken(found, link) == [(7, 7, MISS)]


def test_what_is_forgotten_is_not_fetched() -> None:
    """Spans that nobody wants any more leave the queue, and its count."""
    found = Schedule()
    found.want("layer", EVEN, range(8), FILL)
    found.forget("layer", [0, 1, 5, 99])
    found.forget("other", [0])
    assert found.queued == 5
    assert taken(found) == [(2, 4, FILL), (6, 7, FILL)]
    assert found.queued == 0


@pytest.mark.parametrize("rank", [MISS, AHEAD, ORDER])
def test_nothing_is_filled_while_anything_else_is_under_way(rank: int) -> None:
    """A fill begins when all that is more urgent is over."""
    found = Schedule()
    found.want("layer", EVEN, range(4), FILL)
    found.want("other", EVEN, [50], rank)
    run = found.take(lambda _key: UNKNOWN)
    assert run
    assert run.rank == rank
    assert found.take(lambda _key: UNKNOWN) is None
    found.end(run)
    assert taken(found) == [(0, 3, FILL)]


def test_fill_asks_first() -> None:
    """A fill begins only if nobody waits elsewhere; what is urgent does not ask."""
    found = Schedule()
    found.want("layer", EVEN, [1], FILL)
    assert found.take(lambda _key: UNKNOWN, lambda: False) is None
    found.want("layer", EVEN, [50], MISS)
    run = found.take(lambda _key: UNKNOWN, lambda: False)
    assert run
    assert run.wanted == (50,)


def test_a_span_too_large_for_memory_goes_alone() -> None:
    """It joins no other, though they are neighbours."""
    found = Schedule()
    found.want("layer", layer(MIB, 100 * MIB, MIB), [0, 1, 2], MISS)
    assert sorted(taken(found)) == [(0, 0, MISS), (1, 1, MISS), (2, 2, MISS)]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 39), st.integers(1, 12), st.integers(0, 3)), min_size=1, max_size=12),
    st.sampled_from([UNKNOWN, FAST_FAR, Link(MIB, 0.5)]),
)
def test_every_span_is_fetched_once(asks: list[tuple[int, int, int]], link: Link) -> None:
    """Whatever is asked for, in the end each span was in one request, and no request is beyond its limits."""
    found, geometry = Schedule(), layer(*[MIB // 2, 2 * MIB, 100] * 20)
    wanted: set[int] = set()
    for first, count, rank in asks:
        wanted |= set(range(first, first + count))
        found.want("layer", geometry, range(first, first + count), rank)
    got: list[int] = []
    while run := found.take(lambda _key: link):
        got += run.wanted
        assert run.size <= max(link.run, 2 * MIB)
        assert {run.spans[0], run.spans[-1]} <= set(run.wanted)
        found.end(run)
    assert sorted(got) == sorted(wanted)
    assert found.queued == 0
    assert not found.flying


@pytest.mark.parametrize(
    ("link", "gap", "run"),
    [
        (UNKNOWN, 0, RUN_UNKNOWN),
        (Link(10 * MIB, 0.001), 10485, 2.5 * MIB),
        (Link(MIB, 0.01), 10485, RUN_SLOW),
        (Link(500 * MIB, 0.0002), 104857, RUN_BYTES),
        (FAST_FAR, 2 * MIB, RUN_BYTES),
        (Link(10 * MIB, 0.1), MIB, 8 * MIB),
        (Link(1000 * MIB, 1.0), GAP_MOST, RUN_BYTES),
    ],
)
def test_the_link_decides_how_large(link: Link, gap: int, run: float) -> None:
    """Gaps cost less than a round trip, requests take several of them, or a moment, both within bounds."""
    assert (link.gap, link.run) == pytest.approx((gap, run), rel=1e-3)


@pytest.mark.parametrize(
    ("link", "along"),
    [
        (UNKNOWN, JOINS * MIB),
        (Link(1000 * MIB, 0.0001), JOINS * MIB),
        (Link(25 * MIB, 0.02), 1.25 * MIB),
        (Link(5 * MIB, 0.02), MIB),
        (Link(100 * MIB, 0.1), GAP_MOST),
    ],
)
def test_how_much_goes_with_a_miss(link: Link, along: float) -> None:
    """As much as the miss has, more where the link is quick, and what costs less than a round trip."""
    assert link.along(MIB) == pytest.approx(along, rel=1e-3)


def test_a_run_without_what_others_are_at() -> None:
    """What is taken out of a run leaves one request, or several where the gap would cost too much."""
    run = Run("layer", range(2, 8), (2, 3, 5, 6, 7), MISS, 6 * MIB)
    assert [piece.spans for piece in pieces(run, EVEN, {2, 3, 5, 6, 7}, MIB)] == [range(2, 8)]
    assert [piece.spans for piece in pieces(run, EVEN, {2, 6, 7}, MIB)] == [range(2, 3), range(6, 8)]
    assert [piece.size for piece in pieces(run, EVEN, {6}, 0)] == [MIB]
    assert pieces(run, EVEN, (), MIB) == []


@pytest.mark.parametrize(
    ("rank", "seconds", "link", "expected"),
    [
        (AHEAD, 0.0, UNKNOWN, False),
        (FILL, 0.0, UNKNOWN, True),
        (FILL, 0.0, Link(10 * MIB, 0.01), True),
        (FILL, 0.35, Link(10 * MIB, 0.01), False),
        (FILL, 0.0, Link(1000 * MIB, 0.01), False),
    ],
)
def test_which_fills_are_cut_off(rank: int, seconds: float, link: Link, *, expected: bool) -> None:
    """Only fills, and not where they are all but here."""
    run = Run("layer", range(4), (0, 1, 2, 3), rank, 4 * MIB)
    assert hinders(run, seconds, link) is expected


def test_the_classes_are_those_of_the_asks() -> None:
    """In their order."""
    assert CLASSES == ("miss", "read-ahead", "load-order", "fill")


@pytest.mark.parametrize(
    ("pace", "seen", "size"),
    [
        (Pace(8 * MIB), Round(8 * MIB, 1.0), 8 * MIB + STEP),
        (Pace(MOST), Round(MOST, 1.0), MOST),
        (Pace(8 * MIB), Round(8 * MIB, 1.0, disturbed=True), 4 * MIB),
        (Pace(LEAST), Round(LEAST, 1.0, disturbed=True), LEAST),
        (Pace(8 * MIB, 1.0 / (8 * MIB)), Round(8 * MIB, SLOW * 1.1), 4 * MIB),
        (Pace(8 * MIB, 1.0 / (8 * MIB)), Round(8 * MIB, SLOW * 0.9), 8 * MIB + STEP),
        (Pace(8 * MIB), Round(8 * MIB, 1.0, misses=LATE * 1.1), 4 * MIB),
        (Pace(8 * MIB), Round(0, 1.0), 8 * MIB + STEP),
    ],
)
def test_the_pace_of_fill(pace: Pace, seen: Round, size: int) -> None:
    """More after what went well, half after what did not, within bounds."""
    assert pace.after(seen).size == size


def test_a_slow_link_becomes_the_usual_one() -> None:
    """A link that is slower for good is not held against a quicker past for ever."""
    pace = Pace(MOST, 1.0 / MOST)
    for _ in range(40):
        pace = pace.after(Round(pace.size, 10.0 * pace.size / MOST))
    assert pace.size == MOST
