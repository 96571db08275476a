# SPDX-License-Identifier: Apache-2.0
"""Hashing beside the work that makes the bytes.

A builder hashes everything about three times. SHA-256 runs without Python's lock, so on a machine with a second
processor it costs almost no time in a thread of its own. Work is done in the order in which it is given.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

SMALL_BYTES: Final = 1 << 15
"""Less than this is hashed on the spot: handing it over would cost more."""

Mark = Future[Any] | None
"""A job that was given, to wait for; None stands for one that is done."""


class Hashing:
    """Does small jobs in one thread, in order. It lags behind as far as its user lets it: see `wait`."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._beside = len(os.sched_getaffinity(0)) > 1
        self._last: Mark = None

    def update(self, state: Any, data: bytes | memoryview) -> None:
        """Update a hash. ``data`` must stay as it is until a `wait` for a `mark` of after this call."""
        if len(data) < SMALL_BYTES:
            self.wait(self._last)
            state.update(data)
        else:
            self.do(state.update, data)

    def do(self, job: Callable[..., Any], *words: Any) -> None:
        """Call ``job`` after all that was given before."""
        if not self._beside:
            job(*words)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "soci-hash")
        self._last = self._pool.submit(job, *words)

    def mark(self) -> Mark:
        """The newest job, to wait for."""
        return self._last

    def wait(self, mark: Mark) -> None:
        """Wait until the job ``mark``, and all before it, are done."""
        if mark is not None:
            mark.result()

    def close(self) -> None:
        """Finish all jobs and end the thread."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
