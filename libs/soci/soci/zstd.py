# SPDX-License-Identifier: Apache-2.0
"""zstd layers: frames, and the checkpoints that they make possible.

A zstd frame needs nothing from before it, so a span can begin where a frame does and at no other place. Layers whose
writer cut them into frames (zstd:chunked, pzstd, zstd with seek tables) can be loaded lazily as they are; a layer of
one frame is one span. What a checkpoint is, byte by byte: docs/zstd.md.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import zstandard

from soci.errors import InvalidInput, InvalidZtoc, LimitExceeded
from soci.zinfo import MAX_SPANS

MAX_WINDOW_BYTES: Final = 1 << 27
"""The largest window of a frame: memory that a stranger's blob can ask for. It is the ``zstd`` program's own limit."""
MAX_ZSTD_RATIO: Final = 1 << 15
"""zstd cannot do better: a block of 4 bytes says at most 128 KiB (RFC 8878 §3.1.1.2.4). A span that claims more is
no zstd."""

_BLOCKS: Final = 8
"""Blocks that are decompressed in one call: what comes out of it is bounded by them, whatever the blob claims."""
_MAGIC: Final = 0xFD2FB528
_SKIPPABLE: Final = 0x184D2A50  # the lowest of 16
_FRAME_CONTENT_BYTES: Final = (0, 2, 4, 8)
_DICTIONARY_BYTES: Final = (0, 1, 2, 4)
_BLOCK_HEADER_BYTES: Final = 3
_CHECKSUM_BYTES: Final = 4
_RLE: Final = 1
_RESERVED: Final = 3

_POINTS_MAGIC: Final = b"SZST"
_HEADER: Final = struct.Struct("<4sIQI")
_POINT: Final = struct.Struct("<QQ")
POINTS_VERSION: Final = 1


class ZstdStream:
    """Decompresses a zstd stream that is pushed through it, frame by frame.

    ``frame`` is called at each frame with content, with its offset in the stream and the offset of its content.
    Skippable frames are skipped. Raises `InvalidInput` for what is no zstd or needs a dictionary, and
    `LimitExceeded` for a window beyond `MAX_WINDOW_BYTES`. What one step puts out is at most 1 MiB.
    """

    def __init__(self, frame: Callable[[int, int], object] = lambda _at, _out: None) -> None:
        self.position = 0  # bytes of the stream taken
        self.out = 0  # bytes put out
        self._frame = frame
        self._decoder = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        self._open: Any = None  # what decompresses the frame that is open
        self._frames = 0
        self._head = bytearray()  # of what is read next
        self._wanted = 4
        self._step: Callable[[bytes], None] = self._magic
        self._payload = 0  # bytes of a block, or of a skippable frame, still to come
        self._in_block = self._last = self._checked = self._ended = False
        self._blocks = 0  # whole ones that the decoder has not got yet

    def feed(self, chunk: bytes | memoryview) -> Iterator[bytes]:
        """What the next bytes of the stream decompress to, in pieces. Take all of it before the next call."""
        view, at, begin, start = memoryview(chunk), 0, 0, self.position
        while at < len(view):
            if self._payload:
                taken = min(self._payload, len(view) - at)
                self._payload -= taken
                at += taken
            else:
                taken = min(self._wanted - len(self._head), len(view) - at)
                self._head += view[at : at + taken]
                at += taken
                self.position = start + at
                if len(self._head) == self._wanted:
                    head = bytes(self._head)
                    self._head.clear()
                    open_before = self._open
                    self._step(head)
                    if self._open is not open_before:
                        begin = at
            if self._in_block and not self._payload:
                self._end_of_block()
            if self._ended or self._blocks >= _BLOCKS:
                yield from self._decompress(view[begin:at])
                begin = at
        self.position = start + len(view)
        if self._open is not None:
            yield from self._decompress(view[begin:])

    def finish(self) -> None:
        """Say that the stream has ended; raises `InvalidInput` where it is cut short or has no frame with content."""
        if self._open is not None or self._head or self._payload or not self._frames:
            raise InvalidInput(f"zstd stream cut short at {self.position} bytes")

    def _decompress(self, data: memoryview) -> Iterator[bytes]:
        self._blocks = 0
        try:
            out: bytes = self._open.decompress(data) if data else b""
        except zstandard.ZstdError as error:
            raise InvalidInput(f"zstd stream broken before byte {self.position}: {error}") from error
        if self._ended != self._open.eof or self._open.unused_data:
            raise InvalidInput(f"zstd stream broken before byte {self.position}: a frame of another length")
        if self._ended:
            self._open, self._ended = None, False
        self.out += len(out)
        if out:
            yield out

    def _magic(self, head: bytes) -> None:
        number = int.from_bytes(head, "little")
        if number == _MAGIC:
            self._frame(self.position - len(head), self.out)
            self._frames += 1
            self._open = self._decoder.decompressobj()
            self._open.decompress(head)
            self._expect(1, self._descriptor)
        elif number & ~0xF == _SKIPPABLE:
            self._expect(4, self._skippable)
        else:
            raise InvalidInput(f"not a zstd frame at byte {self.position - len(head)}: {head.hex()}")

    def _skippable(self, head: bytes) -> None:
        self._payload = int.from_bytes(head, "little")
        self._expect(4, self._magic)

    def _descriptor(self, head: bytes) -> None:
        descriptor = head[0]
        single = bool(descriptor & 0x20)
        if descriptor & 0x08:
            raise InvalidInput("zstd frame with a reserved bit")
        self._checked = bool(descriptor & 0x04)
        dictionary = _DICTIONARY_BYTES[descriptor & 3]
        content = _FRAME_CONTENT_BYTES[descriptor >> 6] or int(single)

        def rest(head: bytes) -> None:
            if any(head[len(head) - content - dictionary : len(head) - content]):
                raise InvalidInput("zstd frame that needs a dictionary")
            if single:
                window = int.from_bytes(head[-content:], "little") + (256 if content == 2 else 0)
            else:
                base = 1 << (10 + (head[0] >> 3))
                window = base + base // 8 * (head[0] & 7)
            if window > MAX_WINDOW_BYTES:
                raise LimitExceeded(
                    f"zstd frame with a window of {window} bytes; at most {MAX_WINDOW_BYTES} (MAX_WINDOW_BYTES)"
                )
            self._expect(_BLOCK_HEADER_BYTES, self._block)

        self._expect(int(not single) + dictionary + content, rest)

    def _block(self, head: bytes) -> None:
        number = int.from_bytes(head, "little")
        self._last = bool(number & 1)
        kind = number >> 1 & 3
        if kind == _RESERVED:
            raise InvalidInput(f"zstd block of an unknown type before byte {self.position}")
        self._payload = 1 if kind == _RLE else number >> 3
        self._in_block = True

    def _end_of_block(self) -> None:
        self._in_block = False
        self._blocks += 1
        if not self._last:
            return
        if self._checked:
            self._expect(_CHECKSUM_BYTES, lambda _: self._end_of_frame())
        else:
            self._end_of_frame()

    def _end_of_frame(self) -> None:
        self._ended = True
        self._expect(4, self._magic)

    def _expect(self, count: int, step: Callable[[bytes], None]) -> None:
        self._wanted = count
        self._step = step


@dataclass(frozen=True, slots=True)
class ZstdPoints:
    """The checkpoints of a zstd layer: where each span's first frame begins, in the blob and in the tar."""

    span_size: int  # bytes of the tar: the least distance between checkpoints, as given to the builder
    ins: array[int]
    outs: array[int]


class ZstdCheckpoints:
    """Decompresses a zstd stream that is pushed through it, and notes checkpoints on the way.

    The first is at 0. Each further one is at the start of a frame with content, at least ``span_size`` bytes of
    output behind the one before. A skippable frame belongs to the span before it; one before all content, to the
    first span.
    """

    def __init__(self, span_size: int) -> None:
        if not 0 <= span_size < 1 << 63:
            raise InvalidInput(f"span size {span_size}: not a number of bytes")
        self.points: list[tuple[int, int]] = []  # (in offset, out offset)
        self._span_size = span_size
        self._stream = ZstdStream(self._frame)

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """What the next bytes of the stream decompress to, as `ZstdStream.feed`; `LimitExceeded` for too many spans."""
        return self._stream.feed(chunk)

    def finish(self) -> bytes:
        """The checkpoints' blob; `InvalidInput` where the stream is cut short."""
        self._stream.finish()
        ins, outs = (array("q", column) for column in zip(*self.points, strict=True))
        return encode_zstd_points(ZstdPoints(self._span_size, ins, outs))

    def _frame(self, at: int, out: int) -> None:
        if not self.points:
            self.points.append((0, 0))
        elif out - self.points[-1][1] >= max(1, self._span_size):
            if len(self.points) >= MAX_SPANS:
                raise LimitExceeded(f"more than {MAX_SPANS} spans: a larger span size makes fewer (MAX_SPANS)")
            self.points.append((at, out))


def encode_zstd_points(points: ZstdPoints) -> bytes:
    """The blob of the checkpoints; see docs/zstd.md."""
    header = _HEADER.pack(_POINTS_MAGIC, POINTS_VERSION, points.span_size, len(points.ins))
    return header + b"".join(map(_POINT.pack, points.ins, points.outs))


def parse_zstd_points(blob: bytes) -> ZstdPoints:
    """Read the blob; `InvalidZtoc` for one of another form. Whether the offsets ascend: `soci.span`."""
    if len(blob) < _HEADER.size:
        raise InvalidZtoc(f"checkpoints cut short: {len(blob)} bytes")
    magic, version, span_size, count = _HEADER.unpack_from(blob)
    if magic != _POINTS_MAGIC or version != POINTS_VERSION:
        raise InvalidZtoc(f"not the checkpoints of a zstd layer, version {POINTS_VERSION}: {blob[:8].hex()}")
    if not 1 <= count <= MAX_SPANS or len(blob) != _HEADER.size + count * _POINT.size:
        raise InvalidZtoc(f"{len(blob)} bytes cannot hold {count} checkpoints")
    ins, outs = array("q"), array("q")
    try:
        for into, out in _POINT.iter_unpack(blob[_HEADER.size :]):
            ins.append(into)
            outs.append(out)
    except OverflowError as error:
        raise InvalidZtoc("a checkpoint beyond 63 bits") from error
    if span_size >> 63 or ins[0]:
        raise InvalidZtoc(f"impossible checkpoints: span size {span_size}, first span at {ins[0]}")
    return ZstdPoints(span_size, ins, outs)
