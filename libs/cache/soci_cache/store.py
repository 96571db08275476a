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

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from soci.digest import Digest, hex_of
from soci.errors import Mismatch, NotFound, SociError, Unavailable
from soci.span import Spans
from soci.toc import Ztoc
from soci.ztoc import parse_ztoc
from soci_cache.journal import JOURNAL_LIMIT, encode_record, parse_journal
from soci_cache.layer import LayerReader, LayerWriter
from soci_cache.presence import Presence, boot_id, new_map

CACHE_TAG = (
    "Signature: 8a477f597d28d172789f06886806bc55\n# Sociable's span cache: safe to delete while it is stopped.\n"
)
ZTOC_LIMIT = 512 << 20
"""Bytes of a zTOC that we keep or read."""


class LayerStore:
    """All layers of one node's cache. Methods block on the disk: call them in a thread where that matters."""

    def __init__(self, cache: Path) -> None:
        self._layers = cache / "layers"

    def directory(self, layer: Digest, ztoc: Digest) -> Path:
        """Where the layer's files are, or would be."""
        return self._layers / hex_of(layer) / hex_of(ztoc)

    def prepare(self, layer: Digest, ztoc: Digest, content: bytes | None) -> LayerReader:
        """Have the layer's folder, and trust only what is proven to be in it.

        ``content`` is the zTOC blob; None asks for a layer that is here already (`NotFound` otherwise). After
        another boot each span of the journal is digested again before it counts as here.
        Raises `Mismatch` for a wrong digest, `InvalidZtoc` for a zTOC that cannot be mounted.
        """
        place = self.directory(layer, ztoc)
        if not (place / "spans").exists():
            if content is None:
                raise NotFound(f"{layer} is not in the cache")
            self._make(place, ztoc, content)
        with _locked(place):
            presence = Presence(place / "spans", writable=False)
            old = presence.boot != boot_id()
            presence.close()
            if old:
                _verify(place, Spans.of(_read_ztoc(place, ztoc)))
        return self.read(layer, ztoc)

    def read(self, layer: Digest, ztoc: Digest) -> LayerReader:
        """Open a prepared layer for reading; `NotFound` where there is none."""
        place = self.directory(layer, ztoc)
        try:
            return LayerReader(place, layer, _read_ztoc(place, ztoc))
        except FileNotFoundError as error:
            raise NotFound(f"{layer} with zTOC {ztoc} is not in the cache") from error

    def write(self, layer: Digest, ztoc: Digest) -> LayerWriter:
        """Open a prepared layer for filling; `NotFound` where there is none."""
        place = self.directory(layer, ztoc)
        try:
            return LayerWriter(place, layer, _read_ztoc(place, ztoc))
        except FileNotFoundError as error:
            raise NotFound(f"{layer} with zTOC {ztoc} is not in the cache") from error

    def _make(self, place: Path, ztoc: Digest, content: bytes) -> None:
        if hashlib.new(ztoc.partition(":")[0], content).hexdigest() != hex_of(ztoc):
            raise Mismatch(f"the zTOC blob is not {ztoc}")
        table = parse_ztoc(content)
        spans = Spans.of(table)
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        tag = self._layers.parent / "CACHEDIR.TAG"
        if not tag.exists():
            tag.write_text(CACHE_TAG, encoding="ascii")
        draft = Path(tempfile.mkdtemp(prefix=".new-", dir=place.parent))
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
        except FileExistsError:
            shutil.rmtree(draft)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            if place.exists():  # ENOTEMPTY: another fetcher was faster, with the same bytes
                return
            raise Unavailable(f"the span cache cannot take the layer: {error}") from error


def _read_ztoc(place: Path, ztoc: Digest) -> Ztoc:
    path = place / "ztoc"
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > ZTOC_LIMIT:
            raise Mismatch(f"{path} is larger than a zTOC may be")
        content = file.read()
    if hashlib.new(ztoc.partition(":")[0], content).hexdigest() != hex_of(ztoc):
        raise Mismatch(f"{path} is damaged: it is not {ztoc}; delete {place} to have it fetched again")
    return parse_ztoc(content)


def _verify(place: Path, spans: Spans) -> None:
    """Decide span by span, from journal and bytes, what is here; then the map and journal say only that."""
    with (place / "journal").open("rb") as file:
        promised = parse_journal(file.read(JOURNAL_LIMIT), spans.count)
    fresh = bytearray(new_map(spans.count, boot_id()))
    journal = bytearray()
    with (place / "layer.tar").open("rb") as tar:
        for span, sha256 in sorted(promised.items()):
            start, end = spans.uncompressed(span)
            tar.seek(start)
            if hashlib.sha256(tar.read(end - start)).digest() == sha256:
                fresh[len(fresh) - spans.count + span] = 1
                journal += encode_record(span, sha256)
    for name, content in (("journal", journal), ("spans", fresh)):
        draft = place / f".{name}"
        draft.write_bytes(content)
        _sync(draft)
        draft.rename(place / name)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Hold the folder's own lock: only among processes of this node, only while its disk is looked at."""
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    except OSError as error:
        raise SociError(f"{place}: {error}") from error
    finally:
        os.close(descriptor)
