# SPDX-License-Identifier: Apache-2.0
"""Layers unpacked side by side, on as many cores as there are.

Most of unpacking is done by the interpreter, one file after the other, and a thread would share it with containerd's
calls. So each layer goes to one of a few worker processes. Where only one layer is unpacked at a time on one core, a
thread of this process does it.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Final, Protocol, Self

from soci.errors import SociError, Unavailable, from_code
from soci_snapshotter.unpack_worker import FRAME, Result, Wish, decode_result, unpack_arriving

MAX_WORKERS: Final = 8
"""Workers at most, however many cores."""
MAX_RESULT_BYTES: Final = 128 << 20
IDLE_SECONDS: Final = 60.0
"""How long a worker that has nothing to do is kept."""
END_SECONDS: Final = 5.0
"""How long a worker may take to see that its socket is closed, before it is killed."""
_BOOT: Final = (
    "import sys, json; sys.path[:] = json.loads(sys.argv.pop()); "
    "from soci_snapshotter.unpack_worker import main; main()"
)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


class Unpackers:
    """An async context manager; at most ``workers`` layers are unpacked at once, the others wait.

    ``workers`` negative or 0 means one a core; with 1, a thread of this process unpacks. Processes begin when they are
    first needed, and end after `IDLE_SECONDS` without work (`tend`) or with the block.
    """

    def __init__(self, workers: int = -1) -> None:
        self.workers = min(workers if workers > 0 else cores(), MAX_WORKERS)
        self._room = asyncio.Semaphore(self.workers)
        self._idle: list[_Place] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        idle, self._idle = self._idle, []
        for place in idle:
            await place.close()

    async def unpack(self, wish: Wish) -> Result:
        """Unpack one layer. Raises what `unpack_arriving` raises, and `Unavailable` where a worker dies.

        When this is cancelled nothing is written any more by the time that it ends.
        """
        async with self._room:
            place = self._idle.pop() if self._idle else await self._begin()
            whole = False
            try:
                result = await place.unpack(wish)
                whole = True
            except SociError:
                whole = place.clean
                raise
            finally:
                if whole:
                    place.idle_since = time.monotonic()
                    self._idle.append(place)
                else:
                    await asyncio.shield(place.close(kill=True))
            return result

    async def tend(self) -> None:
        """End the workers that had nothing to do for long; to be called now and then."""
        old = time.monotonic() - IDLE_SECONDS
        ended = [place for place in self._idle if place.idle_since < old]
        self._idle = [place for place in self._idle if place.idle_since >= old]
        for place in ended:
            await place.close()

    async def _begin(self) -> _Place:
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
    """Where one layer at a time is unpacked. ``clean``: it is ready for another one."""

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
        stop = threading.Event()
        work = asyncio.ensure_future(asyncio.to_thread(unpack_arriving, wish, stop.is_set))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            stop.set()
            with suppress(SociError):
                await work
            raise

    async def close(self, *, kill: bool = False) -> None:
        del kill


class _Process:
    """Unpacks in a process of its own, begun afresh: a fork would take our threads' locks along."""

    def __init__(self) -> None:
        self.clean = True
        self.idle_since = 0.0
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                ours.setblocking(False)  # noqa: FBT003  (positional only)
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _BOOT, str(theirs.fileno()), json.dumps(sys.path)],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                )
            except OSError as error:
                ours.close()
                raise Unavailable(f"cannot begin a process that unpacks layers: {error.strerror}") from error
        self._link = ours

    async def unpack(self, wish: Wish) -> Result:
        self.clean = False
        loop = asyncio.get_running_loop()
        told = json.dumps(asdict(wish)).encode()
        try:
            await loop.sock_sendall(self._link, FRAME.pack(b"U", len(told)) + told)
            kind, length = FRAME.unpack(await self._receive(FRAME.size))
            if length > MAX_RESULT_BYTES:
                raise ConnectionResetError(f"an answer of {length} bytes")
            content = await self._receive(length)
        except OSError as error:
            raise Unavailable(f"a process that unpacks layers ended in the middle of one: {error}") from error
        self.clean = True
        if kind != b"R":
            failed = json.loads(content)
            raise from_code(failed["code"], failed["message"])
        return await asyncio.to_thread(decode_result, bytes(content))

    async def _receive(self, length: int) -> bytearray:
        content = bytearray(length)
        view = memoryview(content)
        while view:
            count = await asyncio.get_running_loop().sock_recv_into(self._link, view)
            if not count:
                raise ConnectionResetError("no answer")
            view = view[count:]
        return content

    async def close(self, *, kill: bool = False) -> None:
        self._link.close()
        if kill:
            self._process.kill()
        await asyncio.to_thread(self._end)

    def _end(self) -> None:
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
