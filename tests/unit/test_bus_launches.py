# SPDX-License-Identifier: Apache-2.0
"""A launch as its events tell it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soci.digest import Digest
from soci_bus import events, launches
from soci_bus.launches import LayerView, fold_launch
from soci_bus.wire import Envelope
from support.bus import D1, D2, LAUNCH

SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND


def at(seconds: float, event: events.Event, sequence: int = 0) -> Envelope:
    return Envelope(event, "n1", START + int(seconds * SECOND), sequence)


STARTED = events.LaunchStarted(LAUNCH, "r/a:1", "sha256:m", "default", "pull")
LAZY = events.ModeChosen(LAUNCH, D1, "lazy", "has a zTOC", 1000, 0.5)
WHOLE = events.ModeChosen(LAUNCH, D2, "whole", "too small", 10, 0.25)
MISSED = events.Missed(LAUNCH, "m1", D1, "/bin/sh", 0, 2, 0.5)
FAILED = events.Missed(LAUNCH, "m1", D1, "/bin/sh", 3, 3, 1.0, "mismatch: span 3")
ARRIVED = events.SpansArrived(LAUNCH, D1, 0, 2, "miss", 500, 1, 0.4)
WHOLE_ARRIVED = events.LayerArrived(LAUNCH, D2, 10, 0.1)
REJECTED = events.SpanRejected(LAUNCH, D1, 3, "mismatch")
FETCH_FAILED = events.FetchFailed(LAUNCH, D1, "spans 3..3", "mismatch")
STORY = [
    at(0, STARTED, 1),
    at(0.1, events.IndexChosen(LAUNCH, D1, "v1-referrer", ""), 2),
    at(1, LAZY, 3),
    at(2, WHOLE_ARRIVED, 4),
    at(2, WHOLE, 5),
    at(3, events.ContainerPrepared(LAUNCH, "k", 2, 1), 6),
    at(4, ARRIVED, 7),
    at(4.5, MISSED, 8),
    at(5, REJECTED, 9),
    at(6, FETCH_FAILED, 10),
    at(7, FAILED, 11),
]


def test_layers_stand_as_they_were_prepared() -> None:
    """Bytes of an upper layer that came ahead of its turn do not put it before those below."""
    view = fold_launch(LAUNCH, [at(0, STARTED, 1), at(1, WHOLE_ARRIVED, 2), at(2, LAZY, 3), at(3, WHOLE, 4)])
    assert view is not None
    assert [layer.layer for layer in view.layers] == [D1, D2]


def test_the_whole_story() -> None:
    """Everything that events tell is in the view, in seconds from the start."""
    view = fold_launch(LAUNCH, STORY)
    assert view is not None
    assert (view.image, view.namespace, view.by, view.node) == ("r/a:1", "default", "pull", "n1")
    assert (view.index, view.found_by, view.started_ns) == (D1, "v1-referrer", START)
    assert (view.container_at, view.last_event_at) == (3.0, 7.0)
    assert view.layers == [
        LayerView(D1, "lazy", "has a zTOC", 1000, 0.5, 500, 1, 2),
        LayerView(D2, "whole", "too small", 10, 0.25, 10, 1, 0),
    ]
    assert [(miss.at, miss.path, miss.failed) for miss in view.misses] == [
        (4.0, "/bin/sh", ""),
        (6.0, "/bin/sh", "mismatch: span 3"),
    ]
    assert (view.miss_count, view.waited, view.failed_reads) == (2, 1.5, 1)
    assert (view.fetched_bytes, view.requests, view.rejected_spans) == (510, 2, 1)
    assert view.failures == [f"spans 3..3 of {D1}: mismatch"]
    assert (view.count("lazy"), view.count("whole"), view.count("defer")) == (1, 1, 0)


@settings(deadline=None)
@given(st.permutations(STORY))
def test_any_order_gives_the_same_view(order: list[Envelope]) -> None:
    """Events are put in order by their time and place, however they came."""
    assert fold_launch(LAUNCH, order) == fold_launch(LAUNCH, STORY)


@settings(deadline=None)
@given(st.lists(st.sampled_from(STORY), unique_by=lambda envelope: envelope.sequence))
def test_a_launch_that_lost_events_is_still_shown(some: list[Envelope]) -> None:
    """Any of the events may be missing; counts then are of those that are there."""
    view = fold_launch(LAUNCH, some)
    assert (view is None) == (not some)
    if view:
        assert view.miss_count == sum(isinstance(one.event, events.Missed) for one in some)
        assert view.last_event_at >= 0


@pytest.mark.parametrize(
    ("story", "field", "value"),
    [
        ([at(2, STARTED), at(1, LAZY)], "started_ns", START + 2 * SECOND),
        ([at(1, LAZY)], "started_ns", START + SECOND),
        ([at(0, STARTED), at(9, events.LaunchStarted(LAUNCH, "b", "", "", "container"))], "image", "r/a:1"),
        ([at(1, events.ContainerPrepared(LAUNCH, "a", 1, 1)), at(5, events.ContainerPrepared(LAUNCH, "b", 1, 1))],
         "container_at", 0.0),
        ([at(0, events.IndexChosen(LAUNCH, None, "", "no index"))], "no_index", "no index"),
        ([at(0, MISSED)], "layers", [LayerView(D1, "lazy", "shown by an earlier launch", misses=1)]),
        ([at(0, LAZY), at(1, events.ModeChosen(LAUNCH, D1, "whole", "again", None, 2.0))],
         "layers", [LayerView(D1, "whole", "again", None, 2.0)]),
        ([at(0, events.IndexBegun("j", "x"))], "layers", []),
    ],
    ids=["start is the start", "no start", "first image", "first container", "no index", "only read", "last mode", "other"],
)  # fmt: skip
def test_odd_stories(story: list[Envelope], field: str, value: object) -> None:
    """Each case's one field."""
    assert getattr(fold_launch(LAUNCH, story), field) == value


def test_nothing_gives_nothing() -> None:
    """A launch without events is none."""
    assert fold_launch(LAUNCH, []) is None


def test_lists_are_bounded_and_counts_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many events there are, lists stay below their limits and nothing is lost from the sums."""
    for name in ("MISSES_SHOWN", "FAILURES_SHOWN", "LAYERS_SHOWN"):
        monkeypatch.setattr(launches, name, 3)
    story = [at(0, STARTED)]
    for number in range(10):
        digest = Digest(f"sha256:{number:064}")
        story.append(at(number, events.Missed(LAUNCH, "m", digest, "/x", 0, 0, 1.0), number))
        story.append(at(number, events.SpansArrived(LAUNCH, digest, 0, 0, "miss", 7, 1, 1.0), number + 100))
        story.append(at(number, events.FetchFailed(LAUNCH, digest, "x", "y"), number + 200))
    view = fold_launch(LAUNCH, story)
    assert view is not None
    assert len(view.misses) == len(view.failures) == 3
    assert len(view.layers) == 4
    assert view.layers[-1] == LayerView(Digest(""), "lazy", "all further layers", None, 0.0, 49, 7, 7)
    assert (view.miss_count, view.fetched_bytes) == (10, 70)
