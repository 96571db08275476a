# SPDX-License-Identifier: Apache-2.0
"""The read path: a file's bytes out of the layer's sparse tar, and the wait for those that are not here yet.

Bytes that are here cost a look at the presence map and one pread(2). For others the spans are asked for (see
`soci_mounter.flights`), together with some that the same file will need next. No failure is remembered: after a read
that failed, the next one starts anew.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from soci.digest import Digest
from soci.errors import Mismatch, SociError, Unavailable
from soci.launch import TraceParent
from soci.tree import Node
from soci_cache import LayerReader
from soci_mounter.flights import Fetch, Flights, Trouble
from soci_mounter.headers import Headers

FIRST_WINDOW = 2
LONGEST_WINDOW = 16
"""Spans that are fetched ahead of a read, within its file: doubled, from first to longest, while the file is read in
order."""
EVICTION_TRIES = 8
"""Times that one read looks again after its spans were evicted under its hands."""
REPEAT = 1.0
LAST_CHANCE = 2.0
"""The kernel answers a failed read-ahead by asking once more for the page that its reader waits for. A read that comes
within `REPEAT` seconds of one that failed at the same place therefore gets `LAST_CHANCE` seconds and not the whole
deadline again: time enough to see that the cause is gone."""
_NEVER = 1 << 62


@dataclass(frozen=True, slots=True)
class Miss:
    """A read of ``mount`` that had to wait for spans ``first``..``last``; ``failed`` is None on success."""

    mount: str
    layer: Digest
    path: bytes  # the member's name in the layer
    first: int
    last: int
    seconds: float
    length: int  # bytes that the reader asked for
    trace: TraceParent | None
    failed: SociError | None = None


@dataclass(frozen=True, slots=True)
class Seams:
    """What reads of all layers share: the time that a read may take, and where news go."""

    deadline: float  # seconds
    missed: Callable[[Miss], None]
    trouble: Trouble
    traces: dict[str, TraceParent] = field(default_factory=dict)  # mount -> the launch that its misses belong to


class LayerContent:
    """The bytes of one layer, shared by all mounts of it. Used from one event loop."""

    def __init__(self, reader: LayerReader, fetch: Fetch, seams: Seams, headers: Headers | None) -> None:
        """``headers`` None leaves tar headers unchecked."""
        self.reader = reader
        self.seams = seams
        self.flights = Flights(reader, fetch, seams.trouble)
        self._headers = headers
        self._checked: set[int] = set()  # nodes whose tar header agrees with the table of contents
        self.closed = False

    def open(self, mount: str, node_id: int, node: Node) -> FileHandle:
        """A handle on a regular file."""
        return FileHandle(self, mount, node_id, node)

    async def close(self) -> None:
        """Let go of everything; reads fail from now on."""
        self.closed = True
        await self.flights.close()
        self.reader.close()

    async def check_header(self, handle: FileHandle, deadline: float) -> None:
        """Compare the file's tar header with its entry in the table of contents, once; `Mismatch` if they differ."""
        if self._headers is None or handle.node_id in self._checked:
            return
        start, end = self._headers.place(handle.node.data_offset)
        self._headers.check(handle.node.data_offset, await self.get(start, end - start, handle, deadline))
        self._checked.add(handle.node_id)

    def covering(self, start: int, length: int) -> range:
        """The spans of these bytes of the tar, at least one; `Mismatch` where the layer has no such bytes."""
        if length <= 0 or start < 0 or start + length > self.reader.spans.uncompressed_size:
            raise Mismatch(f"{self.reader.layer} has no {length} bytes at {start}")
        return self.reader.spans.covering(start, length)

    async def get(self, start: int, length: int, handle: FileHandle, deadline: float) -> bytes:
        """``length`` bytes of the uncompressed tar at ``start``: all of them, right, or an error."""
        spans = self.covering(start, length)
        for _ in range(EVICTION_TRIES):
            if self.reader.missing(spans):
                await self._wait(spans, length, handle, deadline)
            data = self.reader.pread(length, start)
            # Whoever evicts a span takes its mark away first: bytes read under a mark that still stands are right.
            if len(data) == length and not self.reader.missing(spans):
                return data
        raise Unavailable(f"spans {spans.start} to {spans.stop - 1} are evicted as fast as they are fetched")

    async def _wait(self, spans: range, length: int, handle: FileHandle, deadline: float) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        trace = self.seams.traces.get(handle.mount)

        def tell(failed: SociError | None) -> None:
            first, last = spans[0], spans[-1]
            path, seconds = handle.node.first_name, loop.time() - began
            layer = self.reader.layer
            self.seams.missed(Miss(handle.mount, layer, path, first, last, seconds, length, trace, failed))

        try:
            await self.flights.need(spans, deadline, trace)
        except SociError as error:
            tell(error)
            raise
        tell(None)


class FileHandle:
    """One open file: what it is, and how it was read so far."""

    __slots__ = ("_ahead_at", "_content", "_failed", "_last", "_window", "mount", "node", "node_id")

    def __init__(self, content: LayerContent, mount: str, node_id: int, node: Node) -> None:
        self._content = content
        self.mount = mount
        self.node_id = node_id
        self.node = node
        self._last = -2  # the last span of the newest read
        self._window = FIRST_WINDOW
        self._failed = (0, 0, 0.0)  # start and end of the read that failed last, and when
        self._ahead_at = _NEVER  # reading this span starts the next read-ahead

    async def read(self, offset: int, length: int) -> bytes:
        """The file's bytes at ``offset``, cut at its end. Raises `SociError`, or ESTALE after an unmount."""
        content = self._content
        if content.closed:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        length = min(length, self.node.size - offset)
        if length <= 0:
            return b""
        now = asyncio.get_running_loop().time()
        deadline = now + self._patience(offset, length, now)
        try:
            start = self.node.data_offset + offset
            spans = content.covering(start, length)
            missing = content.reader.missing(spans)
            if missing or spans[-1] >= self._ahead_at:
                self._read_ahead(spans, deadline)
            self._last = spans[-1]
            await content.check_header(self, deadline)
            return await content.get(start, length, self, deadline)
        except OSError as error:
            raise SociError(f"the span cache cannot be read: {error}") from error
        except SociError as error:
            self._failed = offset, offset + length, asyncio.get_running_loop().time()
            content.seams.trouble(f"reading {os.fsdecode(self.node.first_name)} of mount {self.mount} failed", error)
            raise

    def _patience(self, offset: int, length: int, now: float) -> float:
        """Seconds that a read may take."""
        start, end, failed = self._failed
        whole = self._content.seams.deadline
        if now - failed <= REPEAT and offset < end and start < offset + length:
            return min(LAST_CHANCE, whole)
        return whole

    def _read_ahead(self, spans: range, deadline: float) -> None:
        """Have the read's own spans under way first, and then those that the file goes on to."""
        content = self._content
        in_order = spans[0] in (self._last, self._last + 1)
        self._window = min(self._window * 2, LONGEST_WINDOW) if in_order else FIRST_WINDOW
        trace = content.seams.traces.get(self.mount)
        content.flights.begin(spans, deadline, trace)
        end_of_file = content.covering(self.node.data_offset + self.node.size - 1, 1)[-1]
        end = min(spans[-1] + self._window, end_of_file)
        self._ahead_at = spans[-1] + 1 if end > spans[-1] else _NEVER
        content.flights.ahead(range(spans[-1] + 1, end + 1), deadline, trace)
