# SPDX-License-Identifier: Apache-2.0
"""Worker processes for what the interpreter does alone: a few of them, each at one piece of work at a time.

Both ends of a worker's socket are here. Frames either way: a letter, the length of what follows (8 bytes, big endian),
and that. Which letters there are is the two ends' own matter. When the socket is closed a worker ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, Generic, Protocol, Self, TypeVar

from soci.errors import SociError, Unavailable, from_code

MAX_WORKERS: Final = 8
"""Workers at most, however many cores."""
END_SECONDS: Final = 5.0
"""How long a worker may take to see that its socket is closed, before it is killed."""
FRAME: Final = struct.Struct("!cQ")
_BOOT: Final = "import sys, json; sys.path[:] = json.loads(sys.argv.pop()); from {module} import main; main()"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


class Place(Protocol):
    """Where one piece of work at a time is done. ``clean``: it is ready for another one."""

    clean: bool

    async def close(self, *, kill: bool = False) -> None:
        """End it; ``kill`` where it is in the middle of something."""
        ...


PlaceT = TypeVar("PlaceT", bound=Place)


class Pool(Generic[PlaceT]):
    """An async context manager; at most ``workers`` places are used at once, who wants one more waits.

    ``workers`` is cut to `MAX_WORKERS`. Places begin when they are first needed, and end with the block.
    """

    def __init__(self, workers: int, begin: Callable[[], Awaitable[PlaceT]]) -> None:
        self.workers = min(workers, MAX_WORKERS)
        self._begin = begin
        self._room = asyncio.Semaphore(self.workers)
        self._idle: list[PlaceT] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        idle, self._idle = self._idle, []
        for place in idle:
            await place.close()

    @asynccontextmanager
    async def place(self) -> AsyncIterator[PlaceT]:
        """A place to oneself. It is used again after a success, and after a `SociError` that left it clean."""
        async with self._room:
            place = self._idle.pop() if self._idle else await self._begin()
            whole = False
            try:
                yield place
                whole = True
            except SociError:
                whole = place.clean
                raise
            finally:
                # One that stopped in the middle of its work still expects its rest.
                if whole:
                    self._idle.append(place)
                else:
                    await asyncio.shield(place.close(kill=True))


class WorkerProcess:
    """A process of its own that runs ``main`` of ``module``, begun afresh: a fork would take our threads' locks along.

    ``buffer`` are bytes that may wait in the socket each way, where that is more than usual. ``what`` is what it does,
    for errors. Blocks; raises `Unavailable` where the machine begins no process.
    """

    def __init__(self, module: str, what: str, *, buffer: int = 0) -> None:
        self.clean = True
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                for end in (ours, theirs) if buffer else ():
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
                ours.setblocking(False)  # noqa: FBT003  (positional only)
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _BOOT.format(module=module), str(theirs.fileno()), json.dumps(sys.path)],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                )
            except OSError as error:
                ours.close()
                raise Unavailable(f"cannot begin a process that {what}: {error.strerror}") from error
        self._link = ours

    async def send(self, kind: bytes, content: bytes | memoryview) -> None:
        """One frame. Raises OSError where the worker is gone."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._link, FRAME.pack(kind, len(content)))
        await loop.sock_sendall(self._link, content)

    async def answer(self, most: int) -> tuple[bytes, bytearray]:
        """The next frame, of at most ``most`` bytes. Raises OSError where there is none."""
        kind, length = FRAME.unpack(await self._receive(FRAME.size))
        if length > most:
            raise ConnectionResetError(f"an answer of {length} bytes")
        return kind, await self._receive(length)

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
        """Close the socket, and wait for the process."""
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


# --- the other end


def receive(link: socket.socket, into: memoryview) -> bool:
    """Fill ``into``; False where the other end is gone."""
    got = 0
    while got < len(into):
        count = link.recv_into(into[got:])
        if not count:
            return False
        got += count
    return True


def send(link: socket.socket, kind: bytes, content: bytes) -> None:
    """One frame."""
    link.sendall(FRAME.pack(kind, len(content)))
    link.sendall(content)


def told(error: SociError) -> bytes:
    """An error as a frame's content."""
    return json.dumps({"code": error.code, "message": str(error)}).encode()


def as_error(content: bytes | bytearray) -> SociError:
    """What `told` made."""
    failed = json.loads(content)
    return from_code(failed["code"], failed["message"])


def run_worker(work: Callable[[socket.socket], None]) -> None:
    """A worker's process: ``work`` with its socket, whose descriptor is the first argument, until that is closed."""
    # Ctrl-C, and a service manager's stop, reach us too; our parent ends the job first, then closes the socket.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as link:
        try:
            work(link)
        except (BrokenPipeError, ConnectionResetError):
            return  # nobody waits for the result any more
