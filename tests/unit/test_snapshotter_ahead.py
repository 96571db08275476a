# SPDX-License-Identifier: Apache-2.0
"""Which layers of an image are begun with, when one of them is called for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from soci.digest import sha256_digest
from soci_snapshotter.ahead import AHEAD_LAYERS, Ahead, place_of

A, B, C = (sha256_digest(name) for name in (b"a", b"b", b"c"))


@pytest.mark.parametrize(
    ("calls", "last"),
    [
        ((0,), [0, 1, 2, 3]),
        ((2,), [2, 3]),  # what lies below is there
        ((0, 1), []),
        ((2, 3), []),
        ((2, 0), [0, 1]),  # two pulls, of which one found more here
        ((0, 1, 1), [1, 2, 3]),  # it failed, and is called for again
        ((0, 1, 2, 3, 0), [0, 1, 2, 3]),  # the image was removed meanwhile
        ((0, 1, 2, 3, 2, 3), []),
        ((4,), []),
    ],
)
def test_each_once_a_pull(calls: Sequence[int], last: Sequence[int]) -> None:
    """At its first call a pull begins with that layer and all above; a layer called for twice begins a pull anew."""
    ahead = Ahead()
    assert [ahead.call(place, 4) for place in calls][-1] == last


def test_no_endless_image() -> None:
    """So many layers are looked at as the limit says; the others when it is nearer their turn."""
    ahead = Ahead()
    assert len(ahead.call(0, 10 * AHEAD_LAYERS)) == AHEAD_LAYERS
    assert ahead.call(5, 10 * AHEAD_LAYERS) == list(range(AHEAD_LAYERS, AHEAD_LAYERS + 5))


@pytest.mark.parametrize(
    ("layer", "below", "place"),
    [(A, 0, 0), (B, 1, 1), (B, 0, 1), (A, 2, 2), (A, 1, 2), (A, 3, 0), (B, 9, 1), (C, 0, None), (A, -1, 0)],
)
def test_the_place_of_a_layer(layer: str, below: int, place: int | None) -> None:
    """The layer that is just there, of those that an image has more than once; and some place, where it is not."""
    layers = (A, B, A)
    assert place_of(A if layer == A else B if layer == B else C, below, layers) == place
