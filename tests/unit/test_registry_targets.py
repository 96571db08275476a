# SPDX-License-Identifier: Apache-2.0
"""Redirect targets: how long a signature says that it is good, and who asks for a new one."""

from __future__ import annotations

import asyncio

import pytest

from soci_registry.targets import Targets, lifetime

NOW = 1_700_000_000.0
KEY = ("http://reg/v2/app/blobs/", "sha256:1")


@pytest.mark.parametrize(
    ("url", "seconds"),
    [
        ("https://s/b", None),
        ("https://s/b?X-Amz-Date=20240101T000000Z&X-Amz-Expires=1200&X-Amz-Signature=x", 1200),
        ("https://s/b?x-goog-expires=60", 60),
        ("https://s/b?Expires=1700000300&Signature=x", 300),
        ("https://s/b?Expires=1600000000", 0),
        ("https://s/b?se=2023-11-14T22%3A23%3A20Z&sig=x", 600),
        ("https://s/b?X-Amz-Expires=-5", None),
        ("https://s/b?Expires=Thu", None),
        ("https://s/b?se=soon", None),
        ("https://s/b?Expires=" + "9" * 40, None),
        ("https://[/b?Expires=5", None),
        ("https://s/b?" + "a=b&" * 100, None),
    ],
)
def test_how_long_a_signature_is_good(url: str, seconds: float | None) -> None:
    """The lifetimes of the common stores are read; nonsense says nothing."""
    assert lifetime(url, NOW) == seconds


def test_what_is_out_of_date_is_not_used() -> None:
    """A target is used for nine tenths of its life; one that names no end is used until it is refused."""
    now = [0.0]
    targets = Targets(10, clock=lambda: now[0], wall=lambda: NOW)
    targets.keep(KEY, "https://s/b?X-Amz-Expires=100")
    targets.keep((KEY[0], "2"), "https://s/b")
    now[0] = 89.0
    targets.keep(KEY, "https://s/b?X-Amz-Expires=100")  # used: that makes it no younger
    assert targets.get(KEY) is not None
    now[0] = 90.0
    assert targets.get(KEY) is None
    now[0] = 1e9
    assert targets.get((KEY[0], "2")) == "https://s/b"


def test_what_is_remembered_is_bounded() -> None:
    """However many blobs there are, so many targets are kept, those used last."""
    targets = Targets(3)
    for number in range(5):
        targets.keep((KEY[0], str(number)), f"https://s/{number}")
        targets.get((KEY[0], "0"))
    assert [targets.get((KEY[0], str(number))) is not None for number in range(5)] == [True, False, False, True, True]


async def test_those_who_wait_do_not_make_a_queue() -> None:
    """One asks; where it finds nothing the others ask at the same time, and where it does they use what it found."""
    targets = Targets(10)
    targets.keep(KEY, "https://s/old")
    targets.forget(KEY)
    first = targets.asking(KEY)
    assert await first.begin() is None
    others = [targets.asking(KEY) for _ in range(3)]
    waiting = [asyncio.create_task(one.begin()) for one in others]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    first.done()
    assert await asyncio.gather(*waiting) == [None, None, None]
    late = asyncio.create_task(targets.asking(KEY).begin())
    await asyncio.sleep(0)
    assert not late.done()
    targets.keep(KEY, "https://s/new")
    for one in others:
        one.done()
    assert await late == "https://s/new"


async def test_a_registry_that_does_not_redirect_makes_nobody_wait() -> None:
    """Where no redirect was ever seen, all requests ask at once."""
    targets = Targets(10)
    assert await targets.asking(KEY).begin() is None
    assert await targets.asking(KEY).begin() is None
