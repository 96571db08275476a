# SPDX-License-Identifier: Apache-2.0
"""Spans that are fetched along with a miss because the neighbourhood is in use. Pure.

Programs that start read files that lie together in a layer, in an order of their own: where spans close by were read
already, those behind a missed one are likely to be read, too. Guesses that nobody has read yet are counted, and there
are never more of them than a few and a share of what was read: who is guessed wrongly is guessed less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

NEAR: Final = 6
"""Spans on either side of a missed one among which one must have been read."""
BEHIND: Final = 2
"""Spans behind a missed one that are fetched along; up to the next one that was read, where that is near."""
UNREAD: Final = 3
UNREAD_SHARE: Final = 4
"""Guesses that may be unread at a time: so many, and one more for each so many spans that were read."""


class Guesses:
    """What was read of one layer, and what was guessed."""

    def __init__(self) -> None:
        self._read: set[int] = set()
        self._unread: set[int] = set()

    def read(self, spans: range) -> None:
        """These are being read."""
        if spans[-1] in self._read and spans[0] in self._read and len(spans) <= 2:
            return
        self._read.update(spans)
        self._unread.difference_update(spans)

    def behind(self, missed: range, missing: Callable[[range], list[int]], count: int) -> int:
        """How many spans behind ``missed`` are to be fetched along, in a layer of ``count``; they count as guessed."""
        after = range(missed.stop, min(missed.stop + NEAR, count))
        nearest = next((span for span in after if span in self._read), None)
        if nearest is None and not any(span in self._read for span in range(max(0, missed.start - NEAR), missed.start)):
            return 0
        wanted = range(missed.stop, min(missed.stop + BEHIND, count) if nearest is None else nearest)
        room = UNREAD + len(self._read) // UNREAD_SHARE - len(self._unread)
        absent = missing(wanted)[: max(0, room)]
        self._unread.update(absent)
        return absent[-1] + 1 - missed.stop if absent else 0
