# SPDX-License-Identifier: Apache-2.0
"""Where blobs come from and go to: the one face of every content store, and the store that is a folder.

`Content` has adapters elsewhere too, over containerd and over a registry's repository. `LayoutStore` here is an OCI
image layout (image-spec, image-layout.md) without labels and without a garbage collector.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from soci.digest import Digest, hex_of, new_hash, parse_digest
from soci.errors import (
    FailedPrecondition,
    InvalidDigest,
    InvalidManifest,
    LimitExceeded,
    Mismatch,
    NotFound,
    SociError,
    Unavailable,
)
from soci.oci import INDEX_TYPES, MANIFEST_TYPES, Descriptor, descriptor_json, encode_json
from soci.oci_json import load

CHUNK_BYTES: Final = 1 << 20
"""A blob is read and written in pieces of this size."""
MAX_LISTING_BYTES: Final = 16 << 20
"""Bytes of a layout's ``index.json``."""
MAX_LISTED: Final = 100_000
"""Entries of a layout's ``index.json``."""

NO_LABELS: Final[Mapping[str, str]] = {}

T = TypeVar("T")


class Content(Protocol):
    """Blobs by digest. Every method raises a `SociError` and nothing else."""

    async def info(self, digest: Digest) -> int | None:
        """The blob's size in bytes, or None where it is not here."""
        ...

    async def read(self, digest: Digest, *, limit: int) -> bytes:
        """A whole blob, checked. Raises `NotFound`, `Mismatch`, and `LimitExceeded` beyond ``limit`` bytes."""
        ...

    def stream(self, digest: Digest) -> AsyncGenerator[bytes, None]:
        """A whole blob in chunks; `Mismatch` after the last one if it is another. Close it where it is left early."""
        ...

    async def push(self, descriptor: Descriptor, content: bytes, labels: Mapping[str, str] = NO_LABELS) -> bool:
        """Store a blob; False where it was here already (it then gets the labels all the same).

        Raises `Mismatch` where the content is not what the descriptor says.
        """
        ...

    async def label(self, digest: Digest, labels: Mapping[str, str]) -> None:
        """Add labels to a blob, in a store that has any."""
        ...

    async def delete(self, digest: Digest) -> None:
        """Delete a blob; nothing happens where it is not here."""
        ...


class Blobs(Content, Protocol):
    """A store that can say what it holds."""

    def digests(self) -> AsyncGenerator[tuple[Digest, int], None]:
        """Every blob's digest and its size in bytes, in no particular order."""
        ...


def check(content: bytes, descriptor: Descriptor) -> None:
    """Raises `Mismatch` where ``content`` has not the descriptor's size and digest."""
    state = new_hash(descriptor.digest)
    state.update(content)
    if len(content) != descriptor.size or state.hexdigest() != hex_of(descriptor.digest):
        raise Mismatch(f"{len(content)} bytes that are not {descriptor.digest} of {descriptor.size} bytes")


class LayoutStore:
    """An OCI image layout at ``<root>/content``, made when something is first stored.

    ``blobs/<algorithm>/<hex>``, ``index.json``, and ``ingest/`` for what is being written. Several processes may use
    it at once: blobs appear whole, and ``index.json`` is changed under a lock on the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "content"

    async def info(self, digest: Digest) -> int | None:
        """As `Content.info`."""
        try:
            return await _in_thread(f"look up {digest}", lambda: self.path(digest).stat().st_size)
        except NotFound:
            return None

    async def read(self, digest: Digest, *, limit: int) -> bytes:
        """As `Content.read`."""
        return await _in_thread(f"read {digest}", lambda: self._read(digest, limit))

    async def stream(self, digest: Digest) -> AsyncGenerator[bytes, None]:
        """As `Content.stream`."""
        doing, state = f"read {digest}", new_hash(digest)
        file = await _in_thread(doing, lambda: self.path(digest).open("rb", buffering=0))
        with file:
            while chunk := await _in_thread(doing, lambda: file.read(CHUNK_BYTES)):
                state.update(chunk)
                yield chunk
        self._proved(digest, state)

    async def push(self, descriptor: Descriptor, content: bytes, labels: Mapping[str, str] = NO_LABELS) -> bool:
        """As `Content.push`. What has a manifest's type is also listed in ``index.json``."""
        del labels
        return await _in_thread(f"store {descriptor.digest}", lambda: self._push(descriptor, content))

    async def label(self, digest: Digest, labels: Mapping[str, str]) -> None:
        """Nothing: a layout has no labels."""

    async def delete(self, digest: Digest) -> None:
        """As `Content.delete`; also taken out of ``index.json``."""
        await _in_thread(f"delete {digest}", lambda: self._delete(digest))

    async def digests(self) -> AsyncGenerator[tuple[Digest, int], None]:
        """As `Blobs.digests`; files that are named otherwise are passed over."""
        for found in await _in_thread("list the blobs", self._list):
            yield found

    def path(self, digest: Digest) -> Path:
        """Where the blob is, or would be."""
        return self.folder / "blobs" / digest.partition(":")[0] / hex_of(digest)

    def _read(self, digest: Digest, limit: int) -> bytes:
        with self.path(digest).open("rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise LimitExceeded(f"{digest} has more than {limit} bytes")
        state = new_hash(digest)
        state.update(content)
        self._proved(digest, state)
        return content

    def _proved(self, digest: Digest, state: hashlib._Hash) -> None:
        if state.hexdigest() != hex_of(digest):
            raise Mismatch(f"{self.path(digest)} holds other bytes than its name says: delete it")

    def _push(self, descriptor: Descriptor, content: bytes) -> bool:
        check(content, descriptor)
        self._prepare(descriptor.digest)
        fresh = not self._has(descriptor)
        if fresh:
            _write(self.folder / "ingest", self.path(descriptor.digest), content)
        if descriptor.media_type in MANIFEST_TYPES | INDEX_TYPES:
            entry = descriptor_json(descriptor)
            self._change_listing(lambda others: [*others, entry], unless=descriptor.digest)
        return fresh

    def _has(self, descriptor: Descriptor) -> bool:
        """A blob of another size is what a crash left: it is written again."""
        path = self.path(descriptor.digest)
        return path.is_file() and path.stat().st_size == descriptor.size

    def _prepare(self, digest: Digest) -> None:
        if not self.folder.is_dir():
            self.root.mkdir(mode=0o700, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)
        (self.folder / "ingest").mkdir(mode=0o700, exist_ok=True)
        self.path(digest).parent.mkdir(parents=True, exist_ok=True)
        mark = self.folder / "oci-layout"
        if not mark.exists():
            _write(self.folder / "ingest", mark, b'{"imageLayoutVersion":"1.0.0"}')
        if not (self.folder / "index.json").exists():
            self._change_listing(lambda others: others)

    def _delete(self, digest: Digest) -> None:
        if not self.folder.is_dir():
            return
        self.path(digest).unlink(missing_ok=True)
        self._change_listing(lambda others: [entry for entry in others if entry.get("digest") != digest])

    def _change_listing(
        self, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], unless: Digest | None = None
    ) -> None:
        """Replace ``index.json``; leave it where it already lists ``unless`` or would not change."""
        path = self.folder / "index.json"
        with _locked(self.folder):
            document = self._listing(path)
            others: list[dict[str, Any]] = document["manifests"]
            if unless is not None and any(entry.get("digest") == unless for entry in others):
                return
            changed = change(others)
            if changed == others and path.exists():
                return
            if len(changed) > MAX_LISTED:
                raise LimitExceeded(f"{path} lists {MAX_LISTED} manifests: remove indexes that nobody needs")
            _write(self.folder / "ingest", path, encode_json(document | {"manifests": changed}))

    def _listing(self, path: Path) -> dict[str, Any]:
        try:
            with path.open("rb") as file:
                content = file.read(MAX_LISTING_BYTES + 1)
        except FileNotFoundError:
            return {"schemaVersion": 2, "manifests": []}
        try:
            load(content, str(path), MAX_LISTING_BYTES)  # bounds it, and refuses what is no object
        except InvalidManifest as error:
            raise FailedPrecondition(f"not an image layout: {error}") from error
        document: dict[str, Any] = json.loads(content)  # whole: members that we do not know are others'
        listed = document.get("manifests") or []
        if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
            raise FailedPrecondition(f"not an image layout: {path} lists no manifests")
        return {"schemaVersion": 2, **document, "manifests": listed}

    def _list(self) -> list[tuple[Digest, int]]:
        found = []
        for algorithm in ("sha256", "sha512"):
            folder = self.folder / "blobs" / algorithm
            if not folder.is_dir():
                continue
            with os.scandir(folder) as entries:
                for entry in entries:
                    try:
                        digest = parse_digest(f"{algorithm}:{entry.name}")
                    except InvalidDigest:
                        continue
                    if entry.is_file(follow_symlinks=False):
                        found.append((digest, entry.stat(follow_symlinks=False).st_size))
        return found


def _write(ingest: Path, path: Path, content: bytes) -> None:
    """Write a file that appears whole, and whose bytes are on the disk before its name is."""
    temporary = ingest / secrets.token_hex(16)
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


async def _in_thread(doing: str, work: Callable[[], T]) -> T:
    """Run in a thread; this library's border to the file system."""
    try:
        return await asyncio.to_thread(work)
    except OSError as error:
        raise translate(error, doing) from error


def translate(error: OSError, doing: str) -> SociError:
    """Our error for the file system's."""
    text = f"cannot {doing}: {error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    if isinstance(error, FileNotFoundError):
        return NotFound(text)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE):
        return Unavailable(text)
    return FailedPrecondition(text)
