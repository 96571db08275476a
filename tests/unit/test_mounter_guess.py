# SPDX-License-Identifier: Apache-2.0
"""Which spans are fetched along with a miss."""

from __future__ import annotations

import random

import pytest

from soci_mounter.guess import BEHIND, NEAR, UNREAD, UNREAD_SHARE, Guesses

COUNT = 1000


class Layer:
    """A layer that a fetcher fills at once."""

    def __init__(self) -> None:
        self.guesses = Guesses()
        self.here: set[int] = set()
        self.asks = 0

    def missing(self, spans: range) -> list[int]:
        return [span for span in spans if span not in self.here]

    def read(self, span: int) -> int:
        """Read one span; how many were fetched along."""
        along = 0
        if span not in self.here:
            self.asks += 1
            along = self.guesses.behind(range(span, span + 1), self.missing, COUNT)
            self.here.update(range(span, span + 1 + along))
        self.guesses.read(range(span, span + 1))
        return along


@pytest.mark.parametrize(
    ("before", "span", "along"),
    [
        ([], 5, 0),
        ([5 + NEAR + 1], 5, 0),
        ([4], 5, BEHIND),
        ([50 - NEAR], 50, BEHIND),
        ([50 - NEAR - 1], 50, 0),
        ([9], 5, 3),
        ([6], 5, 0),
        ([COUNT - 2], COUNT - 1, 0),
    ],
)
def test_what_goes_along(before: list[int], span: int, along: int) -> None:
    """Nothing alone; near others the next ones, or what lies between."""
    layer = Layer()
    for one in before:
        layer.read(one)
    assert layer.read(span) == along


def test_reading_here_and_there_fetches_little_for_nobody() -> None:
    """Whatever is read, guesses that nobody read are few."""
    layer, dice = Layer(), random.Random(1)
    read: set[int] = set()
    for _ in range(400):
        span = dice.randrange(COUNT)
        layer.read(span)
        read.add(span)
        assert len(layer.here - read) <= UNREAD + len(read) // UNREAD_SHARE


START = (49, 53, 56, 52, 51, 57, 62, 63, 58, 60, 54, 50, 55, 59, 76, 1, 68, 74, 69, 66, 65, 64, 67, 106, 70)
"""In which order a start of pandas reads the spans of its layer."""


def test_a_start_takes_fewer_asks() -> None:
    """Of a program's start, with hardly a byte for nobody."""
    layer = Layer()
    for span in START:
        layer.read(span)
    assert layer.asks <= 0.75 * len(START)
    assert len(layer.here) <= 1.15 * len(START)
