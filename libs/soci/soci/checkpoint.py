# SPDX-License-Identifier: Apache-2.0
"""Finding the places in a gzip layer where inflating can start.

A checkpoint lies at a deflate block's boundary, so zlib has to stop at each. Python's own zlib cannot be told to
(`Z_BLOCK`), nor does it say where in a byte it stopped (``data_type``); hence ctypes on the system's libz. Where no
checkpoint can be, because the one before is too near, zlib need not stop at blocks: a few calls a span are all.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import struct
import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Final

from soci.errors import InvalidGzip, InvalidInput, LimitExceeded, Unsupported
from soci.toc import MAX_ZTOC_BYTES
from soci.zinfo import MAX_SPANS, RECORD_BYTES, WINDOW_BYTES

MAX_FEED_BYTES: Final = 1 << 30
"""Bytes of one `GzipCheckpoints.feed`; zlib counts them in 32 bits."""
OUTPUT_BYTES: Final = 1 << 20
"""Output handed on at a time, at most."""
MAX_STALLS: Final = 4
"""Calls in a row in which zlib may neither take nor give a byte."""

_Z_NO_FLUSH: Final = 0
_Z_BLOCK: Final = 5
_Z_OK: Final = 0
_Z_STREAM_END: Final = 1
_Z_BUF_ERROR: Final = -5  # no progress this time, but no harm done
_GZIP_ONLY: Final = 31
_AT_BOUNDARY: Final = 128
_LAST_BLOCK: Final = 64
_BITS: Final = 7
_SIZE: Final = WINDOW_BYTES + OUTPUT_BYTES
_HEADER: Final = struct.Struct("<iq")
_POINT: Final = struct.Struct("<qqB")


class _Stream(ctypes.Structure):
    """``z_stream`` of zlib.h."""

    _fields_ = (
        ("next_in", ctypes.c_void_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_ulong),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    )


class GzipCheckpoints:
    """Inflates a gzip stream that is pushed through it, and notes checkpoints on the way.

    A checkpoint is taken at the end of every gzip header and deflate block, but for a member's last, when nothing was
    put out yet or more than ``span_size`` bytes since the checkpoint before. Members may follow each other; the
    windows run on over their borders. ``points`` grows with (in offset, out offset, bits); see `soci.zinfo`.

    Memory: one window a checkpoint, at most `MAX_ZTOC_BYTES` of them.
    """

    def __init__(self, span_size: int) -> None:
        if not 0 <= span_size < 1 << 63:
            raise InvalidInput(f"span size {span_size}: not a number of bytes")
        self.points: list[tuple[int, int, int]] = []
        self._span_size = span_size
        self._blob = bytearray(_HEADER.size)
        self._total_in = 0
        self._total_out = 0
        self._last = 0  # total output at the newest checkpoint
        self._between = True  # no member is open: at the start, or behind a member
        self._stalls = 0
        # The window's 32 KiB, then room for output. Both are one piece, so that a window is always one slice.
        # Two of them take turns: what one holds can still be worked on while the other is being filled.
        self._memories = [bytearray(_SIZE), bytearray(_SIZE)]
        self._views = [memoryview(memory) for memory in self._memories]
        self._bases = [ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in self._memories]
        self._now = 0
        self._end = WINDOW_BYTES  # where the output so far ends
        self._passed = WINDOW_BYTES  # up to where it was handed on
        self._z = _libz()
        self._stream = _Stream()
        code = self._z.inflateInit2_(
            ctypes.byref(self._stream), _GZIP_ONLY, self._z.zlibVersion(), ctypes.sizeof(_Stream)
        )
        if code != _Z_OK:
            raise Unsupported(f"zlib cannot start ({code}): it does not fit this build of Python, or memory is out")
        weakref.finalize(self, self._z.inflateEnd, ctypes.byref(self._stream))

    def feed(
        self, chunk: bytes, sink: Callable[[memoryview], object], turn: Callable[[], object] = lambda: None
    ) -> None:
        """Inflate the next ``chunk`` (at most `MAX_FEED_BYTES`), handing what comes out to ``sink``.

        The memory that ``sink`` is given is used again after the next but one call of ``turn``. Raises `InvalidGzip`
        for bytes that are no gzip, `LimitExceeded` for too many checkpoints.
        """
        if len(chunk) > MAX_FEED_BYTES:
            raise LimitExceeded(f"{len(chunk)} bytes at once; at most {MAX_FEED_BYTES} (MAX_FEED_BYTES)")
        stream = self._stream
        stream.next_in = ctypes.cast(ctypes.c_char_p(chunk), ctypes.c_void_p).value
        stream.avail_in = len(chunk)
        while stream.avail_in:
            if self._end == _SIZE:
                self._pass_on(sink)
                turn()
                window = self._views[self._now][_SIZE - WINDOW_BYTES :]
                self._now = 1 - self._now
                self._views[self._now][:WINDOW_BYTES] = window
                self._end = self._passed = WINDOW_BYTES
            if self._between:
                self._z.inflateReset2(ctypes.byref(stream), _GZIP_ONLY)
                self._between = False
            self._step()
        stream.next_in = None
        self._pass_on(sink)

    def finish(self) -> bytes:
        """The zinfo blob (version 2) of the whole stream; `InvalidGzip` where it is empty or cut short."""
        if not self._between or not self.points:
            raise InvalidGzip(f"gzip cut short at {self._total_in} bytes")
        _HEADER.pack_into(self._blob, 0, len(self.points), self._span_size)
        return bytes(self._blob)

    def _step(self) -> None:
        """One call of zlib: to the next block boundary, or until input or room for output ends."""
        stream = self._stream
        before_in, room = stream.avail_in, _SIZE - self._end
        # Up to this many bytes on there can be no checkpoint, whatever the blocks.
        quiet = self._last + self._span_size - self._total_out if self._total_out else 0
        if quiet > 0:
            room = min(room, quiet)
        stream.next_out = self._bases[self._now] + self._end
        stream.avail_out = room
        code = self._z.inflate(ctypes.byref(stream), _Z_NO_FLUSH if quiet > 0 else _Z_BLOCK)
        used, made = before_in - stream.avail_in, room - stream.avail_out
        self._total_in += used
        self._total_out += made
        self._end += made
        if code == _Z_STREAM_END:
            self._between = True
            return
        if code not in (_Z_OK, _Z_BUF_ERROR):
            reason = (stream.msg or b"").decode("ascii", "replace") or f"zlib says {code}"
            raise InvalidGzip(f"gzip broken before byte {self._total_in}: {reason}")
        self._stalls = 0 if used or made else self._stalls + 1
        if self._stalls > MAX_STALLS:
            raise InvalidGzip(f"gzip leads nowhere at byte {self._total_in}")
        if quiet > 0:
            return
        state = stream.data_type
        far = not self._total_out or self._total_out - self._last > self._span_size
        if state & _AT_BOUNDARY and not state & _LAST_BLOCK and far:
            self._note(state & _BITS)

    def _note(self, bits: int) -> None:
        if len(self.points) >= MAX_SPANS or len(self._blob) + RECORD_BYTES > MAX_ZTOC_BYTES:
            raise LimitExceeded(
                f"more than {len(self.points)} spans, {RECORD_BYTES} bytes each: a larger span size makes fewer"
            )
        self.points.append((self._total_in, self._total_out, bits))
        self._blob += _POINT.pack(self._total_in, self._total_out, bits)
        self._blob += self._views[self._now][self._end - WINDOW_BYTES : self._end]
        self._last = self._total_out

    def _pass_on(self, sink: Callable[[memoryview], object]) -> None:
        if self._passed < self._end:
            sink(self._views[self._now][self._passed : self._end])
            self._passed = self._end


@lru_cache(maxsize=1)
def _libz() -> ctypes.CDLL:
    """The system's zlib; `Unsupported` with the way out where there is none."""
    try:
        library = ctypes.CDLL("libz.so.1")
    except OSError:
        try:
            library = ctypes.CDLL(ctypes.util.find_library("z") or "libz.so")
        except OSError as error:
            raise Unsupported(
                "zTOCs of gzip layers cannot be built without the shared library libz.so.1: install zlib "
                "(Debian zlib1g, Fedora zlib)"
            ) from error
    stream = ctypes.POINTER(_Stream)
    library.zlibVersion.restype = ctypes.c_char_p
    library.inflateInit2_.argtypes = [stream, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
    library.inflateReset2.argtypes = [stream, ctypes.c_int]
    library.inflate.argtypes = [stream, ctypes.c_int]
    library.inflateEnd.argtypes = [stream]
    return library
