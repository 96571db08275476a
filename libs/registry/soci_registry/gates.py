# SPDX-License-Identifier: Apache-2.0
"""The way to a host: requests wait here for one of its slots, and until it may be asked again.

Who waits stands in one of two rows, those that somebody waits for before the others. A slot that this process gives
back wakes the first of them; one that another process gives back is found by looking, which only the first does.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from soci_registry.budget import may_overdraw
from soci_registry.failure import Kind, TryError
from soci_registry.slots import SlotBook, Slots
from soci_registry.urls import Origin

HOSTS_MAX = 256
"""Hosts that are remembered; idle ones are forgotten beyond that."""

HOLDS_MAX = 8
"""How often a request that waits for a gate accepts that it has been closed again meanwhile."""

LOOK_SECONDS = {True: 0.004, False: 0.02}
"""Between two looks for a slot that another process may have given back: for urgent requests, and for others."""

SPREAD = 0.1
SPREAD_SECONDS_MAX = 1.0
"""After a pause requests come back over this share of it, and at most so many seconds, not all in one moment."""


NO_SLOT = -1
"""What a request holds that goes beyond the budget."""


@dataclass(slots=True)
class _Gate:
    slots: Slots
    users: int = 0
    inside: int = 0
    rows: dict[bool, deque[asyncio.Event]] = field(default_factory=lambda: {True: deque(), False: deque()})

    async def take(self, *, urgent: bool) -> int:
        """A slot, as soon as there is one."""
        row, woken = self.rows[urgent], asyncio.Event()
        clock = asyncio.get_running_loop().time
        begun = clock()
        row.append(woken)
        try:
            while True:
                first = row[0] is woken and (urgent or not self.rows[True])
                slot = self.slots.take(urgent=urgent) if first else None
                if first and slot is None and may_overdraw(self.inside, clock() - begun, urgent=urgent):
                    slot = NO_SLOT
                if slot is not None:
                    self.inside += 1
                    return slot
                if first:
                    self.slots.wait(urgent=urgent, waiting=True)
                woken.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS[urgent] if first and self.slots.looks else None):
                        await woken.wait()
        finally:
            row.remove(woken)
            if not row:
                self.slots.wait(urgent=urgent, waiting=False)
            self._wake()

    def give(self, slot: int) -> None:
        """Give a slot back to whoever is first."""
        self.inside -= 1
        if slot != NO_SLOT:
            self.slots.give(slot)
        self._wake()

    def _wake(self) -> None:
        for row in self.rows.values():  # urgent ones first
            if row:
                row[0].set()


class Gates:
    """One gate a host. A ``Retry-After`` of one request holds back all: the limit is the host's, not a range's."""

    def __init__(self, book: SlotBook) -> None:
        self._book = book
        self._all: OrderedDict[Origin, _Gate] = OrderedDict()

    @asynccontextmanager
    async def slot(self, origin: Origin, *, urgent: bool = True, patient: bool = True) -> AsyncIterator[None]:
        """Hold one of the host's slots, taken no earlier than the host asked for.

        Who is not ``patient`` gets a `TryError` in place of that wait: another host may have the same.
        """
        gate = self._gate(origin)
        gate.users += 1
        try:
            slot = await gate.take(urgent=urgent)
            try:
                for _ in range(HOLDS_MAX):
                    if (wait := gate.slots.paused()) <= 0:
                        break
                    if not patient:
                        raise TryError(Kind.STATUS, "the host has asked to wait", status=429, retry_after=wait)
                    # The dice need no secrecy: they only keep clients from coming back all at once.
                    await asyncio.sleep(wait + random.random() * min(SPREAD * wait, SPREAD_SECONDS_MAX))  # noqa: S311
                yield
            finally:
                gate.give(slot)
        finally:
            gate.users -= 1

    def hold(self, origin: Origin, seconds: float) -> None:
        """Let nobody through to ``origin`` for so many seconds from now."""
        self._gate(origin).slots.pause(seconds)

    def close(self) -> None:
        """Give everything back; no request is under way any more."""
        for gate in self._all.values():
            gate.slots.close()
        self._all.clear()

    def _gate(self, origin: Origin) -> _Gate:
        gate = self._all.get(origin)
        if gate is None:
            self._forget_idle()
            gate = self._all[origin] = _Gate(self._book.of(origin))
        self._all.move_to_end(origin)
        return gate

    def _forget_idle(self) -> None:
        if len(self._all) < HOSTS_MAX:
            return
        for origin in [origin for origin, gate in self._all.items() if not gate.users][: HOSTS_MAX // 4]:
            self._all.pop(origin).slots.close()
