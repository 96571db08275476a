# SPDX-License-Identifier: Apache-2.0
"""The span cache as a folder: where each layer's files are, and how they come to be.

    <cache>/layers/<layer hex>/<zTOC hex>/
        layer.tar   the layer's uncompressed tar, sparse: holes are filled span by span
        ztoc        the zTOC blob, whose digest is the folder's name
        spans       presence map     (soci_cache.presence)
        journal     digests of filled spans (soci_cache.journal)

The zTOC is part of the key: two indexes may describe one layer differently, and an image must never be shown through
somebody else's table of contents. The folder is made whole and renamed into place; it is never half there.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from soci.digest import Digest, hex_of, new_hash, parse_digest
from soci.errors import InvalidInput, LimitExceeded, Mismatch, NotFound, Unavailable
from soci.span import Spans
from soci.toc import Ztoc
from soci.ztoc import parse_ztoc
from soci_cache.journal import JOURNAL_LIMIT, encode_record, parse_journal
from soci_cache.layer import LayerReader, LayerWriter
from soci_cache.presence import HEADER, HERE, Presence, boot_id, new_map

CACHE_TAG = (
    "Signature: 8a477f597d28d172789f06886806bc55\n# Sociable's span cache: safe to delete while it is stopped.\n"
)
ZTOC_LIMIT = 512 << 20
"""Bytes of a zTOC that we keep or read."""
DRAFT = ".new-"
"""How the names of half-made folders begin."""
DRAFT_STALE = 3600.0
"""Seconds after which a half-made folder is somebody's who was killed."""
PIECE = 1 << 20
"""Bytes of ``layer.tar`` that are digested at a time."""
BLOCK_UNIT = 512
"""Bytes of a block as stat(2) counts them."""


@dataclass(frozen=True, slots=True)
class Here:
    """How much of a layer is here: spans in all, spans here, and in how many runs of neighbours."""

    spans: int
    present: int
    runs: int

    @property
    def share(self) -> float:
        """The share of spans that is here, 0 to 1; a layer without spans is here."""
        return self.present / self.spans if self.spans else 1.0


class LayerStore:
    """All layers of one node's cache. Methods block on the disk: call them in a thread where that matters.

    Every way to open a layer first sees to it that what its map says is true for this boot (see `_settle`).
    """

    def __init__(self, cache: Path) -> None:
        self._layers = cache / "layers"

    def directory(self, layer: Digest, ztoc: Digest) -> Path:
        """Where the layer's files are, or would be. `InvalidDigest` for a text that is none: it would be a path."""
        return self._layers / hex_of(parse_digest(layer)) / hex_of(parse_digest(ztoc))

    def prepare(self, layer: Digest, ztoc: Digest, content: bytes | None) -> LayerReader:
        """Have the layer's folder, and trust only what is proven to be in it.

        ``content`` is the zTOC blob; None asks for a layer that is here already: `NotFound` where it is not, or its
        zTOC is damaged, which ``content`` then mends. After another boot each span of the journal is digested again
        before it counts as here. Raises `Mismatch` for a wrong digest, `InvalidZtoc` for a zTOC that cannot be
        mounted, `LimitExceeded` where the disk is full.
        """
        place = self.directory(layer, ztoc)
        if content is not None and not (place / "spans").exists():
            self._make(place, ztoc, content)
        with _locked(place):
            return LayerReader(place, layer, _settle(place, ztoc, content))

    def read(self, layer: Digest, ztoc: Digest) -> LayerReader:
        """Open a prepared layer for reading; `NotFound` where there is none."""
        return self.prepare(layer, ztoc, None)

    def here(self, layer: Digest, ztoc: Digest) -> Here | None:
        """What the map says is here, without a look at anything else; None where there is no map to trust.

        For estimates: a map of an earlier boot is none.
        """
        try:
            presence = Presence(self.directory(layer, ztoc) / "spans", writable=False)
        except (OSError, InvalidInput):
            return None
        try:
            return Here(presence.count, presence.present(), presence.runs()) if presence.boot == boot_id() else None
        finally:
            presence.close()

    def usage(self, layer: Digest, ztoc: Digest) -> tuple[int, int]:
        """Allocated bytes and inodes of the layer's folder: ``layer.tar`` without its holes, zTOC, map, journal."""
        place = self.directory(layer, ztoc)
        size = inodes = 0
        try:
            with os.scandir(place) as entries:
                found = [place.lstat(), *(entry.stat(follow_symlinks=False) for entry in entries)]
        except OSError:  # it is not here, or is just being deleted
            found = []
        for one in found:
            size += one.st_blocks * BLOCK_UNIT
            inodes += 1
        return size, inodes

    def write(self, layer: Digest, ztoc: Digest) -> LayerWriter:
        """Open a prepared layer for filling; `NotFound` where there is none."""
        place = self.directory(layer, ztoc)
        with _locked(place):
            return LayerWriter(place, layer, _settle(place, ztoc, None))

    def _make(self, place: Path, ztoc: Digest, content: bytes) -> None:
        table = _checked(content, ztoc)
        spans = Spans.of(table)
        with _disk(place):
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            tag = self._layers.parent / "CACHEDIR.TAG"
            if not tag.exists():
                tag.write_text(CACHE_TAG, encoding="ascii")
            _remove_drafts(place.parent)
            draft = Path(tempfile.mkdtemp(prefix=DRAFT, dir=place.parent))
            try:
                (draft / "ztoc").write_bytes(content)
                (draft / "spans").write_bytes(new_map(spans.count, boot_id()))
                (draft / "journal").touch()
                with (draft / "layer.tar").open("wb") as file:
                    file.truncate(table.uncompressed_size)
                for name in ("ztoc", "spans"):
                    _sync(draft / name)
                _sync(draft)
                draft.rename(place)
            except BaseException as error:
                shutil.rmtree(draft, ignore_errors=True)
                if isinstance(error, OSError) and place.is_dir():  # another fetcher was faster, with the same bytes
                    return
                raise


def _settle(place: Path, ztoc: Digest, content: bytes | None) -> Ztoc:
    """See to it that zTOC, map and journal of a locked folder agree and are of this boot; returns the zTOC.

    What a crash left behind is mended: a damaged zTOC from ``content``, a damaged or old map from the journal.
    """
    try:
        table = _read_ztoc(place, ztoc)
    except (FileNotFoundError, Mismatch) as error:
        if content is None:
            raise NotFound(f"{place} has no whole zTOC: it must be fetched again") from error
        table = _checked(content, ztoc)
        _replace(place, "ztoc", content)
    spans = Spans.of(table)
    if not _map_is_good(place, spans.count):
        _verify(place, spans)
    return table


def _map_is_good(place: Path, count: int) -> bool:
    try:
        presence = Presence(place / "spans", writable=False)
    except (InvalidInput, FileNotFoundError):
        return False
    presence.close()
    return presence.boot == boot_id() and presence.count == count and (place / "layer.tar").exists()


def _checked(content: bytes, ztoc: Digest) -> Ztoc:
    state = new_hash(ztoc)
    state.update(content)
    if state.hexdigest() != hex_of(ztoc):
        raise Mismatch(f"the zTOC blob is not {ztoc}")
    return parse_ztoc(content)


def _read_ztoc(place: Path, ztoc: Digest) -> Ztoc:
    with (place / "ztoc").open("rb") as file:
        if os.fstat(file.fileno()).st_size > ZTOC_LIMIT:
            raise Mismatch(f"{place}/ztoc is larger than a zTOC may be")
        return _checked(file.read(), ztoc)


def _verify(place: Path, spans: Spans) -> None:
    """Decide span by span, from journal and bytes, what is here; then the map and journal say only that."""
    promised: dict[int, bytes] = {}
    with suppress(FileNotFoundError), (place / "journal").open("rb") as file:
        promised = parse_journal(file.read(JOURNAL_LIMIT), spans.count)
    fresh = bytearray(new_map(spans.count, boot_id()))
    journal = bytearray()
    with (place / "layer.tar").open("a+b") as tar:
        tar.truncate(spans.uncompressed_size)
        for span, sha256 in sorted(promised.items()):
            if _digest(tar.fileno(), *spans.uncompressed(span)) == sha256:
                fresh[HEADER + span] = HERE
                journal += encode_record(span, sha256)
    _replace(place, "journal", journal)
    _replace(place, "spans", fresh)


def _digest(descriptor: int, start: int, end: int) -> bytes | None:
    """The SHA-256 of a file's bytes, piece by piece: a span may have as many as memory. None where it ends before."""
    state = hashlib.sha256()
    while start < end:
        piece = os.pread(descriptor, min(end - start, PIECE), start)
        if not piece:
            return None
        state.update(piece)
        start += len(piece)
    return state.digest()


def _replace(place: Path, name: str, content: bytes | bytearray) -> None:
    draft = place / f".{name}"
    draft.write_bytes(content)
    _sync(draft)
    draft.rename(place / name)


def _remove_drafts(folder: Path) -> None:
    """Delete what killed processes left half made."""
    for draft in folder.glob(DRAFT + "*"):
        with suppress(OSError):
            if draft.stat().st_mtime < time.time() - DRAFT_STALE:
                shutil.rmtree(draft, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Hold the folder's own lock: only among processes of this node, only while its disk is looked at."""
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
    """The border where what the disk refuses becomes ours."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise LimitExceeded(f"the disk of the span cache is full ({place})") from error
        raise Unavailable(f"the span cache cannot be used: {place}: {error}") from error
