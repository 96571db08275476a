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
from soci_mounter.guess import Guesses
from soci_mounter.headers import Headers

SMALL_FILE = 4 << 20
"""Bytes of a file that is fetched whole as soon as any of it is missed."""
LONGEST_AHEAD = 128 << 20
"""Bytes that are fetched ahead of a read, at most: as many as the file was read in order, so that who reads here and
there fetches nothing for nobody, and who reads on soon has the link to himself."""
SURE_STRETCH = 8 << 20
SURE_TIMES = 4
"""After so many bytes in order it is sure that the file is read on: from then on so many times as many are fetched."""
LEAST_STRETCH = 512 << 10
"""Bytes read in order that are no sign yet of more: the kernel itself reads on a little after each page."""
SLACK = 1 << 20
"""Bytes that a read may begin before or after the end of the last one and be in order: the kernel sends several."""
AHEAD_ASK = 16 << 20
"""Compressed bytes of one ask for spans ahead: several fetchers may share the work."""
EVICTION_TRIES = 8
"""Times that one read looks again after its spans were evicted under its hands."""
REPEAT = 1.0
LAST_CHANCE = 3.0
"""The kernel answers a failed read-ahead by asking once more for the page that its reader waits for. A read that comes
within `REPEAT` seconds of one that failed at the same place therefore gets `LAST_CHANCE` seconds and not the whole
deadline again: longer than a flight pauses between tries (`soci_mounter.flights`): to see that the cause is gone."""
FOLLOWS = 0.005
NO_CHANCE = 0.002
"""EROFS asks page by page for what it reads ahead, and one reader waits for all of them. A read that comes within
`FOLLOWS` seconds of one that failed, right behind it, is such a page: it gets `NO_CHANCE`."""


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
        self.flights = Flights(self, fetch, seams.trouble)
        self.guesses = Guesses()
        self._headers = headers
        self._checked: set[int] = set()  # nodes whose tar header agrees with the table of contents
        self.closed = False

    def missing(self, spans: range) -> list[int]:
        """Those of ``spans`` that are absent."""
        return self.reader.missing(spans)

    def renew(self, reader: LayerReader) -> None:
        """Read from this one from now on: the other's files are gone."""
        old, self.reader = self.reader, reader
        old.close()

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
        header = await self.get(start, end - start, handle, deadline)
        await self._headers.ready()
        self._headers.check(handle.node.data_offset, header)
        self._checked.add(handle.node_id)

    def header_spans(self, handle: FileHandle) -> range:
        """The spans of the file's tar header, where it is yet to be checked."""
        if self._headers is None or handle.node_id in self._checked:
            return range(0)
        start, end = self._headers.place(handle.node.data_offset)
        return self.covering(start, end - start)

    def asks(self, spans: range) -> list[range]:
        """``spans`` cut into asks of about `AHEAD_ASK`."""
        found: list[range] = []
        sizes = self.reader.spans.compressed
        for span in spans:
            if found and sizes(span)[1] - sizes(found[-1].start)[0] <= AHEAD_ASK:
                found[-1] = range(found[-1].start, span + 1)
            else:
                found.append(range(span, span + 1))
        return found

    def guess(self, spans: range) -> int:
        """How many spans behind these, which are missed, are worth to be fetched along."""
        return self.guesses.behind(spans, self.reader.missing, self.reader.spans.count)

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
            data = self.reader.get(length, start, spans)
            if data is not None:
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


@dataclass(frozen=True, slots=True)
class Failed:
    """Reads that failed: their range in the file, and when the last of them did (the loop's clock)."""

    start: int
    end: int
    at: float

    def meets(self, offset: int, length: int, now: float) -> bool:
        """Whether a read that begins now is a repetition of one, or goes on right where they ended."""
        return now - self.at <= REPEAT and offset <= self.end and self.start < offset + length

    def again(self, offset: int, length: int, begun: float, ended: float) -> Failed:
        """What is known after one more read has failed."""
        if not self.meets(offset, length, begun):
            return Failed(offset, offset + length, ended)
        return Failed(min(self.start, offset), max(self.end, offset + length), ended)


NEVER = Failed(0, 0, -REPEAT - 1.0)


def patience(failed: Failed, offset: int, length: int, now: float, whole: float) -> float:
    """Seconds that a read may take, of the ``whole`` deadline."""
    if not failed.meets(offset, length, now):
        return whole
    return min(NO_CHANCE if offset == failed.end and now - failed.at <= FOLLOWS else LAST_CHANCE, whole)


class FileHandle:
    """One open file: what it is, and how it was read so far."""

    __slots__ = ("_asked", "_content", "_failed", "_from", "_next", "mount", "node", "node_id")

    def __init__(self, content: LayerContent, mount: str, node_id: int, node: Node) -> None:
        self._content = content
        self.mount = mount
        self.node_id = node_id
        self.node = node
        self._from = 0  # since here it has been read in order
        self._next = 0  # the end of the newest read
        self._asked = 0  # the end of what was asked for ahead, while in order
        self._failed = NEVER

    async def read(self, offset: int, length: int) -> bytes:
        """The file's bytes at ``offset``, cut at its end. Raises `SociError`, or ESTALE after an unmount."""
        content = self._content
        if content.closed:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        length = min(length, self.node.size - offset)
        if length <= 0:
            return b""
        now = asyncio.get_running_loop().time()
        deadline = now + patience(self._failed, offset, length, now, content.seams.deadline)
        try:
            start = self.node.data_offset + offset
            spans = content.covering(start, length)
            self._begin(offset, length, spans, deadline)
            await content.check_header(self, deadline)
            return await content.get(start, length, self, deadline)
        except OSError as error:
            raise SociError(f"the span cache cannot be read: {error}") from error
        except SociError as error:
            self._failed = self._failed.again(offset, length, now, asyncio.get_running_loop().time())
            content.seams.trouble(f"reading {os.fsdecode(self.node.first_name)} of mount {self.mount} failed", error)
            raise

    def _begin(self, offset: int, length: int, spans: range, deadline: float) -> None:
        """Have what the read needs under way, its file's header as well, and what the file goes on to."""
        content = self._content
        end = self._ahead_to(offset, length)
        trace = content.seams.traces.get(self.mount)
        further: list[range] = []
        if end > self._asked:
            covering = content.covering(self.node.data_offset + offset, end - offset)
            further = content.asks(range(spans.stop, covering.stop))
        if content.reader.missing(spans):
            header = content.header_spans(self)
            wanted = range(min(header.start, spans.start), spans.stop) if header.stop >= spans.start else spans
            if wanted is spans and header:
                content.flights.begin(header, deadline, trace)
            along = len(further.pop(0)) if further else content.guess(spans)
            content.flights.begin(wanted, deadline, trace, along)
        content.guesses.read(spans)
        if all(content.flights.ahead(ask, deadline, trace) for ask in further):
            self._asked = max(self._asked, end)

    def _ahead_to(self, offset: int, length: int) -> int:
        """Up to where the file is to be fetched, now that it is read here."""
        if not self._next - SLACK <= offset <= self._next + SLACK:
            self._from, self._next, self._asked = offset, offset, 0
        self._next = max(self._next, offset + length)
        if self.node.size <= SMALL_FILE:
            return self.node.size
        stretch = self._next - self._from
        if stretch < LEAST_STRETCH:
            return self._next
        ahead = min(stretch * (SURE_TIMES if stretch >= SURE_STRETCH else 1), LONGEST_AHEAD)
        # Asked for again only when half of it was read: many small asks are no better.
        return min(self._next + ahead, self.node.size) if self._asked < self._next + ahead // 2 else self._asked
