# SPDX-License-Identifier: Apache-2.0
"""Asks that do not wait again for a bus that was just found away.

An ask waits a few seconds for a NATS that is away: it may be restarting. An image has many layers, and containerd calls
for one after the other; without a memory each would wait as long, only to be left to containerd.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from soci.errors import BusUnavailable
from soci.launch import TraceParent
from soci_bus.asks import Ask

AWAY_SECONDS = 30.0
"""For so long after an ask waited in vain, others fail at once, unless NATS comes back."""

Answer = TypeVar("Answer")


class Asking(Protocol):
    """What is used here of `soci_bus.face.Bus`."""

    async def ask(self, ask: Ask[Answer], *, timeout: float, trace: TraceParent | None = None) -> Answer:  # noqa: ASYNC109
        """Ask this node's server of the verb."""
        ...


class Remembering:
    """Asks through ``bus``; ``up`` says whether NATS is there. One a process, for all that a pull asks."""

    def __init__(self, bus: Asking, up: Callable[[], bool], clock: Callable[[], float] = time.monotonic) -> None:
        self._bus = bus
        self._up = up
        self._clock = clock
        self._until: float | None = None  # by the clock

    async def ask(self, ask: Ask[Answer], *, timeout: float, trace: TraceParent | None = None) -> Answer:  # noqa: ASYNC109
        """As the bus; `BusUnavailable` without a wait while it is remembered to be away."""
        if self._up():
            self._until = None
        elif self._until is not None and self._clock() < self._until:
            raise BusUnavailable(f"{ask.verb}: NATS is away, as it was a moment ago")
        try:
            return await self._bus.ask(ask, timeout=timeout, trace=trace)
        except BusUnavailable:
            if not self._up():
                self._until = self._clock() + AWAY_SECONDS
            raise
