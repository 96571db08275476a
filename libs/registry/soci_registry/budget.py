# SPDX-License-Identifier: Apache-2.0
"""How many requests a host has from this node at a time, whoever of our processes makes them: decisions on values.

A host's budget is a row of numbered slots; who asks holds one. The first of them are kept for those somebody waits for
(*urgent*: a miss), so that a hundred requests for bytes that nobody reads yet cannot keep one reader waiting. The
others are anybody's. Between processes the budget is fair: who holds more than its part takes no further slot while
another process waits for one.
"""

from __future__ import annotations

from dataclasses import dataclass

KEPT_SHARE = 0.25
"""Of a host's slots, those that are kept for urgent requests."""


OVERDRAFT_SECONDS = {True: 5.0, False: 30.0}
"""So long an urgent request, or another, waits at most where its process has no other one under way."""


@dataclass(frozen=True, slots=True)
class Budget:
    """``total`` requests to one host at a time, at least one."""

    total: int

    @property
    def kept(self) -> int:
        """The slots that only urgent requests take; at least one is left for the others."""
        return min(self.total - 1, max(1, round(self.total * KEPT_SHARE)))

    def open_to(self, *, urgent: bool) -> range:
        """The slots that a request may take, in the order in which they are tried.

        Urgent ones begin with anybody's: what is kept stays free for the next one.
        """
        return range(self.total - 1, -1 if urgent else self.kept - 1, -1)

    def may_take(self, held: int, waiting: int, *, urgent: bool) -> bool:
        """Whether a process takes one more slot, which holds ``held`` of this kind, while ``waiting`` others want one.

        Its part is never less than one slot, so that nobody can be kept from asking at all.
        """
        return not waiting or held < max(1, len(self.open_to(urgent=urgent)) // (waiting + 1))


def may_overdraw(inside: int, waited: float, *, urgent: bool) -> bool:
    """Whether a request that has ``waited`` seconds goes beyond the budget; its process has ``inside`` others now.

    Slots may be in the hands of a process that is stopped or hangs; nobody takes them from it, for nobody can know.
    So much is sure: each process makes one request at a time, if not more.
    """
    return inside == 0 and waited >= OVERDRAFT_SECONDS[urgent]


def pause_left(end: int, now: int, most: float = float("inf")) -> float:
    """Seconds until ``end`` of a pause; both are nanoseconds of one clock. What is beyond ``most`` nobody has asked."""
    left = (end - now) / 1e9
    return left if 0 < left <= most else 0.0
