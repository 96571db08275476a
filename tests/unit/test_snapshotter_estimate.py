# SPDX-License-Identifier: Apache-2.0
"""Which way a layer is sooner here."""

from __future__ import annotations

import pytest

from soci_snapshotter.estimate import MOUNT_SECONDS, USUAL_LINK, Link, Need, costs

MB = 1_000_000
GIGABIT, FAR = Link(125e6, 0.001), Link(3e6, 0.15)


@pytest.mark.parametrize(
    ("size", "link", "need", "here", "sooner"),
    [
        (1000, None, None, 0.0, "whole"),  # the mount alone takes longer
        (1 * MB, None, None, 0.0, "whole"),
        (100 * MB, None, None, 0.0, "lazy"),
        (2 * MB, GIGABIT, None, 0.0, "whole"),
        (500 * MB, GIGABIT, None, 0.0, "lazy"),
        (2 * MB, FAR, None, 0.0, "lazy"),
        (50 * MB, FAR, Need(0.05, 4), 0.0, "lazy"),
        (50 * MB, FAR, Need(1.0, 40), 0.0, "whole"),  # every byte is needed, each after a wait
        (50 * MB, GIGABIT, Need(0.9, 300), 0.0, "whole"),  # many small reads all over
        (50 * MB, GIGABIT, Need(0.9, 300), 0.9, "lazy"),  # but they are here
        (500 * MB, GIGABIT, Need(0.0, 0), 0.0, "lazy"),  # launches never looked at it
    ],
)
def test_the_sooner_way(size: int, link: Link | None, need: Need | None, here: float, sooner: str) -> None:
    """For sizes, links and histories that are clear cases, the right way costs less."""
    found = costs(size, link, need, here=here)
    assert ("whole" if found.whole < found.lazy else "lazy") == sooner


def test_what_is_here_costs_nothing_but_the_mount() -> None:
    """A layer of which all that launches need is in the cache is shown, and waits for nothing."""
    assert costs(100 * MB, GIGABIT, Need(0.4, 9), here=0.4).lazy == pytest.approx(MOUNT_SECONDS)


@pytest.mark.parametrize(
    ("size", "need", "table", "waited"),
    [
        (48.8 * MB, Need(10 / 29, 4), 2.16 * MB, 1.25),
        (16.5 * MB, Need(10 / 12, 1), 0.74 * MB, 1.16),
        (156.6 * MB, Need(25 / 126, 6), 6.79 * MB, 2.8),
    ],
)
def test_a_launch_that_was_measured(size: float, need: Need, table: float, waited: float) -> None:
    """What the layers of the demo's image waited for at 200 Mbit/s and 20 ms is what the estimate says, within a
    quarter."""
    assert costs(int(size), Link(25e6, 0.02), need, table=int(table)).lazy == pytest.approx(waited, rel=0.25)


def test_a_table_of_contents_has_to_come_too() -> None:
    """As long as it is not here."""
    without, with_table = (costs(50 * MB, GIGABIT, None, table=table) for table in (0, 5 * MB))
    assert with_table.lazy - without.lazy == pytest.approx(5 * MB / GIGABIT.bytes_per_second)
    assert with_table.whole == without.whole


def test_an_unseen_link_is_the_usual_one() -> None:
    """Where nothing was seen yet, the named constants are used."""
    assert costs(5 * MB, None, None) == costs(5 * MB, USUAL_LINK, None)


@pytest.mark.parametrize("size", [0, 1, 10 * MB, 1 << 50])
def test_costs_are_sane(size: int) -> None:
    """Neither way costs less than nothing, and more bytes never cost less."""
    one, more = costs(size, GIGABIT, None), costs(size * 2, GIGABIT, None)
    assert 0 < one.lazy <= more.lazy
    assert 0 < one.whole <= more.whole
