# SPDX-License-Identifier: Apache-2.0
"""Inflate one span, from the middle of a layer.

A gzip span may start inside a byte. The inflaters that Python has cannot be told to skip bits, so the span's first bits
are moved to where they can be read: behind a few empty deflate blocks that fill up the byte before them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Any, Final

from soci.errors import InvalidGzip, InvalidInput, InvalidZtoc, LimitExceeded, Mismatch
from soci.span import MAX_SPAN_BYTES, Spans
from soci.toc import Ztoc
from soci.zinfo import Checkpoints
from soci.zstd import ZstdStream

_fast: Any = zlib  # a platform without isal's wheel has half the speed, and the same bytes
try:
    from isal import isal_zlib
except ImportError:
    pass
else:
    _fast = isal_zlib

MAX_MEMBERS: Final = 1 << 18
"""Gzip members that one span may go through. Layers made of a member a file have thousands; millions of empty ones
would only burn time."""
MAX_TAIL_BYTES: Final = 1 << 24
"""Bytes behind the end-of-archive blocks (`inflate_tail`). tar pads to 10 KiB; more than this is no padding."""

_RAW: Final = -15
_GZIP: Final = 31
_TRAILER_BYTES: Final = 8  # CRC-32 and size, behind each member's deflate stream
_FIRST_PIECE: Final = 4096  # input given to a fresh inflater; grows, so that what it leaves over is cheap to copy
_LARGEST_PIECE: Final = 1 << 22
_INFLATE_ERRORS: Final[tuple[type[Exception], ...]] = (zlib.error, _fast.error)


def inflate_span(ztoc: Ztoc, spans: Spans, i: int, compressed: bytes | memoryview) -> bytes:
    """The uncompressed bytes of span ``i``, all of `Spans.uncompressed`, from its compressed bytes.

    ``compressed`` must be exactly the blob's bytes `Spans.compressed`, and its digest checked by the caller. Raises
    `Mismatch` where its length is another, `InvalidGzip` where it does not inflate to that many bytes. Memory is
    bounded by the span's size, whatever the input. For a zstd span the error is `InvalidInput`, and `LimitExceeded`
    where it has more than `MAX_SPAN_BYTES`: see `inflate_stream`.
    """
    source = _checked(spans, i, compressed)
    start, end = spans.uncompressed(i)
    if ztoc.algorithm == "uncompressed":
        return bytes(source[: end - start])
    if start == end:
        return b""
    if end - start > MAX_SPAN_BYTES:
        raise LimitExceeded(f"span {i} has {end - start} bytes: too many to inflate in memory, see inflate_stream")
    if ztoc.algorithm == "zstd":
        return b"".join(inflate_stream(ztoc, spans, i, (source,)))
    wanted = end - start
    content = _Inflating(_checkpoints(spans), i, source).read(wanted)
    if len(content) != wanted:
        raise InvalidGzip(f"span {i} inflates to {len(content)} bytes of {wanted}")
    return content


def inflate_tail(ztoc: Ztoc, spans: Spans, compressed: bytes | memoryview) -> bytes:
    """The bytes of the uncompressed layer from the last span's end on: padding, which a zTOC does not count.

    A layer's diff_id is over it too. ``compressed`` is the last span's. Raises as `inflate_span`, and `InvalidGzip`
    for a tail of more than `MAX_TAIL_BYTES`.
    """
    last = spans.count - 1
    source = _checked(spans, last, compressed)
    start, end = spans.uncompressed(last)
    if ztoc.algorithm == "uncompressed":
        return bytes(source[end - start :])
    if ztoc.algorithm == "zstd":
        return _zstd_tail(ztoc, spans, source)
    content = _Inflating(_checkpoints(spans), last, source).read(end - start + MAX_TAIL_BYTES + 1)
    if len(content) < end - start:
        raise InvalidGzip(f"span {last} inflates to {len(content)} bytes of {end - start}")
    if len(content) > end - start + MAX_TAIL_BYTES:
        raise InvalidGzip(f"more than {MAX_TAIL_BYTES} bytes behind the end of the archive")
    return content[end - start :]


def inflate_stream(
    ztoc: Ztoc, spans: Spans, i: int, chunks: Iterable[bytes | memoryview], *, tail: bool = False
) -> Iterator[bytes]:
    """As `inflate_span`, for a span too large for memory: its compressed bytes in ``chunks``, its content in pieces.

    A zstd span is never held whole, nor a plain one; pieces have at most 1 MiB, or what a chunk has. A gzip span is
    gathered first. All of the span's bytes are taken, and a caller that hashes the chunks as they pass knows their
    digest at the end: what was put out before is not to be trusted until then. With ``tail`` the last span's padding
    follows, as `inflate_tail` has it. Raises `Mismatch` for another number of compressed bytes, and as those do.
    """
    if ztoc.algorithm == "gzip":
        source = b"".join(chunks)
        yield inflate_span(ztoc, spans, i, source)
        if tail:
            yield inflate_tail(ztoc, spans, source)
        return
    start, end = spans.uncompressed(i)
    last = i == spans.count - 1
    left, spare = end - start, MAX_TAIL_BYTES if last else 0
    for piece in _decompressed(ztoc, spans, i, chunks):
        wanted, behind = piece[:left], piece[left:]
        left -= len(wanted)
        spare -= len(behind)
        if spare < 0:
            raise InvalidInput(
                f"more than {MAX_TAIL_BYTES} bytes behind the end of the archive"
                if last
                else f"span {i} has more than {end - start} bytes"
            )
        if wanted:
            yield wanted
        if behind and tail:
            yield behind
    if left:
        raise InvalidInput(f"span {i} lacks {left} of {end - start} bytes")


def _decompressed(ztoc: Ztoc, spans: Spans, i: int, chunks: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """All that the chunks of a zstd or plain span hold; `Mismatch` where they are not as many bytes as the span."""
    start, end = spans.compressed(i)
    seen, decoder = 0, ZstdStream() if ztoc.algorithm == "zstd" else None
    for chunk in chunks:
        seen += len(chunk)
        if seen > end - start:
            raise Mismatch(f"span {i} has more than {end - start} compressed bytes")
        if decoder is None:
            yield bytes(chunk)
        else:
            yield from decoder.feed(chunk)
    if seen != end - start:
        raise Mismatch(f"span {i} has {seen} compressed bytes, not {end - start}")
    if decoder is not None:
        decoder.finish()


def _zstd_tail(ztoc: Ztoc, spans: Spans, source: memoryview) -> bytes:
    """What the last span's ``source`` decompresses to behind its own bytes; they are dropped as they come."""
    start, end = spans.uncompressed(spans.count - 1)
    pieces: list[bytes] = []
    skip = end - start
    for piece in inflate_stream(ztoc, spans, spans.count - 1, (source,), tail=True):
        if len(piece) > skip:
            pieces.append(piece[skip:])
        skip = max(0, skip - len(piece))
    return b"".join(pieces)


def check_gzip_header(data: bytes | memoryview) -> None:
    """Check the blob's bytes before its first span: one whole gzip header (RFC 1952 §2.3); raises `InvalidGzip`.

    No digest covers these bytes, and nothing is inflated with them; a blob that starts otherwise is another blob.
    """
    inflater = zlib.decompressobj(_GZIP)
    try:
        out = inflater.decompress(bytes(data) + b"\x03\x00")  # the shortest deflate stream there is
        early = inflater.eof
        out += inflater.decompress(bytes(_TRAILER_BYTES))
    except zlib.error as error:
        raise InvalidGzip(f"not a gzip header: {error}") from error
    if out or early or not inflater.eof or inflater.unused_data:
        raise InvalidGzip(f"not a gzip header: {bytes(data[:16]).hex()}")


def _checkpoints(spans: Spans) -> Checkpoints:
    if spans.checkpoints is None:
        raise InvalidZtoc("the spans are of a plain layer, the zTOC of a gzip one")
    return spans.checkpoints


def _checked(spans: Spans, i: int, compressed: bytes | memoryview) -> memoryview:
    start, end = spans.compressed(i)
    source = memoryview(compressed)
    if source.nbytes != end - start:
        raise Mismatch(f"span {i} has {source.nbytes} compressed bytes, not {end - start}")
    return source.cast("B")


class _Inflating:
    """One run over a span's compressed bytes, through as many gzip members as it takes."""

    def __init__(self, checkpoints: Checkpoints, i: int, source: memoryview) -> None:
        bits = checkpoints.bits(i)
        self._span = i
        self._source = source
        self._at = 0
        self._first = b""
        if bits:
            if not source:
                raise InvalidGzip(f"span {i} has no bytes to inflate")
            self._first = _PRIMERS[bits][:-1] + bytes([_PRIMERS[bits][-1] | source[0] >> (8 - bits) << (8 - bits)])
            self._at = 1
        self._window = checkpoints.window(i)

    def read(self, wanted: int) -> bytes:
        """At most ``wanted`` bytes of output; fewer where the input ends."""
        inflater = _new_inflater(_RAW, self._window)
        pieces: list[bytes] = []
        trailer = _TRAILER_BYTES  # a raw inflater leaves its member's trailer to us
        for _ in range(MAX_MEMBERS):
            wanted -= self._member(inflater, wanted, pieces)
            if not inflater.eof or not wanted:
                return b"".join(pieces)
            self._at += trailer
            if self._at > len(self._source):
                raise InvalidGzip(f"span {self._span}: gzip member cut short")
            if self._at == len(self._source):
                return b"".join(pieces)
            inflater, trailer = _new_inflater(_GZIP, None), 0
        raise InvalidGzip(f"span {self._span} goes through more than {MAX_MEMBERS} gzip members")

    def _member(self, inflater: Any, wanted: int, pieces: list[bytes]) -> int:
        """Inflate to the end of the member, of the input or of ``wanted``; returns how many bytes came out."""
        size, left = _FIRST_PIECE, wanted
        while left and not inflater.eof:
            piece: bytes | memoryview = self._first
            if piece:
                self._first = b""
            else:
                piece = self._source[self._at : self._at + size]
                self._at += len(piece)
                size = min(size * 4, _LARGEST_PIECE)
            if not piece:
                break
            try:
                out = inflater.decompress(piece, left)
            except _INFLATE_ERRORS as error:
                raise InvalidGzip(f"span {self._span} does not inflate: {error}") from error
            self._at -= len(inflater.unused_data)
            if out:
                left -= len(out)
                pieces.append(out)
        return wanted - left


def _new_inflater(wbits: int, window: memoryview | None) -> Any:
    return _fast.decompressobj(wbits) if window is None else _fast.decompressobj(wbits, zdict=window)


def _empty_blocks(bits: int) -> bytes:
    """Deflate blocks without output whose length is ``bits`` modulo 8; the last byte has its free high bits clear.

    An empty block in the fixed code has 10 bits, so any number of them has an even length. An odd one takes an
    empty block in a code of its own; the one here is as small as such a block can be, 95 bits (RFC 1951 §3.2.7).
    """
    fields: list[tuple[int, int]] = []  # (value, width), each written from its lowest bit
    if bits % 2:
        # Not final, dynamic; 257 literal codes, 1 distance code, 19 code lengths.
        fields += [(0, 1), (2, 2), (0, 5), (0, 5), (15, 4)]
        # Lengths of the code-length codes, in their odd order: "18" has 1 bit; "0" and "1" have 2.
        order = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)
        fields += [({18: 1, 0: 2, 1: 2}.get(symbol, 0), 3) for symbol in order]
        # 138 + 118 literals have no code; end-of-block has 1 bit; the distance code has none. Then end-of-block.
        fields += [(0, 1), (138 - 11, 7), (0, 1), (118 - 11, 7), (0b11, 2), (0b01, 2), (0, 1)]
    while sum(width for _, width in fields) % 8 != bits:
        fields += [(0, 1), (1, 2), (0, 7)]
    value = position = 0
    for number, width in fields:
        value |= number << position
        position += width
    return value.to_bytes(position // 8 + 1, "little")


_PRIMERS: Final = {bits: _empty_blocks(8 - bits) for bits in range(1, 8)}
"""What goes before a span that starts with ``bits`` bits of a byte; the last byte still lacks them."""
