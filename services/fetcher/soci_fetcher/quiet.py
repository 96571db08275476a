# SPDX-License-Identifier: Apache-2.0
"""Whether anybody on this node waits for spans, and since when nobody did: what background fill goes by.

Misses reach the fetchers of a node one here, one there. Each holds a shared lock on one byte of one file while readers
wait for it, and sets the file's time when that begins and ends; a fetcher that is killed lets go.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from soci_fetcher.claims import Locks

FILE: Final = ".readers"
_READERS: Final = 0
_FILLER: Final = 1


class Quiet:
    """This process's hand on the file. Used from one event loop."""

    def __init__(self, cache: Path) -> None:
        """``cache`` is the span cache's folder; it is made where it is not there. `Unavailable` where it cannot be."""
        with suppress(OSError):
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._locks = Locks(cache / FILE, create=True)
        self._mine = 0
        self._born = time.time()

    @contextmanager
    def broken(self) -> Iterator[None]:
        """While the block runs, a reader waits for spans."""
        self._mine += 1
        if self._mine == 1:
            self._locks.take(_READERS, shared=True)
            self._touch()
        try:
            yield
        finally:
            self._mine -= 1
            if self._mine == 0:
                self._touch()
                self._locks.free(_READERS)

    def waits(self) -> bool:
        """Whether a reader waits now, for whichever fetcher of this node."""
        return self._mine > 0 or self._locks.held_elsewhere(_READERS)

    def silence(self) -> float:
        """Seconds in which nobody waited, as far as this process lives; 0 while somebody does."""
        if self.waits():
            return 0.0
        last = self._born
        with suppress(OSError):
            last = max(last, os.fstat(self._locks.fileno()).st_mtime)
        return max(0.0, time.time() - last)

    @contextmanager
    def filling(self) -> Iterator[bool]:
        """Whether this process is the node's one that fills, while the block runs."""
        alone = self._locks.take(_FILLER)
        try:
            yield alone
        finally:
            if alone:
                self._locks.free(_FILLER)

    def close(self) -> None:
        """Let go of the file."""
        self._locks.close()

    def _touch(self) -> None:
        with suppress(OSError):
            os.utime(self._locks.fileno())
