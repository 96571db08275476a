# SPDX-License-Identifier: Apache-2.0
"""Building a layer's zTOC while its blob goes by, once.

Checkpoints, table of contents, span digests, and the digests of the blob and of its tar come out of the same pass, so
a layer can be indexed as it is being pulled, and never has to be on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from soci.beside import Beside, Mark
from soci.checkpoint import GzipCheckpoints
from soci.digest import Digest
from soci.errors import InvalidInput, LimitExceeded
from soci.tar import TarWalker
from soci.toc import VERSION, Algorithm, Ztoc
from soci.zinfo import MAX_SPANS, TarZinfo, encode_tar_zinfo
from soci.zstd import ZstdCheckpoints
from soci.ztoc_encode import encode_ztoc

DEFAULT_SPAN_SIZE: Final = 1 << 22
"""Bytes of the tar from one checkpoint to the next, at least."""
DEFAULT_BUILD_TOOL: Final = "AWS SOCI CLI v0.2"
"""What a zTOC says it was built by. It is part of the bytes: with this word they are those that other builders make."""
PIECE_BYTES: Final = 1 << 20
"""Bytes of the blob worked on at a time."""


@dataclass(frozen=True, slots=True)
class Built:
    """What one pass over a layer's blob found out."""

    ztoc_bytes: bytes
    ztoc: Ztoc
    layer: Digest  # of the blob
    layer_size: int  # bytes of the blob
    diff_id: Digest  # of the tar, padding included


class ZtocBuilder:
    """Takes a layer's blob in pieces of any size and gives its zTOC; pieces do not change the result.

    ``span_size`` is in bytes of the tar. A gzip layer's spans are longer, up to the next deflate block; 0 makes one a
    block. A zstd layer's are at least that long, up to the next frame: a layer of one frame is one span. ``compat``
    builds zTOCs of sparse members too, as other builders do; no reader of zTOCs can serve them.

    Times are written in UTC, always. Raises `InvalidGzip`, `InvalidInput` (no zstd), `InvalidTar`, `Unsupported` (a
    sparse member, or no libz), `LimitExceeded`; after that, the builder is of no more use.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        span_size: int = DEFAULT_SPAN_SIZE,
        build_tool: str = DEFAULT_BUILD_TOOL,
        *,
        compat: bool = False,
    ) -> None:
        make = _WAYS.get(algorithm)
        if make is None:
            raise InvalidInput(f"no zTOC for compression {algorithm!r}")
        self._algorithm = algorithm
        self._build_tool = build_tool
        self._walker = TarWalker(compat=compat)
        self._beside = Beside()
        self._layer = hashlib.sha256()
        self._layer_size = 0
        self._before: Mark = None  # what is to be done with the piece before
        self._way: _Gzip | _Zstd | _Plain = make(span_size, self._walker, self._beside)

    def feed(self, chunk: bytes | bytearray | memoryview) -> None:
        """Take the next bytes of the blob."""
        view = memoryview(chunk).cast("B")
        try:
            for start in range(0, len(view), PIECE_BYTES):
                self._feed(bytes(view[start : start + PIECE_BYTES]))
        except BaseException as error:
            self._end(error)
            raise

    def finish(self) -> Built:
        """The zTOC of what was fed. Raises `InvalidGzip` or `InvalidTar` where the blob was cut short."""
        try:
            checkpoints, digests = self._way.finish(self._layer_size)
            uncompressed_size = self._walker.finish()
        except BaseException as error:
            self._end(error)
            raise
        self._beside.close()
        ztoc = Ztoc(
            version=VERSION,
            build_tool=self._build_tool,
            compressed_size=self._layer_size,
            uncompressed_size=uncompressed_size,
            entries=self._walker.entries,
            algorithm=self._algorithm,
            max_span_id=len(digests) - 1,
            span_digests=tuple(digests),
            checkpoints=checkpoints,
        )
        layer = _digest(self._layer)
        diff_id = layer if isinstance(self._way, _Plain) else _digest(self._way.tar)
        return Built(encode_ztoc(ztoc), ztoc, layer, self._layer_size, diff_id)

    def _end(self, error: BaseException) -> None:
        """End the work beside. What failed there is of earlier bytes than ``error``: it goes before."""
        self._beside.close()
        # Neither the thread's owner nor this frame may hold on to the error: its traceback holds on to them, and
        # such a ring is kept, megabytes of buffers with it, until somebody looks for rings.
        failed, self._beside.failed = self._beside.failed, None
        try:
            if failed is not None and failed is not error and isinstance(error, Exception):
                raise failed from None
        finally:
            del failed, error

    def _feed(self, piece: bytes) -> None:
        self._beside.work(self._layer.update, piece)
        self._layer_size += len(piece)
        self._way.feed(piece)
        # The work beside may be one piece behind, no more.
        self._beside.wait(self._before)
        self._before = self._beside.mark()


class _Gzip:
    """Spans of a gzip layer: a checkpoint opens one, and closes the one before."""

    def __init__(self, span_size: int, walker: TarWalker, beside: Beside) -> None:
        self.tar = hashlib.sha256()
        self._checkpoints = GzipCheckpoints(span_size)
        self._walker = walker
        self._beside = beside
        self._old: Mark = None  # what is to be done with output up to the turn before
        self._digests: list[str] = []
        self._span = hashlib.sha256()
        self._open = False  # before the first checkpoint: the gzip header is in no span
        self._size = 0
        self._last = b""  # the byte before the current piece

    def feed(self, piece: bytes) -> None:
        points = self._checkpoints.points
        known = len(points)
        self._checkpoints.feed(piece, self._take, self._turn)
        view, at = memoryview(piece), 0
        for into, _, bits in points[known:]:
            cut = into - self._size
            self._close(view[at:cut])
            self._span = hashlib.sha256()
            self._open = True
            if bits:  # the span's first bits are in the byte before, which also belongs to the span that just ended
                self._span.update(piece[cut - 1 : cut] if cut else self._last)
            at = cut
        if self._open:
            self._beside.work(self._span.update, view[at:])
        self._size += len(piece)
        self._last = piece[-1:]

    def finish(self, _size: int) -> tuple[bytes, list[str]]:
        checkpoints = self._checkpoints.finish()
        self._close(memoryview(b""))
        self._beside.wait(self._beside.mark())
        return checkpoints, self._digests

    def _close(self, rest: memoryview) -> None:
        if self._open:
            self._beside.work(self._span.update, rest)
            self._beside.do(_note, self._digests, self._span)

    def _take(self, out: memoryview) -> None:
        self._beside.work(self.tar.update, out)
        self._beside.work(self._walker.feed, out)

    def _turn(self) -> None:
        # The memory that is about to be filled again holds what was put out before the turn before this one.
        self._beside.wait(self._old)
        self._old = self._beside.mark()


class _Zstd:
    """Spans of a zstd layer: they begin at frames, the first one at the blob's first byte."""

    def __init__(self, span_size: int, walker: TarWalker, beside: Beside) -> None:
        self.tar = hashlib.sha256()
        self._checkpoints = ZstdCheckpoints(span_size)
        self._walker = walker
        self._beside = beside
        self._digests: list[str] = []
        self._span = hashlib.sha256()
        self._before: Mark = None  # what is to be done with the output before
        self._size = 0
        self._last = b""  # the bytes before the current piece: a frame's magic number may begin there

    def feed(self, piece: bytes) -> None:
        points = self._checkpoints.points
        known = len(points)
        for out in self._checkpoints.feed(piece):
            # A small piece may hold gigabytes: the work beside may be one of its outputs behind, no more.
            self._beside.wait(self._before)
            self._beside.work(self.tar.update, out)
            self._beside.work(self._walker.feed, out)
            self._before = self._beside.mark()
        # The last bytes are hashed with the next piece, when it is known which span they belong to.
        data = self._last + piece
        origin = self._size - len(self._last)
        view, at = memoryview(data), 0
        for into, _ in points[max(known, 1) :]:
            self._beside.work(self._span.update, view[at : into - origin])
            self._beside.do(_note, self._digests, self._span)
            self._span = hashlib.sha256()
            at = into - origin
        keep = max(at, len(data) - 3)
        self._beside.work(self._span.update, view[at:keep])
        self._last = data[keep:]
        self._size += len(piece)

    def finish(self, _size: int) -> tuple[bytes, list[str]]:
        checkpoints = self._checkpoints.finish()
        self._beside.work(self._span.update, self._last)
        self._beside.do(_note, self._digests, self._span)
        self._beside.wait(self._beside.mark())
        return checkpoints, self._digests


class _Plain:
    """Spans of a plain tar: one every ``span_size`` bytes."""

    def __init__(self, span_size: int, walker: TarWalker, beside: Beside) -> None:
        if not 1 <= span_size < 1 << 63:
            raise InvalidInput(f"span size {span_size}: a plain tar needs one of at least 1 byte")
        self._span_size = span_size
        self._walker = walker
        self._beside = beside
        self._digests: list[str] = []
        self._count = 0
        self._span = hashlib.sha256()
        self._left = span_size

    def feed(self, piece: bytes) -> None:
        self._beside.work(self._walker.feed, piece)
        view = memoryview(piece)
        while view:
            part, view = view[: self._left], view[self._left :]
            self._beside.work(self._span.update, part)
            self._left -= len(part)
            if not self._left:
                self._close()

    def finish(self, size: int) -> tuple[bytes, list[str]]:
        if self._left < self._span_size:
            self._close()
        self._beside.wait(self._beside.mark())
        return encode_tar_zinfo(TarZinfo(self._span_size, size)), self._digests

    def _close(self) -> None:
        if self._count >= MAX_SPANS:
            raise LimitExceeded(f"more than {MAX_SPANS} spans: a larger span size makes fewer (MAX_SPANS)")
        self._count += 1
        self._beside.do(_note, self._digests, self._span)
        self._span = hashlib.sha256()
        self._left = self._span_size


_WAYS: Final[Mapping[str, Callable[[int, TarWalker, Beside], _Gzip | _Zstd | _Plain]]] = {
    "gzip": _Gzip,
    "zstd": _Zstd,
    "uncompressed": _Plain,
}


def _note(digests: list[str], state: hashlib._Hash) -> None:
    digests.append(_digest(state))


def _digest(state: hashlib._Hash) -> Digest:
    return Digest("sha256:" + state.hexdigest())
