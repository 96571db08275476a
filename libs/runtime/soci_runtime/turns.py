# SPDX-License-Identifier: Apache-2.0
"""Turns by key: so many at a time for each image, mount or snapshot, and nothing kept for those that nobody wants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class _Turn:
    permits: asyncio.Semaphore
    users: int = 0


class Turns:
    """At most ``at_once`` holders of each key, in the order in which they came; 1 is a lock a key.

    As many keys are remembered as are held or waited for, so its size is its callers' to bound.
    """

    def __init__(self, at_once: int = 1) -> None:
        self.at_once = at_once
        self._held: dict[Hashable, _Turn] = {}

    @asynccontextmanager
    async def hold(self, key: Hashable) -> AsyncIterator[None]:
        """Hold a turn of ``key``."""
        turn = self._held.setdefault(key, _Turn(asyncio.Semaphore(self.at_once)))
        turn.users += 1
        try:
            async with turn.permits:
                yield
        finally:
            turn.users -= 1
            if not turn.users:
                del self._held[key]
