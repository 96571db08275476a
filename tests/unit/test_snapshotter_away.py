# SPDX-License-Identifier: Apache-2.0
"""A bus that was just found away is not waited for again."""

from __future__ import annotations

from typing import Any, cast

import pytest

from soci.digest import sha256_digest
from soci.errors import BusUnavailable
from soci_bus.asks import FindIndex
from soci_snapshotter.away import AWAY_SECONDS, Remembering

ASK = FindIndex("r/i:1", sha256_digest(b"m"), None)


class Bus:
    """One that waits in vain, which is counted."""

    def __init__(self) -> None:
        self.waits = 0
        self.up = False
        self.now = 0.0

    async def ask(self, _ask: Any, **_options: Any) -> Any:
        self.waits += 1
        raise BusUnavailable("no")


async def fails(asking: Remembering) -> None:
    with pytest.raises(BusUnavailable):
        await asking.ask(ASK, timeout=1)


@pytest.fixture
def bus() -> Bus:
    return Bus()


@pytest.fixture
def asking(bus: Bus) -> Remembering:
    return Remembering(cast("Any", bus), lambda: bus.up, lambda: bus.now)


async def test_it_is_waited_for_once(bus: Bus, asking: Remembering) -> None:
    """An image of many layers waits once; after a while it is tried again."""
    for _ in range(10):
        await fails(asking)
    assert bus.waits == 1
    bus.now += AWAY_SECONDS
    await fails(asking)
    await fails(asking)
    assert bus.waits == 2


async def test_a_bus_that_is_back_is_asked(bus: Bus, asking: Remembering) -> None:
    """From the moment of the reconnect; and when it goes away again, it is waited for again."""
    await fails(asking)
    bus.up = True
    await fails(asking)
    await fails(asking)
    assert bus.waits == 3
    bus.up = False
    await fails(asking)
    assert bus.waits == 4


async def test_a_service_that_is_missing_is_no_bus_away(bus: Bus, asking: Remembering) -> None:
    """While NATS is there every ask is made: the fetcher may come the next moment."""
    bus.up = True
    for _ in range(3):
        await fails(asking)
    assert bus.waits == 3
