# SPDX-License-Identifier: Apache-2.0
"""Times of members."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci.toc_time import ZERO_INSTANT_NS, parse_rfc3339_ns
from soci.tree import LayerTree
from support.trees import at, entry


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1969-12-31T23:59:58.5Z", -1_500_000_000),
        ("2024-02-29T12:00:00.123456789Z", 1_709_208_000_123_456_789),
        ("2024-02-29T07:00:00-05:00", 1_709_208_000_000_000_000),
        ("2024-02-29T17:45:00+05:45", 1_709_208_000_000_000_000),
        ("0001-01-01T00:00:00Z", ZERO_INSTANT_NS),
        ("0000-01-01T00:00:00Z", ZERO_INSTANT_NS - 366 * 86_400 * 10**9),
        ("0000-02-29T00:00:00Z", ZERO_INSTANT_NS - (366 - 59) * 86_400 * 10**9),
        ("9999-12-31T23:59:59.999999999Z", 253_402_300_799_999_999_999),
        ("1900-03-01T00:00:00Z", -2_203_891_200 * 10**9),
    ],
)
def test_rfc3339_times(text: str, ns: int) -> None:
    """Any year, fraction and offset gives exact nanoseconds; a tree shows what is before the epoch as the epoch."""
    assert parse_rfc3339_ns(text) == ns
    assert at(LayerTree.of([entry(b"f", time=text)]), b"f").mtime_ns == max(ns, 0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "now",
        "2024-02-30T00:00:00Z",
        "1900-02-29T00:00:00Z",
        "2024-13-01T00:00:00Z",
        "2024-00-01T00:00:00Z",
        "2024-01-00T00:00:00Z",
        "2024-01-01T24:00:00Z",
        "2024-01-01T00:60:00Z",
        "2024-01-01T00:00:60Z",
        "2024-01-01T00:00:00",
        "2024-01-01T00:00:00.Z",
        "2024-01-01T00:00:00+25:00",
        "2024-01-01T00:00:00+01:60",
        "2024-01-01 00:00:00Z",
        "2024-01-01T00:00:00Z\n",
        "٢٠٢٤-01-01T00:00:00Z",
        "12024-01-01T00:00:00Z",
    ],
)
def test_times_that_do_not_parse_are_the_zero_instant(text: str) -> None:
    """A strange time is 0001-01-01T00:00:00Z and never an error."""
    assert parse_rfc3339_ns(text) == ZERO_INSTANT_NS


@given(st.datetimes())
def test_times_agree_with_datetime(moment: datetime) -> None:
    """For the years that datetime knows, both count the same microseconds."""
    since = moment.replace(tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)
    assert parse_rfc3339_ns(moment.isoformat() + "Z") == since // timedelta(microseconds=1) * 1000
