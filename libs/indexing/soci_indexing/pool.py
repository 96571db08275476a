# SPDX-License-Identifier: Apache-2.0
"""zTOCs of several layers at once, on as many cores as there are.

Building is inflating, hashing and walking a tar, all of it in one pass that cannot be cut. So each layer goes to one
of a few worker processes, its bytes through a socket whose buffer is all that waits between the two. On one core, a
thread of this process does the same.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any, Final, Protocol, Self

from soci.build import Built, ZtocBuilder
from soci.digest import Digest
from soci.errors import SociError, Unavailable, from_code
from soci.ztoc import MAX_ZTOC_BYTES, Algorithm, parse_ztoc
from soci_indexing.worker import FRAME, MAX_PIECE_BYTES

MAX_WORKERS: Final = 8
"""Workers at most, however many cores: each holds the checkpoints of its layer in memory."""
MAX_RESULT_BYTES: Final = MAX_ZTOC_BYTES + 4096
END_SECONDS: Final = 5.0
"""How long a worker may take to see that its socket is closed, before it is killed."""
_BUFFER_BYTES: Final = 1 << 20
_BOOT: Final = (
    "import sys, json; sys.path[:] = json.loads(sys.argv.pop()); from soci_indexing.worker import main; main()"
)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


class BuildPool:
    """An async context manager; at most ``workers`` layers are built at once, the others wait.

    ``workers`` None means one a core; with 1, the builder runs in a thread of this process. Processes begin when they
    are first needed and end with the block.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = min(cores() if workers is None else max(workers, 1), MAX_WORKERS)
        self._room = asyncio.Semaphore(self.workers)
        self._idle: list[_Place] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        idle, self._idle = self._idle, []
        for place in idle:
            await place.close()

    async def build(self, stream: AsyncIterator[bytes], algorithm: Algorithm, span_size: int, build_tool: str) -> Built:
        """The zTOC of the layer whose blob is ``stream``, which is not begun before there is a worker for it.

        Raises what `ZtocBuilder` raises, what the stream raises, and `Unavailable` where a worker dies. ``stream`` is
        the caller's to close. Whether it was the right layer is for the caller to check.
        """
        async with self._room:
            place = self._idle.pop() if self._idle else await self._begin()
            whole = False
            try:
                built = await place.build(
                    stream, {"algorithm": algorithm, "span_size": span_size, "build_tool": build_tool}
                )
                whole = True
            except SociError:
                whole = place.clean
                raise
            finally:
                # One that stopped in the middle of a layer still expects its rest.
                if whole:
                    self._idle.append(place)
                else:
                    await asyncio.shield(place.close(kill=True))
            return built

    async def _begin(self) -> _Place:
        return _Thread() if self.workers == 1 else await asyncio.to_thread(_Process)


class _Place(Protocol):
    """Where one layer at a time is built. ``clean``: it is ready for another one."""

    clean: bool

    async def build(self, stream: AsyncIterator[bytes], wish: dict[str, Any]) -> Built: ...

    async def close(self, *, kill: bool = False) -> None: ...


class _Thread:
    """Builds in the threads of this process."""

    def __init__(self) -> None:
        self.clean = True

    async def build(self, stream: AsyncIterator[bytes], wish: dict[str, Any]) -> Built:
        builder = ZtocBuilder(wish["algorithm"], wish["span_size"], wish["build_tool"])
        async for chunk in stream:
            await asyncio.to_thread(builder.feed, chunk)
        return await asyncio.to_thread(builder.finish)

    async def close(self, *, kill: bool = False) -> None:
        del kill


class _Process:
    """Builds in a process of its own, begun afresh: a fork would take our threads' locks along."""

    def __init__(self) -> None:
        self.clean = True
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                for end in (ours, theirs):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
                ours.setblocking(False)  # noqa: FBT003  (positional only)
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _BOOT, str(theirs.fileno()), json.dumps(sys.path)],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                )
            except OSError as error:
                ours.close()
                raise Unavailable(f"cannot begin a process that builds zTOCs: {error.strerror}") from error
        self._link = ours

    async def build(self, stream: AsyncIterator[bytes], wish: dict[str, Any]) -> Built:
        self.clean = False
        answer = asyncio.ensure_future(self._answer())
        try:
            await self._send(b"B", json.dumps(wish).encode())
            async for chunk in stream:
                if answer.done():
                    break  # an error: the rest need not be read
                view = memoryview(chunk)
                for start in range(0, len(view), MAX_PIECE_BYTES):
                    await self._send(b"C", view[start : start + MAX_PIECE_BYTES])
            await self._send(b"E", b"")
            kind, content = await answer
        except OSError as error:
            raise Unavailable(f"a process that builds zTOCs ended in the middle of a layer: {error}") from error
        finally:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)
        self.clean = True
        if kind != b"R":
            told = json.loads(content)
            raise from_code(told["code"], told["message"])
        return await asyncio.to_thread(_result, content)

    async def _answer(self) -> tuple[bytes, bytearray]:
        kind, length = FRAME.unpack(await self._receive(FRAME.size))
        if length > MAX_RESULT_BYTES:
            raise ConnectionResetError(f"an answer of {length} bytes")
        return kind, await self._receive(length)

    async def _send(self, kind: bytes, content: bytes | memoryview) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._link, FRAME.pack(kind, len(content)))
        await loop.sock_sendall(self._link, content)

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


def _result(content: bytearray) -> Built:
    facts, _, rest = bytes(content).partition(b"\n")
    told = json.loads(facts)
    return Built(rest, parse_ztoc(rest), Digest(told["layer"]), told["layer_size"], Digest(told["diff_id"]))
