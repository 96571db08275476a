# SPDX-License-Identifier: Apache-2.0
"""Turns by key."""

from __future__ import annotations

import asyncio

import pytest

from soci_runtime.turns import Turns


@pytest.mark.parametrize("at_once", [1, 3])
async def test_so_many_at_a_time_of_each_key(at_once: int) -> None:
    """No key has more holders than are allowed, and keys do not wait for one another."""
    turns, now, most = Turns(at_once), {"a": 0, "b": 0}, {"a": 0, "b": 0}

    async def one(key: str) -> None:
        async with turns.hold(key):
            now[key] += 1
            most[key] = max(most[key], now[key])
            await asyncio.sleep(0)
            now[key] -= 1

    async with turns.hold("c"):
        await asyncio.gather(*(one(key) for key in "ab" * 10))
    assert most == {"a": at_once, "b": at_once}


async def test_nothing_is_kept() -> None:
    """A key is forgotten with its last user, also where that failed, or gave up while it waited."""
    turns = Turns()

    async def failing() -> None:
        async with turns.hold("a"):
            waiting = asyncio.ensure_future(turns.hold("a").__aenter__())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
            raise OSError

    with pytest.raises(OSError):
        await failing()
    assert turns._held == {}
