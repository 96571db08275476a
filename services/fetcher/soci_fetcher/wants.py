# SPDX-License-Identifier: Apache-2.0
"""What `soci_fetcher.spans` keeps of asks, of the spans they wait for, and of the requests under way."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from soci.launch import TraceParent
from soci_bus.asks import FetchSpans
from soci_bus.events import NO_LAUNCH
from soci_fetcher.opened import Opened
from soci_fetcher.schedule import Run


@dataclass(slots=True, eq=False)
class Asked:
    """One ask, and what was moved for it."""

    ask: FetchSpans
    trace: TraceParent | None
    requests: int = 0
    moved: int = 0
    begun: float = field(default_factory=time.monotonic)

    @property
    def launch(self) -> str:
        """The launch that it is for."""
        return self.trace.launch if self.trace else NO_LAUNCH


@dataclass(slots=True, eq=False)
class Want:
    """An absent span. ``asked`` is who wants it most."""

    opened: Opened
    span: int
    rank: int
    asked: Asked
    flying: bool = False
    elsewhere: float | None = None  # since when another process of the node is seen to be at it
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def overdue(self, patience: float, now: float) -> bool:
        """Whether a reader has waited long enough for another process."""
        if self.elsewhere is None:
            self.elsewhere = now
        return self.rank == 0 and now - self.elsewhere > patience


@dataclass(slots=True, eq=False)
class Flight:
    """A request under way for ``lead``, who wants it most."""

    run: Run
    opened: Opened
    lead: Want
    claimed: set[int]
    begun: float = field(default_factory=time.monotonic)
    requests: int = 0
    moved: int = 0
    reading: asyncio.Timeout | None = None  # cut it short here
    cut: bool = False
