# SPDX-License-Identifier: Apache-2.0
"""One layer of the span cache, open for reading (mounter) or for filling (fetcher, the only writer)."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from soci.digest import Digest
from soci.errors import LimitExceeded, Mismatch, SociError
from soci.span import Spans
from soci.toc import Ztoc
from soci_cache.journal import encode_record
from soci_cache.presence import Presence


class LayerReader:
    """Reads what is here. A context manager; `close` lets go of the files."""

    def __init__(self, place: Path, layer: Digest, ztoc: Ztoc) -> None:
        self.directory = place
        self.layer = layer
        self.ztoc = ztoc
        self.spans = Spans.of(ztoc)
        self._presence = _presence(place, self.spans, writable=False)
        try:
            self._tar = os.open(place / "layer.tar", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except BaseException:
            self._presence.close()
            raise

    def present(self, span: int) -> bool:
        """Is the span here?"""
        return self._presence[span]

    def missing(self, spans: range) -> list[int]:
        """Those of ``spans`` that are absent."""
        return self._presence.missing(spans)

    def present_count(self) -> int:
        """How many spans are here."""
        return self._presence.present()

    def pread(self, length: int, offset: int) -> bytes:
        """``length`` bytes of the uncompressed tar at ``offset``; the caller has seen that their spans are here.

        A short read means a damaged file and is `Mismatch`: never a wrong byte. `SociError` where the disk fails.
        """
        try:
            data = os.pread(self._tar, length, offset)
        except OSError as error:
            raise SociError(f"{self.directory}/layer.tar: {error}") from error
        if len(data) != length:
            raise Mismatch(f"{self.directory}/layer.tar is cut short: {len(data)} of {length} bytes at {offset}")
        return data

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

    def __init__(self, place: Path, layer: Digest, ztoc: Ztoc) -> None:
        self.directory = place
        self.layer = layer
        self.ztoc = ztoc
        self.spans = Spans.of(ztoc)
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
        try:
            found = (self.directory / "spans").stat()
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._presence.file

    def present(self, span: int) -> bool:
        """Is the span here?"""
        return self._presence[span]

    def missing(self, spans: range) -> list[int]:
        """Those of ``spans`` that are absent."""
        return self._presence.missing(spans)

    def fill(self, span: int, uncompressed: bytes | memoryview) -> None:
        """Put the span's bytes, which were checked, into the file; then its digest; then its mark.

        The order is the promise: a mark that can be seen has its bytes before it. Raises `LimitExceeded` where the
        disk is full: the span then stays absent, and nothing believes the half that was written.
        """
        start, end = self.spans.uncompressed(span)
        if len(uncompressed) != end - start:
            raise Mismatch(f"span {span} of {self.layer} has {len(uncompressed)} bytes, not {end - start}")
        self.fill_pieces(span, (uncompressed,))

    def fill_pieces(self, span: int, pieces: Iterable[bytes | memoryview]) -> None:
        """As `fill`, of a span that is too large for memory.

        What the pieces are made of must have been checked before the first of them is taken: another process may
        have marked the span meanwhile, and readers may be at it. Raises `Mismatch` where they are too few or too many,
        and what ``pieces`` raises; the span then stays as it was.
        """
        start, end = self.spans.uncompressed(span)
        state = hashlib.sha256()
        at = start
        try:
            for piece in pieces:
                if at + len(piece) > end:
                    break
                state.update(piece)
                _pwrite_all(self._tar, piece, at)
                at += len(piece)
            else:
                if at == end:
                    _write_all(self._journal, encode_record(span, state.digest()))
                    self._presence.mark(span)
                    return
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise LimitExceeded(f"the disk of the span cache is full ({self.directory})") from error
            raise SociError(f"{self.directory}: {error}") from error
        raise Mismatch(f"span {span} of {self.layer} has not the {end - start} bytes that it should have")

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


def _presence(place: Path, spans: Spans, *, writable: bool) -> Presence:
    presence = Presence(place / "spans", writable=writable)
    if presence.count != spans.count:
        presence.close()
        raise Mismatch(f"{place}/spans has {presence.count} spans, the layer {spans.count}")
    return presence


def _pwrite_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _write_all(descriptor: int, record: bytes) -> None:
    if os.write(descriptor, record) != len(record):
        raise OSError(errno.ENOSPC, "short write of a journal record")
