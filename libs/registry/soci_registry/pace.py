# SPDX-License-Identifier: Apache-2.0
"""Whether an answer comes fast enough: decisions on times, for a wire that has one timer and looks now and then."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds and bytes a second: for the head, of silence in the body (and the window of the rate), for all."""

    head: float
    stall: float
    min_rate: int
    total: float


class Pace:
    """One exchange. Only time in which somebody waits for the server counts; ``now`` is always the same clock's."""

    __slots__ = ("_arrived", "_begun", "_body", "_last", "_limits", "_waited", "_waiting_since")

    def __init__(self, limits: Limits, now: float) -> None:
        self._limits = limits
        self._begun = now
        self._body = False
        self._last = self._waiting_since = now
        self._waited = 0.0  # of this window, before the wait that goes on
        self._arrived = 0  # bytes of this window

    def body(self) -> None:
        """The head is there; what it took is not the body's."""
        self._body = True
        self._waited = 0.0

    def wait(self, now: float) -> None:
        """Somebody waits from now on."""
        self._waiting_since = self._last = now

    def came(self, size: int, now: float) -> None:
        """So many bytes have come."""
        self._arrived += size
        self._last = now

    def rest(self, now: float) -> None:
        """Nobody waits any more."""
        self._waited += now - self._waiting_since
        self._waiting_since = now

    def look(self, now: float) -> str | float:
        """What is wrong, or when to look again, while somebody waits."""
        limits = self._limits
        if now - self._begun >= limits.total:
            return f"the answer took more than {limits.total:g} s"
        end = self._begun + limits.total
        if not self._body:
            if now - self._begun >= limits.head:
                return f"no answer within {limits.head:g} s"
            return min(end, self._begun + limits.head)
        if now - self._last >= limits.stall:
            return f"no byte for {limits.stall:g} s"
        waited = self._waited + now - self._waiting_since
        if waited >= limits.stall:
            if self._arrived < limits.min_rate * waited:
                return f"{self._arrived} bytes in {waited:.0f} s: too slow"
            self._waited, self._waiting_since, self._arrived, waited = 0.0, now, 0, 0.0
        return min(end, self._last + limits.stall, now + limits.stall - waited)
