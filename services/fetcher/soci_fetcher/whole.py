# SPDX-License-Identifier: Apache-2.0
"""One whole blob into an announced file (`soci_cache.arriving`), so that its reader can go on behind it.

A blob that is not large comes as one stream: the most regular way, and every registry can do it. A large one comes in
chunks by range requests, several at a time, from its front; its digest is computed behind the chunks that are there.
Where the server has no ranges that shows at the first request, which is for the last byte, and the blob comes as one
stream, too. The bound between the two is the registry client's: up to there it reads past a server that ignores
``Range`` without a word, and we would fetch the same bytes many times.

Nothing but this call is at work for a blob. Where the call ends early (its asker gave up, the process goes down) what
is there stays counted, and the next ask goes on with it, here or in another fetcher.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from soci.digest import Digest, hex_of, new_hash
from soci.errors import FailedPrecondition, Mismatch, NotFound, SociError, Unavailable
from soci_cache.arriving import COMPLETE, FAILED, ArrivingWriter
from soci_registry import Registry, Repository
from soci_runtime.flights import in_thread
from soci_runtime.turns import Turns

CHUNK_BYTES: Final = 8 << 20
"""Of a large blob's request where no other size is set: a reader waits for all chunks that are under way."""
CHUNK_MOST: Final = 64 << 20
"""Bytes of a chunk at most, whatever is set: it is held in memory."""
DOWNLOADS: Final = 16
"""Downloads at a time where their number is not limited by a setting."""
PIECE_BYTES: Final = 1 << 19
"""Bytes of a stream that are written together."""
PROBE_SECONDS: Final = 5.0
"""How long the range request that shows whether a server knows ranges may take."""
CHUNK_SECONDS: Final = 240.0
"""How long one chunk is tried."""
FOLLOW_SECONDS: Final = 0.1
"""Between two looks at a blob that another fetcher brings."""
HASH_BYTES: Final = 1 << 20


class Permits:
    """How many requests for whole blobs go on at once, of an image and in all; negative numbers are no limit."""

    def __init__(self, downloads: int = -1, per_image: int = 3) -> None:
        self._all = asyncio.Semaphore(downloads if downloads > 0 else DOWNLOADS)
        self.per_image = per_image if per_image > 0 else DOWNLOADS
        self._images = Turns(self.per_image)

    @asynccontextmanager
    async def of(self, image: str) -> AsyncIterator[None]:
        """Hold one for ``image``, its own first: an image that waits for itself holds nothing of the others."""
        async with self._images.hold(image), self._all:
            yield


class WholeBlobs:
    """Brings blobs into announced files. ``chunk`` 0 is `CHUNK_BYTES`."""

    def __init__(self, registry: Registry, permits: Permits, *, chunk: int = 0) -> None:
        self._registry = registry
        self._permits = permits
        self._chunk = min(chunk, CHUNK_MOST) if chunk > 0 else CHUNK_BYTES
        self._chunks_from = registry.settings.range_skip_max

    async def bring(self, image: str, layer: Digest, size: int | None, blob: Path) -> int:
        """Have the blob in ``blob``, complete and of its digest; its size.

        Raises what the registry raises, `Mismatch`, `FailedPrecondition` where nobody wants it any more, and OSError.
        A file that one blob has failed in is of no more use.
        """
        # Not in a thread: cancelled there, the writer and its lock would be nobody's.
        while (writer := ArrivingWriter.claim(blob)) is None:  # noqa: ASYNC110  another process has it
            await asyncio.sleep(FOLLOW_SECONDS)
        try:
            if writer.state == COMPLETE:
                return writer.arrived
            if writer.state == FAILED:
                raise FailedPrecondition(f"{layer} has failed in {blob}")
            try:
                size = await self._fill(image, layer, size, writer)
            except (SociError, OSError) as error:
                if isinstance(error, Mismatch):  # the next try begins at another mirror
                    self._registry.repository(image).distrust(layer)
                if not isinstance(error, Unavailable):  # that may pass, and then what is there is used
                    writer.finish(FAILED)
                raise
            writer.finish(COMPLETE)
            return size
        finally:
            writer.close()

    async def _fill(self, image: str, layer: Digest, size: int | None, writer: ArrivingWriter) -> int:
        repository = self._registry.repository(image)
        if size is None:
            size = await repository.blob_exists(layer)
            if size is None:
                raise NotFound(f"{image} has no blob {layer}")
        one = _Blob(image, layer, size, repository, writer, self._permits)
        begun = writer.arrived > 0  # by a writer that had to leave it: a stream would begin anew
        if (begun or size > max(self._chunks_from, self._chunk)) and await _knows_ranges(one):
            await _Chunks(one, self._chunk).run()
        else:
            await _stream(one)
        return size


@dataclass(frozen=True, slots=True)
class _Blob:
    image: str
    layer: Digest
    size: int
    repository: Repository
    writer: ArrivingWriter
    permits: Permits

    def check_wanted(self) -> None:
        if not self.writer.wanted:
            raise FailedPrecondition(f"nobody wants {self.layer} any more")


async def _knows_ranges(blob: _Blob) -> bool:
    """Whether the server answers a range with that range. Where it just fails, the stream says why."""
    try:
        async with blob.permits.of(blob.image):
            await blob.repository.blob_range(blob.layer, blob.size - 1, blob.size, deadline=PROBE_SECONDS)
    except SociError:
        return False
    return True


async def _stream(blob: _Blob) -> None:
    """The blob by one request, resumed by the registry client where it breaks, which compares its digest as well."""
    offset = 0
    waiting = bytearray()
    async with blob.permits.of(blob.image), aclosing(blob.repository.blob_stream(blob.layer)) as chunks:
        async for chunk in chunks:
            waiting += chunk
            if offset + len(waiting) > blob.size:
                raise Mismatch(f"{blob.layer} has more bytes than the {blob.size} that its manifest says")
            if len(waiting) >= PIECE_BYTES or offset + len(waiting) == blob.size:
                blob.check_wanted()
                await in_thread(blob.writer.write, offset, bytes(waiting))
                offset += len(waiting)
                blob.writer.advance(offset)
                waiting.clear()
    if offset != blob.size:  # all of it is written only at its end
        raise Mismatch(f"{blob.layer} has {offset + len(waiting)} bytes, not {blob.size} as its manifest says")


class _Chunks:
    """One large blob by ranges."""

    def __init__(self, blob: _Blob, chunk: int) -> None:
        self._blob = blob
        start = blob.writer.arrived  # of an earlier writer
        self._todo: Iterator[int] = iter(range(start, blob.size, chunk))
        self._chunk = chunk
        self._front = start
        self._behind: set[int] = set()  # where chunks start that came before one in front of them
        self._grown = asyncio.Event()

    async def run(self) -> None:
        """All chunks, and the digest."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(self._blob.permits.per_image):
                    tasks.create_task(self._fetch())
                tasks.create_task(self._prove())
        except BaseExceptionGroup as errors:
            raise _first(errors) from None

    async def _fetch(self) -> None:
        blob = self._blob
        while True:
            async with blob.permits.of(blob.image):
                start = next(self._todo, None)  # only now: chunks begin in their order
                if start is None:
                    return
                end = min(start + self._chunk, blob.size)
                content = await blob.repository.blob_range(blob.layer, start, end, deadline=CHUNK_SECONDS, urgent=False)
            blob.check_wanted()
            await in_thread(blob.writer.write, start, content)
            self._behind.add(start)
            while self._front in self._behind:
                self._behind.discard(self._front)
                self._front = min(self._front + self._chunk, blob.size)
            blob.writer.advance(self._front)
            self._grown.set()

    async def _prove(self) -> None:
        blob = self._blob
        state = new_hash(blob.layer)
        done = 0
        buffer = memoryview(bytearray(HASH_BYTES))

        def prove(start: int, end: int) -> None:
            while start < end:
                count = blob.writer.read_into(buffer[: end - start], start)
                if not count:
                    raise Unavailable("a whole layer's file was cut short")
                state.update(buffer[:count])
                start += count

        while True:
            front = self._front
            await in_thread(prove, done, front)
            done = front
            if done == blob.size:
                break
            if done == self._front:
                await self._grown.wait()
            self._grown.clear()
        if state.hexdigest() != hex_of(blob.layer):
            raise Mismatch(f"the {blob.size} bytes that came for {blob.layer} are others")


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a group: the others are of the same cause, or of being cancelled for it."""
    for error in errors.exceptions:
        return _first(error) if isinstance(error, BaseExceptionGroup) else error
    return errors
