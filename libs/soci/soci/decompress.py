# SPDX-License-Identifier: Apache-2.0
"""A layer's blob inflated straight, from its first byte to its last: what every checkpoint and span is measured by.

Pushed in and handed out in pieces, so that memory is bounded whatever the blob claims to hold. Each of gzip's members
and zstd's frames is checked to its end; nothing else may stand between or behind them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, Final, Protocol

from soci.errors import InvalidGzip, Unsupported
from soci.toc import Algorithm
from soci.zstd import ZstdStream

OUTPUT_BYTES: Final = 1 << 20
"""Bytes of one piece of a gzip layer that comes out."""

_GZIP: Final = 31
_GZIP_PIECE: Final = 1 << 16


class Decompressor(Protocol):
    """One blob on its way. After an error it is of no more use."""

    def feed(self, chunk: bytes | memoryview) -> Iterator[bytes]:
        """What the next bytes of the blob inflate to. Take all of it before the next call."""

    def finish(self) -> None:
        """Say that the blob has ended; raises where it is cut short or empty."""


def decompressor(algorithm: Algorithm) -> Decompressor:
    """For a blob of this compression. Raises `InvalidGzip`, or `InvalidInput` for what is no zstd, as it is fed."""
    match algorithm:
        case "gzip":
            return _Gzip()
        case "uncompressed":
            return _Plain()
        case "zstd":
            return ZstdStream()
    raise Unsupported(f"no compression {algorithm!r}")


class _Plain:
    def feed(self, chunk: bytes | memoryview) -> Iterator[bytes]:
        if chunk:
            yield bytes(chunk)

    def finish(self) -> None:
        pass


class _Gzip:
    def __init__(self) -> None:
        self._member: Any = None  # the one that is open
        self._empty = True

    def feed(self, chunk: bytes | memoryview) -> Iterator[bytes]:
        view = memoryview(chunk)
        for start in range(0, len(view), _GZIP_PIECE):
            yield from self._piece(bytes(view[start : start + _GZIP_PIECE]))

    def _piece(self, data: bytes) -> Iterator[bytes]:
        self._empty = False
        while data:
            if self._member is None:
                self._member = zlib.decompressobj(_GZIP)
            try:
                out = self._member.decompress(data, OUTPUT_BYTES)
            except zlib.error as error:
                raise InvalidGzip(f"the gzip stream is damaged: {error}") from error
            if self._member.eof:
                data, self._member = self._member.unused_data, None
            else:
                data = self._member.unconsumed_tail
            if out:
                yield out

    def finish(self) -> None:
        if self._member is not None or self._empty:
            raise InvalidGzip("the gzip stream is cut short")
