# SPDX-License-Identifier: Apache-2.0
"""A layer's blob in an announced file, whatever becomes of the fetchers that bring it.

An ask waits for one fetcher, and may wait no longer than the bus allows. A large blob takes longer than that, and a
fetcher may die: the file beside the blob tells both, and the same ask again goes on where the last one ended.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from soci.errors import BusUnavailable, DeadlineExceeded, SociError, Unavailable
from soci.launch import TraceParent
from soci_bus.asks import FetchLayer
from soci_bus.face import LONGEST_ASK, Bus
from soci_cache.arriving import COMING, COMPLETE, is_written, progress, writers

WATCH_SECONDS: Final = 1.0
"""How often it is looked whether the fetcher of a blob is still alive."""
SILENCE: Final = 3
"""After so many looks in a row that found no writer of a blob, its fetcher is dead and another one is asked."""
FETCH_TRIES: Final = 3
"""Asks for one blob in a row of which none brought anything."""
CANCEL_AGAIN: Final = 0.5
"""Seconds after which an ask that did not end is told again."""
RETRY_SECONDS: Final = 1.0
"""Before the next ask: a fetcher that is started again takes a moment."""


async def fetch_blob(bus: Bus, ask: FetchLayer, trace: TraceParent | None) -> int:
    """Have the whole blob of ``ask`` in its file; its size. Raises what the fetcher raises, and `Unavailable`."""
    blob = Path(ask.path)
    tried = before = 0
    while True:
        try:
            return await _ask(bus, ask, blob, trace)
        except Unavailable as error:
            arrived, state = progress(blob)
            tried = 1 if arrived > before else tried + 1
            before = arrived
            if state != COMING or tried >= FETCH_TRIES or not may_pass(error):
                raise
        await asyncio.sleep(RETRY_SECONDS)


def may_pass(error: SociError) -> bool:
    """Whether another fetcher, or the same one a moment later, may go on. What a registry said is final."""
    return type(error) in {Unavailable, BusUnavailable, DeadlineExceeded}


async def _ask(bus: Bus, ask: FetchLayer, blob: Path, trace: TraceParent | None) -> int:
    """One ask; `Unavailable` soon after the fetcher that was at it is no more."""
    before = writers(blob)
    asking = asyncio.ensure_future(bus.ask(ask, timeout=LONGEST_ASK, trace=trace))
    try:
        silent = 0
        while not (await asyncio.wait([asking], timeout=WATCH_SECONDS))[0]:
            begun = writers(blob) != before  # an ask may also wait for its turn
            silent = silent + 1 if begun and not is_written(blob) else 0
            if silent >= SILENCE:
                arrived, state = progress(blob)
                if state == COMPLETE:  # all that it did not do any more is to say so
                    return arrived
                raise Unavailable(f"the fetcher of {ask.layer} is gone")
        return asking.result().size
    finally:
        if not asking.done():
            asking.cancel()
            await asyncio.wait([asking])
