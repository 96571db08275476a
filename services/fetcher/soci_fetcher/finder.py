# SPDX-License-Identifier: Apache-2.0
"""Index look-ups, shared: all layers of an image ask the same question at almost the same time."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass

from soci.digest import Digest
from soci.errors import NoIndex, Unavailable
from soci_bus.asks import FindIndex, IndexFound
from soci_bus.face import Context
from soci_fetcher.discovery import find_index
from soci_registry import Registry
from soci_runtime.tracing import step

REMEMBERED = 1024
"""Look-ups whose answer is remembered; the one unused for longest goes first."""
SUCCESS_TTL = 300.0
"""Seconds for which an index that was found is not looked for again."""

Key = tuple[str, Digest, Digest | None]


@dataclass(slots=True)
class _LookUp:
    answer: asyncio.Future[IndexFound]
    until: float  # monotonic seconds; infinite while it is under way


class Finder:
    """Answers `FindIndex`. One a process. Bookkeeping is done without an await in it, so it needs no lock."""

    def __init__(self, registry: Registry, *, v1: bool, v2: bool, failure_ttl: float) -> None:
        self._registry = registry
        self._v1, self._v2 = v1, v2
        self._failure_ttl = failure_ttl
        self._known: OrderedDict[Key, _LookUp] = OrderedDict()

    async def find(self, ask: FindIndex, context: Context) -> IndexFound:
        """The image's index. A failure is remembered for ``failure_ttl`` seconds only."""
        key = (ask.image, ask.manifest, ask.explicit)
        known = self._known.get(key)
        if known and known.until >= time.monotonic():
            self._known.move_to_end(key)
            return await asyncio.shield(known.answer)
        look_up = _LookUp(asyncio.get_running_loop().create_future(), float("inf"))
        self._known[key] = look_up
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        try:
            with step("find-index", context.trace, image=ask.image):
                repository = self._registry.repository(ask.image)
                found = await find_index(repository, ask, v1=self._v1, v2=self._v2)
        except NoIndex as error:
            look_up.until = time.monotonic() + self._failure_ttl
            look_up.answer.set_exception(error)
            look_up.answer.exception()  # seen, even where nobody else waits
            raise
        except BaseException:
            look_up.until = 0.0
            look_up.answer.set_exception(Unavailable(f"{ask.image}: the look-up under way was given up"))
            look_up.answer.exception()
            raise
        look_up.until = time.monotonic() + SUCCESS_TTL
        look_up.answer.set_result(found)
        return found
