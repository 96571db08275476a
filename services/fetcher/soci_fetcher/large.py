# SPDX-License-Identifier: Apache-2.0
"""Spans too large for memory: a zstd layer of one frame is one span, and may be many gigabytes.

Its compressed bytes are gathered in a file without a name, piece by piece; only when all are there and have the
promised digest are they decompressed, as a stream, into ``layer.tar``. They could be decompressed while they come, but
then unchecked bytes would be written to where another fetcher of this node may have put the right ones meanwhile.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import IO

from soci.digest import hex_of, new_hash
from soci.errors import InvalidInput, LimitExceeded, Mismatch, SociError
from soci.inflate import inflate_stream
from soci.span import Spans
from soci_cache import LayerWriter
from soci_fetcher.runs import RUN_BYTES
from soci_runtime.flights import in_thread

LARGE_BYTES = 64 << 20
"""Bytes of a span, compressed or not, beyond which it is large: so much is the most that one span takes of memory."""
SLOWEST_RATE = 1 << 20
"""Bytes a second that the limit on a large span's time supposes."""
READ_BYTES = 1 << 20


def is_large(spans: Spans, span: int) -> bool:
    """Whether a span goes through a file."""
    return any(end - start > LARGE_BYTES for start, end in (spans.compressed(span), spans.uncompressed(span)))


def seconds_of(spans: Spans, span: int) -> float:
    """How long a large span may take, beside what any run may."""
    start, end = spans.compressed(span)
    return (end - start) / SLOWEST_RATE


async def bring(
    read: Callable[[int, int], Awaitable[bytes]],
    writer: LayerWriter,
    span: int,
    how: tuple[int, int],
    reject: Callable[[int], None],
) -> None:
    """Fetch, check and fill one span.

    ``read`` gives bytes [start, end) of the blob; ``how``: after how many tries with wrong bytes it is `Mismatch`, and
    what the span is marked with; ``reject`` hears of each such try. Raises `LimitExceeded` where the disk is full, and
    what ``read`` raises.
    """
    attempts, mark = how
    start, end = writer.spans.compressed(span)
    promised = writer.spans.digest(span)
    with _disk(writer), tempfile.TemporaryFile(dir=writer.directory) as file:
        for _ in range(attempts):
            state = new_hash(promised)
            await in_thread(file.seek, 0)
            for at in range(start, end, RUN_BYTES):
                piece = await read(at, min(at + RUN_BYTES, end))
                state.update(piece)
                await in_thread(file.write, piece)
            if state.hexdigest() == hex_of(promised):
                await in_thread(_fill, writer, span, file, mark)
                return
            reject(span)
    raise Mismatch(f"span {span} of {writer.layer} does not match its digest {promised} (after {attempts} tries)")


def _fill(writer: LayerWriter, span: int, file: IO[bytes], mark: int) -> None:
    if writer.present(span):
        return
    file.seek(0)
    pieces = decompressed(writer, span, iter(lambda: file.read(READ_BYTES), b""))
    writer.fill_pieces(span, pieces, mark, tail=True)


def decompressed(writer: LayerWriter, span: int, chunks: Iterator[bytes] | tuple[memoryview]) -> Iterator[bytes]:
    """A span's bytes in pieces, from its compressed ones, whose digest was checked; the last one's with its padding.

    Where they do not inflate it is the zTOC's fault, and the error says so: the registry has no better ones.
    """
    try:
        yield from inflate_stream(writer.ztoc, writer.spans, span, chunks, tail=span == writer.spans.count - 1)
    except (InvalidInput, Mismatch, LimitExceeded) as error:
        raise type(error)(f"the zTOC of {writer.layer} is wrong: {error}") from error


@contextmanager
def _disk(writer: LayerWriter) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise LimitExceeded(f"the disk of the span cache is full ({writer.directory})") from error
        raise SociError(f"{writer.directory}: {error}") from error
