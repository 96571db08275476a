# SPDX-License-Identifier: Apache-2.0
"""One layer of the span cache, open for reading (mounter) or for filling (fetcher, the only writer)."""

from __future__ import annotations

import errno
import hashlib
import os
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
        self._presence = Presence(place / "spans", writable=False)
        self._tar = os.open(place / "layer.tar", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)

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

        A short read means a damaged file and is `Mismatch`: never a wrong byte.
        """
        data = os.pread(self._tar, length, offset)
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
        self._presence = Presence(place / "spans", writable=True)
        self._tar = os.open(place / "layer.tar", os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._journal = os.open(place / "journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

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
        try:
            _pwrite_all(self._tar, uncompressed, start)
            _write_all(self._journal, encode_record(span, hashlib.sha256(uncompressed).digest()))
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise LimitExceeded(f"the disk of the span cache is full ({self.directory})") from error
            raise SociError(f"{self.directory}: {error}") from error
        self._presence.mark(span)

    def close(self) -> None:
        """Let go of the files; closing twice is fine."""
        if self._tar >= 0:
            os.close(self._tar)
            os.close(self._journal)
            self._tar = -1
            self._presence.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pwrite_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _write_all(descriptor: int, record: bytes) -> None:
    if os.write(descriptor, record) != len(record):
        raise OSError(errno.ENOSPC, "short write of a journal record")
