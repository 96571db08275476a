# SPDX-License-Identifier: Apache-2.0
"""How much background fill asks for at a time. Pure.

More after each round that went well, half after one that did not (additive increase, multiplicative decrease): fill
takes what the link and the disk have to spare, and finds out anew after each disturbance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

LEAST: Final = 1 << 20
MOST: Final = 32 << 20
STEP: Final = 4 << 20
"""Compressed bytes of a round: at least, at most, and by how many it grows."""
SLOW: Final = 3.0
"""A round that took so many times as long for each byte as the quickest one was slow: link or disk are busy."""
FADES: Final = 1.1
"""The quickest round counts for less after each round: a link may have become another."""
LATE: Final = 1.5
"""Misses that take so many times as long as they did before the fill began are its fault."""


@dataclass(frozen=True, slots=True)
class Round:
    """What was seen of one: compressed bytes, seconds, whether a reader came, and what misses take beside usual."""

    size: int
    seconds: float
    disturbed: bool = False
    misses: float = 1.0


@dataclass(frozen=True, slots=True)
class Pace:
    """``size``: bytes of the next round. ``best``: seconds for a byte of the quickest one; 0: none yet."""

    size: int = STEP
    best: float = 0.0

    def after(self, seen: Round) -> Pace:
        """The pace after a round."""
        cost = seen.seconds / seen.size if seen.size else 0.0
        slow = self.best > 0 and cost > SLOW * self.best
        best = min(cost, self.best * FADES) if cost and self.best else cost or self.best
        if seen.disturbed or slow or seen.misses > LATE:
            return Pace(max(self.size // 2, LEAST), best)
        return Pace(min(self.size + STEP, MOST), best)
