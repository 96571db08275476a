# SPDX-License-Identifier: Apache-2.0
"""One zTOC against its layer, while the layer's blob goes by once.

The blob is inflated straight, from its first byte on, and beside it span by span, each from its own checkpoint. What
comes out is compared by digest; the straight side also goes through a tar walk, whose members the table of contents
must have. Memory is that of the two tables and of one span: a gzip one is inflated whole, and no more than
`soci.span.MAX_SPAN_BYTES`; of a zstd one, which may be a whole layer, `SPOOL_BYTES`, and a larger one waits in a file.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Final

from soci.decompress import decompressor
from soci.digest import Digest, hex_of, new_hash
from soci.errors import SociError
from soci.inflate import check_gzip_header, inflate_stream
from soci.oci import Descriptor
from soci.span import Spans
from soci.tar import TarWalker
from soci.toc import Ztoc
from soci_indexing.compare import differences, shown

MAX_DEFECTS: Final = 1000
"""Defects of one layer that are told one by one; more are only counted."""
SPOOL_BYTES: Final = 64 << 20
"""Compressed bytes of a span that are held in memory."""
MAX_PADDING_BYTES: Final = 1 << 24
"""Bytes of the tar behind its end-of-archive blocks."""
READ_BYTES: Final = 1 << 20
"""Bytes of a span that are read at a time."""


@dataclass(frozen=True, slots=True)
class Defect:
    """One thing that is not as it should be. ``place``: ``index``, ``layer``, ``zTOC``, ``span 3``, ``path bin/sh``."""

    layer: Digest | None
    place: str
    text: str

    def __str__(self) -> str:
        return f"layer {self.layer}: {self.place}: {self.text}" if self.layer else f"{self.place}: {self.text}"


class Defects:
    """What was found of one layer."""

    def __init__(self, layer: Digest | None) -> None:
        self._layer = layer
        self.found: list[Defect] = []
        self.more = 0

    def add(self, place: str, text: object) -> None:
        """Note a defect, or count it where there are enough."""
        if len(self.found) < MAX_DEFECTS:
            self.found.append(Defect(self._layer, place, str(text)))
        else:
            self.more += 1


class LayerProof:
    """Takes the blob in pieces. Defects are collected and never raised; ``hopeless`` says that no more is needed.

    ``diff_id`` is what the image's config says of the layer, None where it says nothing.
    """

    def __init__(self, layer: Descriptor, ztoc: Ztoc, spans: Spans, diff_id: Digest | None, defects: Defects) -> None:
        self._layer = layer
        self._ztoc = ztoc
        self._diff_id = diff_id
        self._defects = defects
        self.hopeless = False
        self._blob = new_hash(layer.digest)
        self._size = 0
        self._straight = decompressor(ztoc.algorithm)
        self._tar = hashlib.sha256() if diff_id is None else new_hash(diff_id)
        self._tar_size = 0
        self._tar_limit = ztoc.uncompressed_size + MAX_PADDING_BYTES
        self._walker: TarWalker | None = TarWalker(compat=True)
        self._expected = _Cut([spans.uncompressed(i) for i in range(spans.count)])
        self._spans = _SpanSide(ztoc, spans, defects)

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the blob."""
        self._size += len(chunk)
        if self._size > self._layer.size:
            self._give_up("layer", f"has more than the {self._layer.size} bytes that the manifest says")
        if self.hopeless:
            return
        self._blob.update(chunk)
        self._spans.feed(chunk)
        try:
            for out in self._straight.feed(chunk):
                if not self._take(out):
                    return
        except SociError as error:
            self._give_up("layer", error)

    def finish(self) -> None:
        """The blob has ended: compare."""
        if self.hopeless:
            return
        if self._size != self._layer.size:
            self._defects.add("layer", f"has {self._size} bytes, the manifest says {self._layer.size}")
        if self._blob.hexdigest() != hex_of(self._layer.digest):
            self._defects.add("layer", "its bytes have another digest")
        try:
            self._straight.finish()
        except SociError as error:
            self._defects.add("layer", error)
        if self._diff_id is not None and self._tar.hexdigest() != hex_of(self._diff_id):
            self._defects.add("layer", f"its tar has another digest than the config's diff_id {self._diff_id}")
        self._spans.finish(self._expected.digests())
        if self._walker is not None:
            self._compare(self._walker)

    def _take(self, out: bytes) -> bool:
        """Some bytes of the tar; False where it has too many."""
        self._tar_size += len(out)
        if self._tar_size > self._tar_limit:
            end = self._ztoc.uncompressed_size
            self._give_up("layer", f"has more than {MAX_PADDING_BYTES} bytes of tar behind byte {end}, the zTOC's end")
            return False
        self._tar.update(out)
        self._expected.feed(out)
        if self._walker is not None:
            try:
                self._walker.feed(out)
            except SociError as error:
                self._defects.add("layer", f"is no tar that can be read: {error}")
                self._walker = None
        return True

    def _compare(self, walker: TarWalker) -> None:
        try:
            size = walker.finish()
        except SociError as error:
            self._defects.add("layer", f"is no tar that can be read: {error}")
            return
        if size != self._ztoc.uncompressed_size:
            self._defects.add("zTOC", f"says that the tar has {self._ztoc.uncompressed_size} bytes; it has {size}")
        for name, text in differences(self._ztoc.entries, walker.entries):
            self._defects.add(f"path {shown(name)}", text)

    def _give_up(self, place: str, text: object) -> None:
        if not self.hopeless:
            self._defects.add(place, text)
        self.hopeless = True

    def close(self) -> None:
        """Let go of the file that a large span may wait in."""
        self._spans.close()


class _Cut:
    """The digests of the tar's bytes, span by span."""

    def __init__(self, bounds: list[tuple[int, int]]) -> None:
        self._bounds = bounds
        self._digests: list[bytes] = []
        self._state = hashlib.sha256()
        self._at = 0

    def feed(self, out: bytes) -> None:
        view = memoryview(out)
        while view and len(self._digests) < len(self._bounds):
            _, end = self._bounds[len(self._digests)]
            part, view = view[: end - self._at], view[end - self._at :]
            self._state.update(part)
            self._at += len(part)
            self._close_full()

    def _close_full(self) -> None:
        while len(self._digests) < len(self._bounds) and self._at >= self._bounds[len(self._digests)][1]:
            self._digests.append(self._state.digest())
            self._state = hashlib.sha256()

    def digests(self) -> list[bytes]:
        """Of all spans; the tar may have ended before some of them."""
        self._close_full()
        while len(self._digests) < len(self._bounds):
            self._digests.append(self._state.digest())
            self._state = hashlib.sha256()
        return self._digests


class _SpanSide:
    """The blob cut into spans, each of them digested, and inflated from its checkpoint."""

    def __init__(self, ztoc: Ztoc, spans: Spans, defects: Defects) -> None:
        self._ztoc = ztoc
        self._geometry = spans
        self._defects = defects
        self._inflated: list[bytes | None] = []  # the digest of each span's uncompressed bytes
        self._at = 0  # in the blob
        self._tail = b""  # the byte before the current chunk: a span may begin in it
        self._head = bytearray()  # what is before the first span
        self._first = spans.compressed(0)[0] if spans.count else 0
        self._got = self._first  # up to where the span that is open has its bytes
        self._spool: IO[bytes] = _new_spool()
        self._digest = new_hash(spans.digest(0)) if spans.count else hashlib.sha256()

    def feed(self, chunk: bytes) -> None:
        base, view = self._at, memoryview(chunk)
        self._at += len(chunk)
        if base < self._first:
            self._head += view[: self._first - base]
        while len(self._inflated) < self._geometry.count:
            _, end = self._geometry.compressed(len(self._inflated))
            if self._got == base - 1:
                self._put(self._tail)
            if self._got < self._at:
                self._put(view[self._got - base : max(end - base, 0)])
            if self._got < end:
                break
            self._close_span(len(self._inflated))
        self._tail = chunk[-1:] or self._tail

    def finish(self, expected: list[bytes]) -> None:
        """``expected``: the digest of each span's bytes in the tar."""
        if self._ztoc.algorithm == "gzip":
            try:
                check_gzip_header(bytes(self._head))
            except SociError as error:
                self._defects.add("layer", error)
        for i in range(len(self._inflated), self._geometry.count):
            self._defects.add(f"span {i}", "the layer ends before it does")
        for i, (got, wanted) in enumerate(zip(self._inflated, expected, strict=False)):
            if got is not None and got != wanted:
                self._defects.add(f"span {i}", "inflates from its checkpoint to other bytes than the layer has there")

    def _put(self, part: bytes | memoryview) -> None:
        self._digest.update(part)
        self._spool.write(part)
        self._got += len(part)

    def _close_span(self, i: int) -> None:
        promised = self._geometry.digest(i)
        inflated: bytes | None = None
        if self._digest.hexdigest() != hex_of(promised):
            self._defects.add(f"span {i}", f"its bytes have another digest than {promised}")
        else:
            state = hashlib.sha256()
            try:
                for piece in self._inflate(i):
                    state.update(piece)
                inflated = state.digest()
            except SociError as error:
                self._defects.add(f"span {i}", error)
        self._inflated.append(inflated)
        self._spool.close()
        self._spool = _new_spool()
        if i + 1 < self._geometry.count:
            self._got = self._geometry.compressed(i + 1)[0]
            self._digest = new_hash(self._geometry.digest(i + 1))

    def _inflate(self, i: int) -> Iterator[bytes]:
        self._spool.seek(0)
        pieces = iter(lambda: self._spool.read(READ_BYTES), b"")
        return inflate_stream(self._ztoc, self._geometry, i, pieces)

    def close(self) -> None:
        self._spool.close()


def _new_spool() -> IO[bytes]:
    return tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)
