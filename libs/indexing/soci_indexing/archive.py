# SPDX-License-Identifier: Apache-2.0
"""OCI image layouts as tar archives: read without unpacking, written so that one image always gives the same bytes.

An archive is walked once to learn where each blob is; blobs are then read in place. Members that a layout does not
have are passed over, whatever they are called, and links are not followed.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final, cast

from soci.digest import Digest
from soci.errors import LimitExceeded, Mismatch, NotFound, SociError, Unsupported
from soci.oci import MAX_MANIFEST_BYTES
from soci.tar import CHUNK_BYTES as TAR_CHUNK_BYTES
from soci.tar import iter_members
from soci_indexing.layout import (
    DOCKER_FILE,
    INDEX_FILE,
    LAYOUT_FILE,
    MAX_LAYOUT_BYTES,
    DirectorySource,
    Source,
    blob_path,
    opened,
    pieces,
)
from soci_indexing.stores import CHUNK_BYTES, translate

MAX_MEMBERS: Final = 200_000
"""Members of an archive; an image has a few for each layer."""

_DOCUMENTS: Final = {LAYOUT_FILE: MAX_LAYOUT_BYTES, INDEX_FILE: MAX_MANIFEST_BYTES, DOCKER_FILE: MAX_MANIFEST_BYTES}
_BLOB: Final = re.compile(rb"blobs/(sha256/[0-9a-f]{64}|sha512/[0-9a-f]{128})")
_COMPRESSIONS: Final = {
    b"\x1f\x8b": "gzip -d",
    b"\x28\xb5\x2f\xfd": "zstd -d",
    b"BZh": "bzip2 -d",
    b"\xfd7zXZ": "xz -d",
}
_ZEROS: Final = bytes(TAR_CHUNK_BYTES)
_FILE_MODE: Final = 0o644
_DIRECTORY_MODE: Final = 0o755


class ArchiveSource:
    """A layout in a tar file, open until `close`. Of several members of one name the last counts, as in unpacking."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._documents: dict[str, tuple[int, int]] = {}  # name to offset and size
        self._blobs: dict[str, tuple[int, int]] = {}

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[ArchiveSource]:
        """Walk the archive. Raises `NotFound`, `InvalidTar`, `Unsupported` (compressed, sparse), `LimitExceeded`."""
        try:
            with opened(path) as file:
                if file is None:
                    raise NotFound(f"there is no {path}")
                source = cls(path, file[0])
                source._walk(file[1])
                yield source
        except OSError as error:
            raise translate(error, f"read {path}") from error

    def document(self, name: str, limit: int) -> bytes | None:
        """As in `Source`."""
        place = self._documents.get(name)
        if place is None:
            return None
        if place[1] > limit:
            raise LimitExceeded(f"{self._path}: {name} has more than {limit} bytes")
        return b"".join(self._pieces(place))

    def size(self, digest: Digest) -> int | None:
        """As in `Source`."""
        place = self._blobs.get(digest)
        return None if place is None else place[1]

    def chunks(self, digest: Digest) -> Iterator[bytes]:
        """As in `Source`."""
        place = self._blobs.get(digest)
        if place is None:
            raise NotFound(f"{self._path} has no blob {digest}")
        yield from self._pieces(place)

    def _pieces(self, place: tuple[int, int]) -> Iterator[bytes]:
        try:
            yield from pieces(self._descriptor, *place)
        except OSError as error:
            raise translate(error, f"read {self._path}") from error

    def _walk(self, size: int) -> None:
        start = os.pread(self._descriptor, 8, 0)
        for magic, command in _COMPRESSIONS.items():
            if start.startswith(magic):
                raise Unsupported(f"{self._path} is compressed: give what `{command}` makes of it")
        try:
            reader = _Reader(self._descriptor, size)
            for number, member in enumerate(iter_members(reader.read)):
                if number >= MAX_MEMBERS:
                    raise LimitExceeded(f"more than {MAX_MEMBERS} members (MAX_MEMBERS)")
                if member.entry.type == "reg":
                    self._note(member.entry.name, (member.entry.offset, member.entry.size))
                    reader.pass_over(member.entry.size)
        except SociError as error:
            raise type(error)(f"{self._path}: {error}") from error

    def _note(self, name: bytes, place: tuple[int, int]) -> None:
        name = name.removeprefix(b"./")
        blob = _BLOB.fullmatch(name)
        if blob:
            self._blobs[blob[1].decode().replace("/", ":")] = place
        elif name.isascii() and name.decode() in _DOCUMENTS:
            self._documents[name.decode()] = place


class _Reader:
    """An archive's bytes in order, without reading members' data: zeros stand for what is passed over."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._size = size
        self._at = 0
        self._passing = 0

    def pass_over(self, count: int) -> None:
        """Do not read the next ``count`` bytes."""
        self._passing = count

    def read(self, count: int) -> bytes:
        """The next bytes, at most ``count``."""
        if self._passing:
            count = min(count, self._passing, self._size - self._at, len(_ZEROS))
            self._passing -= count
            piece = _ZEROS[:count]
        else:
            piece = os.pread(self._descriptor, count, self._at)
        self._at += len(piece)
        return piece


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """The layout at ``path``, a directory or a tar. Raises `NotFound`, `InvalidInput` and what each kind raises."""
    if path.is_dir():
        yield DirectorySource(path)
    else:
        with ArchiveSource.open(path) as source:
            yield source


def write_archive(
    out: IO[bytes], documents: Iterable[tuple[str, bytes]], blobs: Iterable[tuple[Digest, int, Iterator[bytes]]]
) -> None:
    """A layout as a tar: ``documents`` by name, then the blobs with their sizes and bytes, in the given orders.

    Owners, times and modes are always the same. What the blobs' bytes raise goes through.
    """
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, bufsize=CHUNK_BYTES) as tar:
        for name, content in documents:
            tar.addfile(_member(name, len(content)), io.BytesIO(content))
        folder = Path()
        for digest, size, chunks in blobs:
            path = blob_path(Path(), digest)
            for missing in [parent for parent in reversed(path.parents[:-1]) if not folder.is_relative_to(parent)]:
                tar.addfile(_member(f"{missing}/", 0, tarfile.DIRTYPE))
            folder = path.parent
            blob = _Chunks(chunks)
            tar.addfile(_member(str(path), size), cast("IO[bytes]", blob))
            blob.finish()


def _member(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    info.mode = _FILE_MODE if kind == tarfile.REGTYPE else _DIRECTORY_MODE
    return info


class _Chunks:
    """A file-like face of pieces, for tarfile."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def finish(self) -> None:
        """Let the pieces come to their end, where what makes them checks them."""
        if self._rest or any(self._chunks):
            raise Mismatch("a blob is longer than its size")

    def read(self, count: int) -> bytes:
        """At most ``count`` bytes, fewer at the end only."""
        taken = []
        while count:
            if not self._rest:
                self._rest = memoryview(next(self._chunks, b""))
            piece, self._rest = self._rest[:count], self._rest[count:]
            if not piece:
                break
            taken.append(piece)
            count -= len(piece)
        return b"".join(taken)
