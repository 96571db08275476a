# SPDX-License-Identifier: Apache-2.0
"""Compressed bytes of a layer's spans that this node keeps for others: a sparse file of the blob, and a presence map.

Both lie in the layer's folder and go with it:

    compressed        the layer's blob, sparse: holes are filled span by span, each checked by its zTOC's digest before
    compressed.spans  presence map (soci_cache.presence)

They only spare the registry requests, so nothing is mended: a map of another boot, or one that is damaged, is dropped
with its file. Several processes may have them open; a mark follows its bytes.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from soci.digest import hex_of, new_hash
from soci.errors import InvalidInput, LimitExceeded, Mismatch, NotFound, Unavailable
from soci.span import Spans
from soci_cache.presence import Presence, boot_id, new_map

FILE = "compressed"
MAP = "compressed.spans"


def drop(place: Path) -> None:
    """Delete what is kept for others in a layer's folder. Who has it open goes on with it, then finds it gone."""
    with _disk(place):
        for name in (MAP, FILE):
            (place / name).unlink(missing_ok=True)


class CompressedLayer:
    """The compressed spans of one layer that are here. Methods block on the disk."""

    def __init__(self, place: Path, spans: Spans) -> None:
        """Open both files, made anew where they are absent or not to be trusted.

        `NotFound` where the folder is gone, `LimitExceeded` where the disk is full.
        """
        self.directory = place
        self.spans = spans
        with _locked(place):
            self._presence = _trusted(place, spans) or _made(place, spans)
            try:
                self._file = os.open(place / FILE, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except OSError:
                self._presence.close()
                raise

    def current(self) -> bool:
        """Are these still the layer's files? Not where they were dropped: then open it again."""
        try:
            found = (self.directory / MAP).stat()
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._presence.file

    def missing(self, run: range) -> list[int]:
        """Those spans of ``run`` that are absent; IndexError where the layer has not all of them."""
        return self._presence.missing(run)

    def put(self, run: range, content: bytes) -> list[int]:
        """Check and keep the spans of ``run`` out of the run's bytes; returns those whose bytes are wrong.

        `LimitExceeded` where the disk is full: what is not marked counts as absent.
        """
        wrong = []
        view = memoryview(content)
        base = self.spans.compressed(run.start)[0]
        for span in run:
            start, end = self.spans.compressed(span)
            piece = view[start - base : end - base]
            promised = self.spans.digest(span)
            state = new_hash(promised)
            state.update(piece)
            if len(piece) != end - start or state.hexdigest() != hex_of(promised):
                wrong.append(span)
                continue
            with _disk(self.directory):
                while piece:
                    count = os.pwrite(self._file, piece, start)
                    piece, start = piece[count:], start + count
            self._presence.mark(span)
        return wrong

    def read(self, start: int, end: int) -> bytes:
        """Bytes [start, end) of the blob, whose spans are here; `Mismatch` where the file is cut short."""
        with _disk(self.directory):
            content = os.pread(self._file, end - start, start)
        if len(content) != end - start:
            raise Mismatch(f"{self.directory}/{FILE} is cut short: {len(content)} of {end - start} bytes at {start}")
        return content

    def forget(self, run: range) -> None:
        """Say that the spans of ``run`` are absent: their bytes were found to be wrong."""
        for span in run:
            self._presence.clear(span)

    def fileno(self) -> int:
        """The descriptor of the sparse file, for sendfile(2)."""
        return self._file

    def close(self) -> None:
        """Let go of the files; closing twice is fine."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._presence.close()


def _trusted(place: Path, spans: Spans) -> Presence | None:
    try:
        presence = Presence(place / MAP, writable=True)
    except (InvalidInput, FileNotFoundError):
        return None
    if presence.boot == boot_id() and presence.count == spans.count and (place / FILE).exists():
        return presence
    presence.close()
    return None


def _made(place: Path, spans: Spans) -> Presence:
    for name in (MAP, FILE):
        (place / name).unlink(missing_ok=True)
    draft = place / f".{MAP}"
    with (place / FILE).open("xb") as file:
        file.truncate(spans.compressed_size)
    draft.write_bytes(new_map(spans.count, boot_id()))
    draft.rename(place / MAP)
    return Presence(place / MAP, writable=True)


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Hold the folder's lock: only among processes of this node, only while its files are opened or made."""
    with _disk(place):
        try:
            descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise NotFound(f"{place} is not in the cache") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


@contextmanager
def _disk(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise LimitExceeded(f"the disk of the span cache is full ({place})") from error
        raise Unavailable(f"the span cache cannot be used: {place}: {error}") from error
