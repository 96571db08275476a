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

import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from soci.digest import Digest, hex_of, new_hash, parse_digest
from soci.errors import InvalidInput, Mismatch, NotFound
from soci.span import Spans
from soci.toc import Ztoc
from soci.ztoc import parse_ztoc
from soci_cache import locks
from soci_cache.evict import DRAFT, folder_size, is_kept, keep_no_more, punch, remove_draft
from soci_cache.files import digest, disk, replace, sync
from soci_cache.journal import encode_record, read_journal
from soci_cache.layer import LayerReader, LayerWriter, Room, Told
from soci_cache.presence import ABSENT, HEADER, NEEDED, SPANS_LIMIT, VERDICT, Presence, boot_id, marks_of, new_map
from soci_cache.proof import OPEN, REJECTED, RETIRED, read_whole, refused, tell_diff_id

CACHE_TAG = (
    "Signature: 8a477f597d28d172789f06886806bc55\n# Sociable's span cache: safe to delete while it is stopped.\n"
)
ZTOC_LIMIT = 512 << 20
"""Bytes of a zTOC that we keep or read."""
DRAFT_STALE = 3600.0
"""Seconds after which a half-made folder is somebody's who was killed."""
MAKE_TRIES = 3
"""Times that a folder is made which is freed at the same moment."""


@dataclass(frozen=True, slots=True)
class Here:
    """How much of a layer is here: spans in all; those that came because a read needed them or was foreseen to, in how
    many runs of neighbours; and those that are here for whatever reason.
    """

    spans: int
    present: int
    runs: int
    whatever: int = 0

    @property
    def share(self) -> float:
        """The share of spans that was needed or foreseen, 0 to 1; a layer without spans is here."""
        return self.present / self.spans if self.spans else 1.0

    @property
    def share_here(self) -> float:
        """The share of spans that is here, 0 to 1."""
        return self.whatever / self.spans if self.spans else 1.0


class LayerStore:
    """All layers of one node's cache. Methods block on the disk: call them in a thread where that matters.

    Every way to open a layer first sees to it that what its map says is true for this boot (see `_settle`). A layer's
    last use is when it was prepared, opened for reading, or filled because a read waited: the time of its folder.
    """

    def __init__(self, cache: Path, *, room: Room | None = None, told: Told | None = None) -> None:
        """``room`` is called on a full disk, ``told`` hears of each span filled: see `soci_cache.layer`."""
        self._layers = cache / "layers"
        self._room = room
        self._told = told

    def directory(self, layer: Digest, ztoc: Digest) -> Path:
        """Where the layer's files are, or would be. `InvalidDigest` for a text that is none: it would be a path."""
        return self._layers / hex_of(parse_digest(layer)) / hex_of(parse_digest(ztoc))

    def prepare(self, layer: Digest, ztoc: Digest, content: bytes | None, diff_id: Digest | None = None) -> LayerReader:
        """Have the layer's folder, and trust only what is proven to be in it.

        ``content`` is the zTOC blob; None asks for a layer that is here already: `NotFound` where it is not, or its
        zTOC is damaged, which ``content`` then mends. ``diff_id`` is the digest of the whole uncompressed layer, as
        the image says it: see `soci_cache.proof`. After another boot each span of the journal is digested again
        before it counts as here. Raises `Mismatch` for a wrong digest and for a layer that was found to be another
        than its diff_id, `InvalidZtoc` for a zTOC that cannot be mounted, `LimitExceeded` where the disk is full.
        """
        place = self.directory(layer, ztoc)
        for last in (False,) * (MAKE_TRIES - 1) + (True,):
            if content is not None and not (place / "spans").exists():
                self._make(place, ztoc, content)
            try:
                with _opened(place):
                    table = _settle(place, ztoc, content)
                    tell_diff_id(place, layer, ztoc, diff_id)
                    if _rejected(place):
                        raise refused(layer, ztoc)
                    return LayerReader(place, layer, table, ztoc)
            except NotFound:
                if content is None or last:
                    raise
        raise AssertionError

    def read(self, layer: Digest, ztoc: Digest) -> LayerReader:
        """Open a prepared layer for reading; `NotFound` where there is none, `Mismatch` where it was rejected."""
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
            if presence.boot != boot_id():
                return None
            return Here(presence.count, *presence.wanted(), presence.present())
        finally:
            presence.close()

    def usage(self, layer: Digest, ztoc: Digest) -> tuple[int, int]:
        """Allocated bytes and inodes of the layer's folder: ``layer.tar`` without its holes, zTOC, map, journal."""
        return folder_size(self.directory(layer, ztoc))

    def write(self, layer: Digest, ztoc: Digest) -> LayerWriter:
        """Open a prepared layer for filling; `NotFound` where there is none. It is no use of the layer by itself."""
        place = self.directory(layer, ztoc)
        with disk(place), locks.folder(place):
            table = _settle(place, ztoc, None)
            return LayerWriter(place, layer, table, ztoc, room=self._room, told=self._told)

    def table(self, layer: Digest, ztoc: Digest) -> Ztoc:
        """The zTOC of a layer that is here, after a look at what its map says; `NotFound` where there is none.

        It is no use of the layer: for those who look after the cache.
        """
        place = self.directory(layer, ztoc)
        with disk(place), locks.folder(place):
            return _settle(place, ztoc, None)

    def _make(self, place: Path, ztoc: Digest, content: bytes) -> None:
        table = _checked(content, ztoc)
        spans = Spans.of(table)
        with disk(place):
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            tag = self._layers.parent / "CACHEDIR.TAG"
            if not tag.exists():
                tag.write_text(CACHE_TAG, encoding="ascii")
            remove_drafts(place.parent)
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix=DRAFT, dir=place.parent))
            try:
                (draft / "ztoc").write_bytes(content)
                (draft / "spans").write_bytes(new_map(spans.count, boot_id()))
                (draft / "journal").touch()
                with (draft / "layer.tar").open("wb") as file:
                    file.truncate(table.uncompressed_size)
                for name in ("ztoc", "spans"):
                    sync(draft / name)
                sync(draft)
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
        replace(place, "ztoc", content)
    spans = Spans.of(table)
    if not _map_is_good(place, spans):
        _verify(place, spans)
    return table


def _map_is_good(place: Path, spans: Spans) -> bool:
    try:
        size = (place / "layer.tar").stat().st_size
        presence = Presence(place / "spans", writable=False)
    except (InvalidInput, FileNotFoundError):
        return False
    presence.close()
    return presence.boot == boot_id() and presence.count == spans.count and size == spans.uncompressed_size


def _map_is_older(place: Path) -> bool:
    """Whether the map is certainly of an earlier boot."""
    try:
        presence = Presence(place / "spans", writable=False)
    except (InvalidInput, OSError):
        return False
    presence.close()
    return presence.boot != boot_id()


def _rejected(place: Path) -> bool:
    presence = Presence(place / "spans", writable=False)
    try:
        return presence.verdict == REJECTED
    finally:
        presence.close()


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
    """Decide span by span, from journal and bytes, what is here; then map, journal and file say only that."""
    promised = read_journal(place, spans.count)
    reasons = _reasons(place, spans.count)
    fresh = bytearray(new_map(spans.count, boot_id()))
    journal = bytearray()
    with (place / "layer.tar").open("a+b") as tar:
        tar.truncate(spans.uncompressed_size)
        if _map_is_older(place):
            keep_no_more(tar.fileno())
        for span, sha256 in promised.items():
            if digest(tar.fileno(), *spans.uncompressed(span)) == sha256:
                fresh[HEADER + span] = reasons[span] or NEEDED
                journal += encode_record(span, sha256)
        if not is_kept(tar.fileno()):
            _punch_absent(tar.fileno(), fresh[HEADER:], spans)
    whole = read_whole(place)
    if whole and ABSENT in fresh[HEADER:] and whole.verdict != REJECTED:
        (place / "whole").unlink()
        whole = None
    fresh[VERDICT] = whole.verdict if whole else OPEN
    replace(place, "journal", journal)
    _retire(place / "spans")
    replace(place, "spans", fresh)
    sync(place)


def _reasons(place: Path, count: int) -> bytes:
    """What the marks of a map that is not believed any more say of why spans came: good enough for that."""
    with suppress(OSError):
        content = (place / "spans").read_bytes()
        if len(content) == HEADER + count:
            return marks_of(content)
    return bytes(count)


def _punch_absent(tar: int, marks: bytes | bytearray, spans: Spans) -> None:
    """Free what a crash left of spans that are not here: nobody would know of it."""
    unit = os.fstat(tar).st_blksize
    with suppress(OSError):  # then it takes room until it is filled
        for span, mark in enumerate(marks):
            if not mark:
                start, end = spans.uncompressed(span)
                punch(tar, -(-start // unit) * unit, end // unit * unit)


def _retire(old: Path) -> None:
    """Clear the marks of a map that is about to lose its name: a reader that has it open must not believe it."""
    with suppress(OSError, ValueError), old.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        if HEADER < size <= HEADER + SPANS_LIMIT:
            with mmap.mmap(file.fileno(), size) as content:
                content[VERDICT] = RETIRED
                content[HEADER:] = bytes(size - HEADER)


def remove_drafts(parent: Path) -> None:
    """Delete what killed processes left half made, or half removed."""
    for draft in parent.glob(DRAFT + "*"):
        with suppress(OSError):
            if draft.stat().st_mtime < time.time() - DRAFT_STALE:
                remove_draft(draft)


@contextmanager
def _opened(place: Path) -> Iterator[None]:
    """Hold the folder, and note that it is used now."""
    with disk(place), locks.folder(place):
        with suppress(OSError):
            os.utime(place)
        yield
