# SPDX-License-Identifier: Apache-2.0
"""Hashing, and walking over the tar, beside the work that makes the bytes.

A builder hashes everything about three times, and inflating and SHA-256 run without Python's lock: on a machine with a
second processor, hashing and most of the walk cost little time in a thread of their own. Jobs are done in the order in
which they are given.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

SMALL_BYTES: Final = 1 << 15
"""Work on less than this is done on the spot: handing it over would cost more."""

Mark = Future[Any] | None
"""A job that was given, to wait for; None stands for one that is done."""


class Beside:
    """Does small jobs in one thread, in order. It lags behind as far as its user lets it: see `wait`.

    After a job that failed no other is done, and its error is in ``failed``: the work has come no further than that,
    whatever else fails meanwhile.
    """

    def __init__(self) -> None:
        self.failed: Exception | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._beside = len(os.sched_getaffinity(0)) > 1
        self._last: Mark = None

    def work(self, job: Callable[[Any], object], data: bytes | memoryview) -> None:
        """Call ``job`` with ``data``, which must stay as it is until a `wait` for a `mark` of after this call."""
        if len(data) < SMALL_BYTES:
            self.wait(self._last)
            job(data)
        else:
            self.do(job, data)

    def do(self, job: Callable[..., Any], *words: Any) -> None:
        """Call ``job`` after all that was given before."""
        if not self._beside:
            job(*words)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "soci-beside")
        self._last = self._pool.submit(self._try, job, words)

    def mark(self) -> Mark:
        """The newest job, to wait for."""
        return self._last

    def wait(self, mark: Mark) -> None:
        """Wait until the job ``mark``, and all before it, are done. Raises what one of them raised."""
        if mark is not None:
            mark.result()
            if self.failed is not None:
                raise self.failed

    def close(self) -> None:
        """Finish all jobs and end the thread."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _try(self, job: Callable[..., Any], words: tuple[Any, ...]) -> None:
        if self.failed is not None:
            return
        try:
            job(*words)
        except Exception as error:  # noqa: BLE001  (`wait` and `ZtocBuilder` go on with it)
            self.failed = error
