# SPDX-License-Identifier: Apache-2.0
"""zTOCs of several layers at once, on as many cores as there are.

Building is inflating, hashing and walking a tar, all of it in one pass that cannot be cut. So each layer goes to one
of a few worker processes, its bytes through a socket whose buffer is all that waits between the two. On one core, a
thread of this process does the same.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Final, Protocol

from soci.build import Built, ZtocBuilder
from soci.digest import Digest
from soci.errors import Unavailable
from soci.ztoc import MAX_ZTOC_BYTES, Algorithm, parse_ztoc
from soci_indexing.worker import MAX_PIECE_BYTES
from soci_runtime.workers import Pool, WorkerProcess, as_error, cores

MAX_RESULT_BYTES: Final = MAX_ZTOC_BYTES + 4096
_BUFFER_BYTES: Final = 1 << 20


class BuildPool(Pool["_Place"]):
    """An async context manager; at most ``workers`` layers are built at once, the others wait.

    ``workers`` None means one a core; with 1, the builder runs in a thread of this process. Processes begin when they
    are first needed and end with the block.
    """

    def __init__(self, workers: int | None = None) -> None:
        super().__init__(cores() if workers is None else max(workers, 1), self._new)

    async def build(self, stream: AsyncIterator[bytes], algorithm: Algorithm, span_size: int, build_tool: str) -> Built:
        """The zTOC of the layer whose blob is ``stream``, which is not begun before there is a worker for it.

        Raises what `ZtocBuilder` raises, what the stream raises, and `Unavailable` where a worker dies. ``stream`` is
        the caller's to close. Whether it was the right layer is for the caller to check.
        """
        async with self.place() as place:
            return await place.build(stream, {"algorithm": algorithm, "span_size": span_size, "build_tool": build_tool})

    async def _new(self) -> _Place:
        return _Thread() if self.workers == 1 else await asyncio.to_thread(_Process)


class _Place(Protocol):
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


class _Process(WorkerProcess):
    """Builds in a process of its own."""

    def __init__(self) -> None:
        super().__init__("soci_indexing.worker", "builds zTOCs", buffer=_BUFFER_BYTES)

    async def build(self, stream: AsyncIterator[bytes], wish: dict[str, Any]) -> Built:
        self.clean = False
        answer = asyncio.ensure_future(self.answer(MAX_RESULT_BYTES))
        try:
            await self.send(b"B", json.dumps(wish).encode())
            async for chunk in stream:
                if answer.done():
                    break  # an error: the rest need not be read
                view = memoryview(chunk)
                for start in range(0, len(view), MAX_PIECE_BYTES):
                    await self.send(b"C", view[start : start + MAX_PIECE_BYTES])
            await self.send(b"E", b"")
            kind, content = await answer
        except OSError as error:
            raise Unavailable(f"a process that builds zTOCs ended in the middle of a layer: {error}") from error
        finally:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)
        self.clean = True
        if kind != b"R":
            raise as_error(content)
        return await asyncio.to_thread(_result, content)


def _result(content: bytearray) -> Built:
    facts, _, rest = bytes(content).partition(b"\n")
    told = json.loads(facts)
    return Built(rest, parse_ztoc(rest), Digest(told["layer"]), told["layer_size"], Digest(told["diff_id"]))
