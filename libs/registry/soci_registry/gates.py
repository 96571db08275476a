# SPDX-License-Identifier: Apache-2.0
"""How many requests a host may have from us at once, and when it asked us to come back."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from soci_registry.failure import Kind, TryError
from soci_registry.urls import Origin

HOSTS_MAX = 256
"""Hosts that are remembered; idle ones are forgotten beyond that."""


HOLDS_MAX = 8
"""How often a request that waits for a gate accepts that it has been closed again meanwhile."""


@dataclass(slots=True)
class _Gate:
    slots: asyncio.Semaphore
    users: int = 0
    opens: float = field(default=0.0)


class Gates:
    """One gate a host. A ``Retry-After`` of one request holds back all: the limit is the host's, not a range's."""

    def __init__(self, per_host: int) -> None:
        self._per_host = per_host
        self._all: OrderedDict[Origin, _Gate] = OrderedDict()

    @asynccontextmanager
    async def slot(self, origin: Origin, *, patient: bool = True) -> AsyncIterator[None]:
        """Hold one of the host's slots, taken no earlier than the host asked for.

        Who is not ``patient`` gets a `TryError` in place of that wait: another host may have the same.
        """
        gate = self._gate(origin)
        gate.users += 1
        try:
            async with gate.slots:
                clock = asyncio.get_running_loop().time
                for _ in range(HOLDS_MAX):
                    if (wait := gate.opens - clock()) <= 0:
                        break
                    if not patient:
                        raise TryError(Kind.STATUS, "the host has asked to wait", status=429, retry_after=wait)
                    await asyncio.sleep(wait)
                yield
        finally:
            gate.users -= 1

    def hold(self, origin: Origin, seconds: float) -> None:
        """Let nobody through to ``origin`` for so many seconds from now."""
        gate = self._gate(origin)
        gate.opens = max(gate.opens, asyncio.get_running_loop().time() + seconds)

    def _gate(self, origin: Origin) -> _Gate:
        gate = self._all.get(origin)
        if gate is None:
            self._forget_idle()
            gate = self._all[origin] = _Gate(asyncio.Semaphore(self._per_host))
        self._all.move_to_end(origin)
        return gate

    def _forget_idle(self) -> None:
        if len(self._all) < HOSTS_MAX:
            return
        for origin in [origin for origin, gate in self._all.items() if not gate.users][: HOSTS_MAX // 4]:
            del self._all[origin]
