# SPDX-License-Identifier: Apache-2.0
"""Layers unpacked side by side, on as many cores as there are.

Most of unpacking is done by the interpreter, one file after the other, and a thread would share it with containerd's
calls. So each layer goes to one of a few worker processes. Where only one layer is unpacked at a time on one core, a
thread of this process does it.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Final, Protocol

from soci.errors import SociError, Unavailable
from soci_runtime.flights import in_stoppable_thread
from soci_runtime.workers import Pool, WorkerProcess, as_error, cores
from soci_snapshotter.unpack_worker import Result, Wish, decode_result, unpack_arriving

MAX_RESULT_BYTES: Final = 128 << 20
IDLE_SECONDS: Final = 60.0
"""How long a worker that has nothing to do is kept."""


class Unpackers(Pool["_Place"]):
    """An async context manager; at most ``workers`` layers are unpacked at once, the others wait.

    ``workers`` negative or 0 means one a core, `MAX_WORKERS` at most; with 1, a thread of this process unpacks.
    Processes begin when they are first needed, and end after `IDLE_SECONDS` without work (`tend`) or with the block.
    """

    def __init__(self, workers: int = -1) -> None:
        super().__init__(workers if workers > 0 else cores(), self._new)

    async def unpack(self, wish: Wish) -> Result:
        """Unpack one layer. Raises what `unpack_arriving` raises, and `Unavailable` where a worker dies.

        When this is cancelled nothing is written any more by the time that it ends.
        """
        async with self.place() as place:
            try:
                return await place.unpack(wish)
            finally:
                place.idle_since = time.monotonic()

    async def tend(self) -> None:
        """End the workers that had nothing to do for long; to be called now and then."""
        old = time.monotonic() - IDLE_SECONDS
        ended = [place for place in self._idle if place.idle_since < old]
        self._idle = [place for place in self._idle if place.idle_since >= old]
        for place in ended:
            await place.close()

    async def _new(self) -> _Place:
        if self.workers == 1:
            return _Thread()
        beginning = asyncio.ensure_future(asyncio.to_thread(_Process))
        try:
            return await asyncio.shield(beginning)
        except asyncio.CancelledError:
            with suppress(SociError):
                await (await beginning).close(kill=True)
            raise


class _Place(Protocol):
    clean: bool
    idle_since: float

    async def unpack(self, wish: Wish) -> Result: ...

    async def close(self, *, kill: bool = False) -> None: ...


class _Thread:
    """Unpacks in a thread of this process."""

    def __init__(self) -> None:
        self.clean = True
        self.idle_since = 0.0

    async def unpack(self, wish: Wish) -> Result:
        return await in_stoppable_thread(lambda stopped: unpack_arriving(wish, stopped))

    async def close(self, *, kill: bool = False) -> None:
        del kill


class _Process(WorkerProcess):
    """Unpacks in a process of its own."""

    def __init__(self) -> None:
        super().__init__("soci_snapshotter.unpack_worker", "unpacks layers")
        self.idle_since = 0.0

    async def unpack(self, wish: Wish) -> Result:
        self.clean = False
        try:
            await self.send(b"U", json.dumps(asdict(wish)).encode())
            kind, content = await self.answer(MAX_RESULT_BYTES)
        except OSError as error:
            raise Unavailable(f"a process that unpacks layers ended in the middle of one: {error}") from error
        self.clean = True
        if kind != b"R":
            raise as_error(content)
        return await asyncio.to_thread(decode_result, bytes(content))
