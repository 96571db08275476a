# SPDX-License-Identifier: Apache-2.0
"""What requests tell of the link they came over."""

from __future__ import annotations

import pytest

from soci_fetcher import links as module
from soci_fetcher.links import Links, Sample, bandwidth, round_trip

MB = 1_000_000


def test_overlapping_requests_share_the_link() -> None:
    """Two requests at a time are one stretch: what came in it, by its length."""
    assert bandwidth([Sample(0, 1, 10 * MB), Sample(0.5, 2, 10 * MB)]) == pytest.approx(10e6)


def test_pauses_between_requests_do_not_count() -> None:
    """A link that was idle is not slow."""
    assert bandwidth([Sample(0, 1, 10 * MB), Sample(100, 101, 10 * MB)]) == pytest.approx(10e6)


def test_the_order_of_samples_does_not_count() -> None:
    """Requests end in another order than they begin."""
    one, other = Sample(0, 2, 10 * MB), Sample(1, 1.5, 10 * MB)
    assert bandwidth([other, one]) == bandwidth([one, other]) == pytest.approx(10e6)


def test_small_requests_say_nothing_of_the_bandwidth() -> None:
    """A stretch that brought little is all round trip, and is left out."""
    assert bandwidth([Sample(0, 1, 1000)]) == 0
    assert bandwidth([Sample(0, 1, 1000), Sample(5, 6, 8 * MB)]) == pytest.approx(8e6)


def test_round_trip_is_what_bytes_do_not_explain() -> None:
    """The quickest request, without the time that its bytes took."""
    assert round_trip([Sample(0, 1.02, 10 * MB), Sample(2, 3.5, 10 * MB)], 10e6) == pytest.approx(0.02)
    assert round_trip([Sample(0, 0.5, 10 * MB)], 10e6) == 0  # never less than nothing
    assert round_trip([], 10e6) == 0


def test_each_registry_has_its_own() -> None:
    """What one registry gives says nothing of another; a failed request says nothing at all."""
    now = 0.0
    links = Links(lambda: now)
    with links.request("a") as sample:
        now += 1
        sample.size = 5 * MB
    with pytest.raises(OSError), links.request("b"):
        raise OSError
    assert links.seen("a") == pytest.approx((5e6, 0.0))
    assert links.seen("b") == links.seen("c") == (0.0, 0.0)


def test_memory_is_bounded() -> None:
    """However many registries and requests there are, so many are remembered."""
    now = 0.0
    links = Links(lambda: now)
    for number in range(module.REGISTRIES + 5):
        for _ in range(module.SAMPLES + 5):
            with links.request(str(number)) as sample:
                now += 1
                sample.size = 2 * MB
    assert links.seen("0") == (0.0, 0.0)
    assert links.seen("10")[0] == pytest.approx(2e6)
    assert len(links._samples) == module.REGISTRIES
    assert max(map(len, links._samples.values())) == module.SAMPLES
