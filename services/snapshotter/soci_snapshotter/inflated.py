# SPDX-License-Identifier: Apache-2.0
"""The uncompressed bytes of a layer's blob, whoever made it: within limits, and to be given up at any time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from soci.decompress import Decompressor, decompressor
from soci.errors import LimitExceeded, SociError
from soci.toc import Algorithm

READ_BYTES = 1 << 16
"""Compressed bytes read at a time: what a hostile blob of many tiny gzip members makes us copy again and again."""
LAYER_BYTES = 1 << 38
"""Uncompressed bytes of one layer: no image says how many there are to be, and gzip makes a thousand of one."""


class Inflated:
    """The uncompressed bytes of a blob, read once from front to back, digested on the way."""

    def __init__(
        self, blob: BinaryIO, digest: hashlib._Hash, *, algorithm: Algorithm, stopped: Callable[[], bool]
    ) -> None:
        self._pieces = self._inflate(blob, decompressor(algorithm))
        self._ready = b""
        self._digest = digest
        self._stopped = stopped
        self._count = 0

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes; empty at the end."""
        while not self._ready:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._ready = piece
            self._count += len(piece)
            if self._count > LAYER_BYTES:
                raise LimitExceeded(f"a layer of more than {LAYER_BYTES} uncompressed bytes (LAYER_BYTES)")
            if self._stopped():
                raise SociError("the unpacking was given up")
        piece, self._ready = self._ready[:size], self._ready[size:]
        self._digest.update(piece)
        return piece

    def _inflate(self, blob: BinaryIO, straight: Decompressor) -> Iterator[bytes]:
        while chunk := blob.read(READ_BYTES):
            if self._stopped():  # also where nothing comes out for long
                raise SociError("the unpacking was given up")
            yield from straight.feed(chunk)
        straight.finish()

    def finish(self) -> str:
        """Read what is left and give the SHA-256 of all of it."""
        while self.read(READ_BYTES):
            pass
        return self._digest.hexdigest()
