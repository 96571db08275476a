# SPDX-License-Identifier: Apache-2.0
"""Images in files: reading an OCI image layout that may be hostile, and writing a new one (OCI image-layout 1.0.0).

A layout comes as a directory or as a tar of one (`soci_indexing.archive`); both are a `Source`: a few named documents,
and blobs by digest. Nothing is unpacked, so no name in a source is ever the path of something written, and a blob is
used only if it has the digest that it is asked for by.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import stat
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol, TypeVar

from soci.digest import Digest, hex_of, new_hash, parse_digest, sha256_digest
from soci.errors import InvalidInput, InvalidManifest, LimitExceeded, Mismatch, NotFound, Unsupported
from soci.oci import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_MANIFEST_BYTES,
    OCI_INDEX,
    Descriptor,
    ImageIndex,
    Manifest,
    descriptor_json,
    encode_json,
    parse_manifest,
)
from soci.oci_json import load
from soci_indexing.rewrite import (
    NAME_ANNOTATIONS,
    canonical_index,
    document_of,
    encode_index,
    parse_index,
    without_names,
)
from soci_indexing.stores import CHUNK_BYTES, NO_LABELS, check, translate

LAYOUT_FILE: Final = "oci-layout"
INDEX_FILE: Final = "index.json"
DOCKER_FILE: Final = "manifest.json"
"""What ``docker save`` wrote before it wrote layouts."""
LAYOUT_VERSION: Final = "1.0.0"
LAYOUT_CONTENT: Final = encode_json({"imageLayoutVersion": LAYOUT_VERSION})
MAX_LAYOUT_BYTES: Final = 4096
"""Bytes of ``oci-layout``."""
MAX_DEPTH: Final = 4
"""Image indexes inside one another."""
MAX_BLOBS: Final = 100_000
"""Blobs that one image may need, over all its platforms."""
MAX_BLOB_BYTES: Final = 1 << 38
"""Bytes of a blob: a sparse file can promise any number of zeros."""

T = TypeVar("T")

_READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # a fifo in a blob's place must not stop us


class Source(Protocol):
    """A layout that is read. Nothing but `SociError` comes out of it."""

    def document(self, name: str, limit: int) -> bytes | None:
        """A file at the layout's top, None where it is absent; `LimitExceeded` beyond ``limit`` bytes."""
        ...

    def size(self, digest: Digest) -> int | None:
        """Bytes of a blob, None where it is absent."""
        ...

    def chunks(self, digest: Digest) -> Iterator[bytes]:
        """A blob's bytes, unchecked, in pieces of at most `CHUNK_BYTES`; `NotFound` where it is absent."""
        ...


@dataclass(frozen=True, slots=True)
class DirectorySource:
    """A layout in a directory. Links in it are followed: what counts is the digest of what they lead to."""

    root: Path

    def document(self, name: str, limit: int) -> bytes | None:
        """As in `Source`."""
        with self._opened(self.root / name) as file:
            if file is None:
                return None
            content = b"".join(pieces(file[0], 0, limit + 1))
        if len(content) > limit:
            raise LimitExceeded(f"{self.root / name} has more than {limit} bytes")
        return content

    def size(self, digest: Digest) -> int | None:
        """As in `Source`."""
        with self._opened(blob_path(self.root, digest)) as file:
            return None if file is None else file[1]

    def chunks(self, digest: Digest) -> Iterator[bytes]:
        """As in `Source`."""
        with self._opened(blob_path(self.root, digest)) as file:
            if file is None:
                raise NotFound(f"{self.root} has no blob {digest}")
            yield from pieces(file[0], 0, file[1])

    @contextmanager
    def _opened(self, path: Path) -> Iterator[tuple[int, int] | None]:
        try:
            with opened(path) as file:
                yield file
        except OSError as error:
            raise translate(error, f"read {path}") from error


class LayoutContent:
    """The content store of a conversion between files: reads from a source, keeps what is new in folder ``fresh``."""

    def __init__(self, source: Source, fresh: Path) -> None:
        self._source = source
        self._fresh = DirectorySource(fresh)

    async def info(self, digest: Digest) -> int | None:
        """As `soci_indexing.stores.Content.info`."""
        size = self._fresh.size(digest)
        return self._source.size(digest) if size is None else size

    async def read(self, digest: Digest, *, limit: int) -> bytes:
        """As `soci_indexing.stores.Content.read`."""

        def read() -> bytes:
            content = bytearray()
            for chunk in self.checked(digest):
                content += chunk
                if len(content) > limit:
                    raise LimitExceeded(f"blob {digest} has more than {limit} bytes")
            return bytes(content)

        return await in_thread(f"read blob {digest}", read)

    async def stream(self, digest: Digest) -> AsyncGenerator[bytes, None]:
        """As `soci_indexing.stores.Content.stream`."""
        pieces = self.checked(digest)
        try:
            while (piece := await in_thread(f"read blob {digest}", lambda: next(pieces, None))) is not None:
                yield piece
        finally:
            pieces.close()

    def checked(self, digest: Digest) -> Generator[bytes, None, None]:
        """`stream` for a thread."""
        source: Source = self._source if self._fresh.size(digest) is None else self._fresh
        state = new_hash(digest)
        for chunk in source.chunks(digest):
            state.update(chunk)
            yield chunk
        if state.hexdigest() != hex_of(digest):
            raise Mismatch(f"blob {digest} has other content than its digest says")

    async def push(self, descriptor: Descriptor, content: bytes, labels: Mapping[str, str] = NO_LABELS) -> bool:
        """As `soci_indexing.stores.Content.push`."""
        del labels
        check(content, descriptor)
        if await self.info(descriptor.digest) == descriptor.size:
            return False
        path = blob_path(self._fresh.root, descriptor.digest)
        await in_thread(f"store {descriptor.digest}", lambda: write_blob(path, content))
        return True

    async def label(self, digest: Digest, labels: Mapping[str, str]) -> None:
        """Nothing: a layout has no labels."""

    async def delete(self, digest: Digest) -> None:
        """Forget what is new. The source stays as it is."""
        path = blob_path(self._fresh.root, digest)
        await in_thread(f"delete {digest}", lambda: path.unlink(missing_ok=True))


@dataclass(frozen=True, slots=True)
class Root:
    """What a layout stands for, and the annotations that ``index.json`` has for it, its name among them."""

    target: Descriptor
    annotations: Mapping[str, str]


async def choose_root(source: Source, content: LayoutContent) -> Root:
    """The one image of a layout, as far as its blobs are here.

    A list of which only some entries are here becomes a new list of those, kept in ``content``. Of several entries in
    ``index.json``, that document itself is the list. Raises `Unsupported`, `InvalidInput` or `NotFound` with what is
    wrong with the layout.
    """
    top = _index_json(source)
    document, single = document_of(top), parse_index(top)
    entries = single.manifests
    named: Mapping[str, str] = {}
    if len(entries) == 1:
        named = entries[0].annotations
        if entries[0].media_type not in INDEX_TYPES:
            _need([entry for entry in entries if source.size(entry.digest) is not None])
            return Root(replace(entries[0], annotations={}), named)
        opened = await content.read(entries[0].digest, limit=MAX_MANIFEST_BYTES)
        document, entries = document_of(opened), parse_index(opened).manifests
    else:
        document["manifests"] = [without_names(entry) for entry in document["manifests"]]
    here = [number for number, entry in enumerate(entries) if source.size(entry.digest) is not None]
    _need(here)
    if len(here) == 1 and entries[here[0]].media_type in MANIFEST_TYPES:
        return Root(_unnamed(entries[here[0]]), named)
    if len(here) == len(entries) and len(single.manifests) == 1:
        return Root(replace(single.manifests[0], annotations={}), named)
    kept = [document["manifests"][number] for number in here]
    document["mediaType"] = document.get("mediaType") or OCI_INDEX
    filtered = (
        encode_index(document, kept)
        if document["mediaType"] == OCI_INDEX
        else encode_json(canonical_index({**document, "manifests": kept}))
    )
    target = Descriptor(document["mediaType"], sha256_digest(filtered), len(filtered))
    await content.push(target, filtered)
    return Root(target, named)


def _unnamed(entry: Descriptor) -> Descriptor:
    annotations = {key: text for key, text in entry.annotations.items() if key not in NAME_ANNOTATIONS}
    return replace(entry, annotations=annotations)


def _need(here: object) -> None:
    if not here:
        raise NotFound("the image layout holds none of the manifests that it lists")


def _index_json(source: Source) -> bytes:
    """``index.json`` of a valid layout that lists anything."""
    layout, index = source.document(LAYOUT_FILE, MAX_LAYOUT_BYTES), source.document(INDEX_FILE, MAX_MANIFEST_BYTES)
    if layout is None or index is None:
        if source.document(DOCKER_FILE, MAX_MANIFEST_BYTES) is not None:
            raise Unsupported(
                "this is what `docker save` of Docker before 25 writes, not an OCI image layout: save it with a newer "
                "one, or with `docker buildx build --output type=oci`, `skopeo copy … oci-archive:…` or "
                "`ctr images export`"
            )
        missing = LAYOUT_FILE if layout is None else INDEX_FILE
        raise InvalidInput(f"not an OCI image layout: there is no {missing}")
    version = load(layout, LAYOUT_FILE, MAX_LAYOUT_BYTES).text("imageLayoutVersion")
    if version != LAYOUT_VERSION:
        raise Unsupported(f"an OCI image layout of version {version[:40]!r}; only {LAYOUT_VERSION} is known")
    try:
        listed = parse_index(index).manifests
    except InvalidManifest as error:
        raise InvalidManifest(f"{INDEX_FILE}: {error}") from error
    if not listed:
        raise NotFound(f"the image layout is empty: {INDEX_FILE} lists no manifests")
    return index


async def reachable(content: LayoutContent, target: Descriptor) -> tuple[dict[Digest, int], list[Digest]]:
    """Every blob that an image needs with its size, and those of them that are not here.

    Raises `Mismatch` for a blob of another size than its descriptor says, `LimitExceeded` beyond `MAX_BLOBS` and
    `MAX_DEPTH`.
    """
    found: dict[Digest, int] = {}
    absent: dict[Digest, None] = {}
    waiting = [(target, 0)]
    while waiting:
        descriptor, depth = waiting.pop()
        if descriptor.digest in found or descriptor.digest in absent:
            continue
        if len(found) + len(absent) >= MAX_BLOBS or depth > MAX_DEPTH:
            raise LimitExceeded(f"an image of more than {MAX_BLOBS} blobs or {MAX_DEPTH} levels (MAX_BLOBS, MAX_DEPTH)")
        size = await content.info(descriptor.digest)
        if size is None:
            absent[descriptor.digest] = None
            continue
        if size > MAX_BLOB_BYTES:
            raise LimitExceeded(f"blob {descriptor.digest} has {size} bytes: over {MAX_BLOB_BYTES} (MAX_BLOB_BYTES)")
        if size != descriptor.size:
            raise Mismatch(f"blob {descriptor.digest} has {size} bytes, not {descriptor.size}")
        found[descriptor.digest] = size
        if descriptor.media_type in INDEX_TYPES | MANIFEST_TYPES:
            parsed = parse_manifest(await content.read(descriptor.digest, limit=MAX_MANIFEST_BYTES))
            waiting += [(child, depth + 1) for child in _children(parsed)]
    return found, list(absent)


def _children(parsed: Manifest | ImageIndex) -> tuple[Descriptor, ...]:
    return parsed.manifests if isinstance(parsed, ImageIndex) else (parsed.config, *parsed.layers)


def index_json(root: Root) -> bytes:
    """``index.json`` of a layout that holds one image."""
    target = root.target
    entry = Descriptor(target.media_type, target.digest, target.size, root.annotations)
    return encode_index({"schemaVersion": 2}, [descriptor_json(entry)])


def blob_path(root: Path, digest: Digest) -> Path:
    """Where a layout in ``root`` has a blob. What was never checked to be a digest is refused."""
    algorithm, _, hexadecimal = parse_digest(digest).partition(":")
    return root / "blobs" / algorithm / hexadecimal


def write_blob(path: Path, content: bytes) -> None:
    """Write a blob whose digest was checked, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{secrets.token_hex(8)}")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


async def in_thread(doing: str, work: Callable[[], T]) -> T:
    """Run ``work``, which touches files, in a thread; the border at which the file system's errors become ours."""
    try:
        return await asyncio.to_thread(work)
    except OSError as error:
        raise translate(error, doing) from error


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, int] | None]:
    """A regular file's descriptor and size, or None where there is none; raises as the file system does otherwise."""
    try:
        descriptor = os.open(path, _READ)
    except (FileNotFoundError, NotADirectoryError):
        yield None
        return
    try:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise InvalidInput(f"{path} is not a regular file")
        yield descriptor, state.st_size
    finally:
        os.close(descriptor)


def pieces(descriptor: int, start: int, size: int) -> Iterator[bytes]:
    """``size`` bytes of a file from ``start`` on, fewer where it ends before."""
    while size > 0 and (piece := os.pread(descriptor, min(size, CHUNK_BYTES), start)):
        start += len(piece)
        size -= len(piece)
        yield piece
