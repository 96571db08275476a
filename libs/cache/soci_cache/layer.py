# SPDX-License-Identifier: Apache-2.0
"""One layer of the span cache, open for reading (mounter) or for filling (fetcher, the only writer)."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self

from soci.digest import Digest
from soci.errors import LimitExceeded, Mismatch, SociError, Unavailable
from soci.inflate import MAX_TAIL_BYTES
from soci.span import Spans
from soci.toc import Ztoc
from soci_cache import locks
from soci_cache.evict import keep
from soci_cache.files import FULL, disk
from soci_cache.journal import RECORD, encode_record
from soci_cache.presence import FILLED, NEEDED, Presence
from soci_cache.proof import COMPLETE, REJECTED, keep_tail, refused

Room = Callable[[Path, int], None]
"""Make room for so many bytes on the full disk of this folder, if it can be had. It may take a moment."""
Told = Callable[["LayerWriter", int], None]
"""A span was filled, which has so many bytes. Called in whatever thread filled it; must return at once."""
EVICTION_TRIES = 8
"""Times that bytes are read anew because spans of the layer went meanwhile: batches of them go."""


class LayerReader:
    """Reads what is here. A context manager; `close` lets go of the files.

    While it is open the layer's folder stays, whatever the cache's budget is; single spans may go.
    """

    def __init__(self, place: Path, layer: Digest, ztoc: Ztoc, name: Digest) -> None:
        """``name`` is the zTOC's digest."""
        self.directory = place
        self.layer = layer
        self.ztoc = ztoc
        self._name = name
        self.spans = Spans.of(ztoc)
        self._presence = _presence(place, self.spans, writable=False)
        try:
            self.ztoc_size = (place / "ztoc").stat().st_size  # bytes
            self._tar = os.open(place / "layer.tar", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except BaseException:
            self._presence.close()
            raise
        # Alone it is taken only under the folder's lock, under which this reader is made: there is no wait.
        fcntl.flock(self._tar, fcntl.LOCK_SH)

    def current(self) -> bool:
        """Are these still the layer's files? Not where the folder was deleted or made anew: then open it again."""
        return _is_current(self.directory, self._presence)

    def forget_table(self) -> None:
        """Let go of what takes memory and reads need not: the zTOC's entries, and the checkpoints."""
        self.ztoc = replace(self.ztoc, entries=(), checkpoints=b"")
        self.spans = replace(self.spans, checkpoints=None)

    def present(self, span: int) -> bool:
        """Is the span here?"""
        return bool(self._presence[span])

    def missing(self, spans: range) -> list[int]:
        """Those of ``spans`` that are absent."""
        return self._presence.missing(spans)

    def present_count(self) -> int:
        """How many spans are here."""
        return self._presence.present()

    @property
    def evictions(self) -> int:
        """A number that differs after spans were taken away: what was read between two looks at it may be holes."""
        return self._presence.evictions

    def get(self, length: int, offset: int, spans: range) -> bytes | None:
        """``length`` bytes of the uncompressed tar at ``offset``, all within ``spans``; None where one is not here.

        Raises as `pread`.
        """
        for _ in range(EVICTION_TRIES):
            evictions = self._presence.evictions
            if self._presence.missing(spans):
                return None
            data = self.pread(length, offset)
            if self._presence.evictions == evictions:
                return data
        return None

    def pread(self, length: int, offset: int) -> bytes:
        """``length`` bytes of the uncompressed tar at ``offset``; the caller has seen that their spans are here, and
        looks again afterwards, at ``evictions`` too: see `get`.

        A short read means a damaged file and is `Mismatch`, and so is a layer that is not what its image promises:
        never a wrong byte. `SociError` where the disk fails.
        """
        try:
            data = os.pread(self._tar, length, offset)
        except OSError as error:
            raise SociError(f"{self.directory}/layer.tar: {error}") from error
        if len(data) != length:
            raise Mismatch(f"{self.directory}/layer.tar is cut short: {len(data)} of {length} bytes at {offset}")
        if self._presence.verdict >= REJECTED:
            raise _not_served(self._presence, self.layer, self._name, self.directory)
        return data

    def complete(self) -> bool:
        """Is all of the layer here, and what its image promises?"""
        return self._presence.verdict == COMPLETE and self._presence.present() == self.spans.count

    def keep(self) -> bool:
        """Have a complete layer keep its bytes until the next boot, whoever ends when: the kernel will read them.

        False where it is not complete (any more). Waits for the folder; raises `SociError` where the disk fails.
        """
        with disk(self.directory), locks.folder(self.directory):
            if not self.complete():
                return False
            keep(self._tar)
            return True

    def fileno(self) -> int:
        """The descriptor of ``layer.tar``."""
        return self._tar

    def close(self) -> None:
        """Let go of the files; closing twice is fine."""
        if self._tar >= 0:
            os.close(self._tar)
            self._tar = -1
            self._presence.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LayerWriter:
    """Fills holes. Several writers of one layer may live at once, in several processes."""

    def __init__(  # noqa: PLR0913  its ways out
        self,
        place: Path,
        layer: Digest,
        ztoc: Ztoc,
        name: Digest,
        *,
        room: Room | None = None,
        told: Told | None = None,
    ) -> None:
        """``name`` is the zTOC's digest."""
        self.directory = place
        self.layer = layer
        self.ztoc = ztoc
        self.name = name
        self.spans = Spans.of(ztoc)
        self._room = room
        self._told = told
        self._presence = _presence(place, self.spans, writable=True)
        self._tar = self._journal = -1
        flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._tar = os.open(place / "layer.tar", flags)
            self._journal = os.open(place / "journal", flags | os.O_APPEND | os.O_CREAT, 0o600)
        except BaseException:
            self._let_go()
            raise

    def current(self) -> bool:
        """Are these still the layer's files? Not where the folder was deleted or made anew: then open it again."""
        return _is_current(self.directory, self._presence)

    def present(self, span: int) -> bool:
        """Is the span here?"""
        return bool(self._presence[span])

    def missing(self, spans: range) -> list[int]:
        """Those of ``spans`` that are absent."""
        return self._presence.missing(spans)

    def full(self) -> bool:
        """Are all spans here?"""
        return self._presence.present() == self.spans.count

    def fill(self, span: int, uncompressed: bytes | memoryview, mark: int = NEEDED) -> None:
        """Put the span's bytes, which were checked, into the file; then its digest; then its mark.

        The order is the promise: a mark that can be seen has its bytes before it. Raises `LimitExceeded` where the
        disk is full: the span then stays absent, and nothing believes the half that was written.
        """
        start, end = self.spans.uncompressed(span)
        if len(uncompressed) != end - start:
            raise Mismatch(f"span {span} of {self.layer} has {len(uncompressed)} bytes, not {end - start}")
        self.fill_pieces(span, (uncompressed,), mark)

    def fill_pieces(
        self, span: int, pieces: Iterable[bytes | memoryview], mark: int = NEEDED, *, tail: bool = False
    ) -> None:
        """As `fill`, of a span that is too large for memory.

        What the pieces are made of must have been checked before the first of them is taken: another process may
        have marked the span meanwhile, and readers may be at it; then nothing is done. With ``tail`` the pieces of
        the last span go on with what follows it in the layer (`soci.inflate.inflate_stream` with ``tail``), which the
        layer's diff_id is over too. Raises `Mismatch` where they are too few or too many, or the layer was rejected,
        and what ``pieces`` raises; the span then stays as it was.
        """
        start, end = self.spans.uncompressed(span)
        behind: list[bytes] | None = [] if tail and span == self.spans.count - 1 else None
        try:
            with locks.filling(self._tar, span):
                if self._presence[span]:
                    return
                if self._presence.verdict >= REJECTED:
                    raise _not_served(self._presence, self.layer, self.name, self.directory)
                room = self._room if mark != FILLED else None  # nothing goes for what nobody needs
                sha256 = self._write(span, pieces, behind, room)
                if behind is not None:
                    keep_tail(self.directory, b"".join(behind))
                self._retried(room, RECORD.size, lambda: _write_all(self._journal, encode_record(span, sha256)))
                self._presence.mark(span, mark)
            if mark == NEEDED:
                with suppress(OSError):  # its last use; or its folder is gone
                    os.utime(self.directory)
        except OSError as error:
            if error.errno in FULL:
                raise LimitExceeded(f"the disk of the span cache is full ({self.directory})") from error
            raise SociError(f"{self.directory}: {error}") from error
        if self._told is not None:
            self._told(self, end - start)

    def _write(
        self, span: int, pieces: Iterable[bytes | memoryview], behind: list[bytes] | None, room: Room | None
    ) -> bytes:
        """Write a span's pieces, and put into ``behind`` what follows; the SHA-256 of the span. Raises OSError."""
        start, end = self.spans.uncompressed(span)
        state = hashlib.sha256()
        at, spare = start, 0 if behind is None else MAX_TAIL_BYTES
        for piece in pieces:
            own, rest = memoryview(piece)[: end - at], memoryview(piece)[end - at :]
            spare -= len(rest)
            if spare < 0:
                break
            state.update(own)
            self._retried(room, len(own), partial(_pwrite_all, self._tar, own, at))
            at += len(own)
            if behind is not None and rest:
                behind.append(bytes(rest))
        if at != end or spare < 0:
            raise Mismatch(f"span {span} of {self.layer} has not the {end - start} bytes that it should have")
        return state.digest()

    def _retried(self, room: Room | None, size: int, write: Callable[[], None]) -> None:
        """Write; where the disk is full, make room for ``size`` bytes and try once more. Raises OSError."""
        try:
            write()
        except OSError as error:
            if error.errno not in FULL or room is None:
                raise
            room(self.directory, size)
            write()

    def close(self) -> None:
        """Let go of the files; closing twice is fine. Nothing may be filling meanwhile."""
        if self._tar >= 0:
            self._let_go()

    def _let_go(self) -> None:
        for descriptor in (self._tar, self._journal):
            if descriptor >= 0:
                os.close(descriptor)
        self._tar = self._journal = -1
        self._presence.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _not_served(presence: Presence, layer: Digest, ztoc: Digest, place: Path) -> SociError:
    if presence.verdict == REJECTED:
        return refused(layer, ztoc)
    return Unavailable(f"{place}/spans was damaged, and is replaced: the layer must be opened again")


def _is_current(place: Path, presence: Presence) -> bool:
    try:
        found = (place / "spans").stat()
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == presence.file


def _presence(place: Path, spans: Spans, *, writable: bool) -> Presence:
    presence = Presence(place / "spans", writable=writable)
    if presence.count != spans.count:
        presence.close()
        raise Mismatch(f"{place}/spans has {presence.count} spans, the layer {spans.count}")
    return presence


def _pwrite_all(descriptor: int, data: memoryview, offset: int) -> None:
    view = data
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _write_all(descriptor: int, record: bytes) -> None:
    if os.write(descriptor, record) != len(record):
        raise OSError(errno.ENOSPC, "short write of a journal record")
