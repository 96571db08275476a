# SPDX-License-Identifier: Apache-2.0
"""The uncompressed bytes of a layer's blob, whoever made it: within limits, and to be given up at any time.

A thread inflates and digests ahead of the reader, so that on two cores unpacking costs what its slower half costs;
a few pieces wait between the two. gzip goes through ISA-L, at more than twice zlib's speed.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol, Self

from isal import igzip_lib

from soci.decompress import Decompressor, decompressor
from soci.errors import InvalidGzip, LimitExceeded, SociError
from soci.toc import Algorithm

READ_BYTES: Final = 1 << 16
"""Compressed bytes read at a time: what a hostile blob of many tiny gzip members makes us copy again and again."""
LAYER_BYTES: Final = 1 << 38
"""Uncompressed bytes of one layer: no image says how many there are to be, and gzip makes a thousand of one."""
PIECE_BYTES: Final = 1 << 20
"""Bytes that are inflated in one go at most."""
TOGETHER_BYTES: Final = 1 << 18
"""Smaller pieces are handed over together: a hand-over costs more than they do."""
PIECES: Final = 8
"""Pieces that wait for the reader."""
CLOSED_SECONDS: Final = 0.1
"""How soon the thread sees that nobody reads any more, where it waits to hand over a piece."""

_END: Final = b""


class Blob(Protocol):
    """What is read: a file, or one that is still coming."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes, none at the end."""


class Inflated:
    """The uncompressed bytes of a blob, read once from front to back, digested on the way; a context manager.

    ``digest`` belongs to the thread until `finish` was called. ``stopped`` is asked in the thread.
    """

    def __init__(self, blob: Blob, digest: hashlib._Hash, *, algorithm: Algorithm, stopped: Callable[[], bool]) -> None:
        self._blob = blob
        self._straight = _Gzip() if algorithm == "gzip" else decompressor(algorithm)
        self._digest = digest
        self._stopped = stopped
        self._waiting: queue.Queue[bytes | Exception] = queue.Queue(PIECES)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="inflate", daemon=True)
        self._piece = b""
        self._at = 0
        self._over = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes; empty at the end. Raises what inflating and reading the blob raise."""
        if self._at == len(self._piece) and not self._next():
            return b""
        piece = self._piece[self._at : self._at + size]
        self._at += len(piece)
        return piece

    def _next(self) -> bool:
        if self._over:
            return False
        found = self._waiting.get()
        self._piece, self._at = b"", 0
        if isinstance(found, Exception):
            self._over = True
            raise found
        self._over = found is _END
        self._piece = found
        return not self._over

    def finish(self) -> str:
        """Read what is left and give the digest of all of it, in hex."""
        while self._next():
            pass
        self._thread.join()
        return self._digest.hexdigest()

    # --- the thread

    def _run(self) -> None:
        try:
            for piece in self._together():
                self._digest.update(piece)
                self._hand_over(piece)
        except Exception as error:  # noqa: BLE001  it is raised to the reader
            self._hand_over(error)
        else:
            self._hand_over(_END)

    def _hand_over(self, piece: bytes | Exception) -> None:
        while not self._closed.is_set():
            try:
                self._waiting.put(piece, timeout=CLOSED_SECONDS)
            except queue.Full:
                continue
            return

    def _together(self) -> Iterator[bytes]:
        small: list[bytes] = []
        size = count = 0
        for piece in self._inflate():
            count += len(piece)
            if count > LAYER_BYTES:
                raise LimitExceeded(f"a layer of more than {LAYER_BYTES} uncompressed bytes (LAYER_BYTES)")
            if self._stopped() or self._closed.is_set():
                raise SociError("the unpacking was given up")
            if not small and len(piece) >= TOGETHER_BYTES:
                yield piece
                continue
            small.append(piece)
            size += len(piece)
            if size >= TOGETHER_BYTES:
                yield b"".join(small)
                small.clear()
                size = 0
        if small:
            yield b"".join(small)

    def _inflate(self) -> Iterator[bytes]:
        while chunk := self._blob.read(READ_BYTES):
            if self._stopped() or self._closed.is_set():  # also where nothing comes out for long
                raise SociError("the unpacking was given up")
            yield from self._straight.feed(chunk)
        self._straight.finish()


class _Gzip(Decompressor):
    """See `soci.decompress.Decompressor`. Each member's checksum and size are compared."""

    def __init__(self) -> None:
        self._member: Any = None  # the one that is open
        self._error: Any = igzip_lib.error
        self._empty = True

    def feed(self, chunk: bytes | memoryview) -> Iterator[bytes]:
        """What the next bytes of the blob inflate to."""
        data = bytes(chunk)
        while data:
            self._empty = False
            if self._member is None:
                self._member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
            while True:
                try:
                    out = self._member.decompress(data, PIECE_BYTES)
                except (self._error, EOFError) as error:
                    raise InvalidGzip(f"the gzip stream is damaged: {error}") from error
                data = b""
                if out:
                    yield out
                if self._member.eof:
                    data, self._member = self._member.unused_data, None
                    break
                if self._member.needs_input or not out:
                    break

    def finish(self) -> None:
        """The blob has ended."""
        if self._member is not None or self._empty:
            raise InvalidGzip("the gzip stream is cut short")
