# SPDX-License-Identifier: Apache-2.0
"""An index and all it names from the content store to a registry: blobs first, then the index, then its listing."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

from soci.digest import Digest, sha256_digest
from soci.errors import InvalidManifest, NotFound
from soci.index import SOCI_INDEX_V1, SociIndex, parse_index
from soci.oci import MAX_MANIFEST_BYTES, OCI_MANIFEST, Descriptor, Manifest, Platform, parse_manifest
from soci.reference import parse_reference
from soci_cli.artifact_words import VERSIONS
from soci_cli.local import ImageManifest, Local, find_image, manifests_of
from soci_cli.progress import make_bars, warn
from soci_cli.values import human_bytes
from soci_indexing.artifacts import Artifact
from soci_indexing.stores import Content
from soci_registry import Registry, Repository

Existing = Literal["warn", "skip", "allow"]
EXISTING: Final[tuple[Existing, ...]] = ("warn", "skip", "allow")

IN_MEMORY_BYTES: Final = 8 << 20
"""Larger blobs go by a temporary file."""


class PushScreen:
    """Lines on stdout, and a bar where stderr is a terminal; ``quiet`` prints only what was pushed."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bars: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if not self._quiet and sys.stderr.isatty():
            self._bars = make_bars()
            self._bars.start()
            self._task = self._bars.add_task("pushing", total=0)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()

    def say(self, line: str) -> None:
        """A line, unless quiet."""
        if not self._quiet:
            print(line, flush=True)

    def begun(self, blobs: Iterable[Descriptor]) -> None:
        """These blobs are to be pushed."""
        if self._bars is not None:
            self._bars.update(self._task, total=self._bars.tasks[0].total + sum(blob.size for blob in blobs))

    def blob(self, blob: Descriptor, *, sent: bool) -> None:
        """A blob is at the registry."""
        if self._bars is not None:
            self._bars.advance(self._task, blob.size)
        self.say(f"{'pushed' if sent else 'already there:'} {blob.digest} ({human_bytes(blob.size)})")

    def pushed(self, index: Digest, where: str) -> None:
        """An index is complete."""
        print(index if self._quiet else f"pushed index {index} to {where}", flush=True)


def choose(found: list[Artifact], one: ImageManifest, image: str) -> Artifact:
    """The newest index of version 1, of an image manifest's indexes, newest first. Raises `NotFound`."""
    for index in found:
        if index.artifact_type == SOCI_INDEX_V1:
            return index
        version = VERSIONS.get(index.artifact_type, "of an unknown type")
        warn(f"index {index.digest} is {version}, which is pushed with its image: skipped")
    raise NotFound(f"no SOCI index (v1) of {image} for {one.platform} here: run soci create {image}")


@dataclass(frozen=True, slots=True)
class PushWish:
    """Which manifests of which image, and how: what to do about ``existing`` indexes, how many ``uploads`` at once."""

    image: str
    platforms: tuple[Platform, ...]
    every: bool
    existing: Existing
    uploads: int


async def push_indexes(local: Local, registry: Registry, wish: PushWish, screen: PushScreen) -> None:
    """Push the newest index of each platform. Raises `NotFound`, before anything is pushed, where one has none."""
    image = await find_image(local.client, wish.image)
    reference = parse_reference(image.name)
    repository = registry.repository(reference)
    chosen = []
    for one in await manifests_of(local.images, image, wish.platforms, every=wish.every):
        found = await asyncio.to_thread(local.db.indexes_of, one.descriptor.digest)
        chosen.append((one, choose(found, one, image.name)))
    for one, index in chosen:
        push = _Push(local, repository, one, asyncio.Semaphore(wish.uploads), screen)
        if await push.wanted(wish.existing, reference.name):
            await push.run(index)
            screen.pushed(index.digest, reference.name)


@dataclass(frozen=True, slots=True)
class _Push:
    """One index on its way."""

    local: Local
    repository: Repository
    image: ImageManifest
    room: asyncio.Semaphore
    screen: PushScreen

    async def wanted(self, existing: Existing, where: str) -> bool:
        """Whether to push, after a look at what the registry has."""
        if existing == "allow":
            return True
        there = await self.repository.referrers(self.image.descriptor.digest, SOCI_INDEX_V1)
        if not there:
            return True
        digests = ", ".join(one.digest for one in there[:10])
        if existing == "skip":
            self.screen.say(f"skipped: {where} has an index of {self.image.descriptor.digest} already: {digests}")
            return False
        warn(f"{where} has an index of {self.image.descriptor.digest} already: {digests}")
        return True

    async def run(self, artifact: Artifact) -> None:
        """Push the image's manifest if the registry lacks it, the index's blobs, the index, its listing."""
        content = await self.local.store.read(artifact.digest, limit=MAX_MANIFEST_BYTES)
        index, document = parse_index(content), parse_manifest(content)
        subject = self.image.descriptor
        if index.subject is None or index.subject.digest != subject.digest or not isinstance(document, Manifest):
            raise InvalidManifest(f"index {artifact.digest} is not of {subject.digest}: run soci rebuild-db")
        await self._subject()
        await self._blobs(self.local.store, [document.config, *document.layers])
        pushed = await self.repository.push_manifest(content, OCI_MANIFEST, artifact.digest)
        if not pushed.subject_handled:
            await self.repository.attach_referrer_tag(subject.digest, listing_of(index, content))

    async def _subject(self) -> None:
        """What an index refers to must be there before it: registries may refuse it, and clients would not find it."""
        subject, manifest = self.image.descriptor, self.image.manifest
        if await self.repository.manifest_exists(subject.digest) is not None:
            return
        self.screen.say(f"the registry lacks the image's manifest {subject.digest}: pushing it too")
        blobs = [manifest.config, *(layer for layer in manifest.layers if not layer.urls)]
        await self._blobs(self.local.images, blobs)
        content = await self.local.images.read(subject.digest, limit=MAX_MANIFEST_BYTES)
        await self.repository.push_manifest(content, subject.media_type, subject.digest)

    async def _blobs(self, store: Content, blobs: list[Descriptor]) -> None:
        unlike = {blob.digest: blob for blob in blobs}.values()
        self.screen.begun(unlike)
        async with asyncio.TaskGroup() as group:
            for blob in unlike:
                group.create_task(self._blob(store, blob))

    async def _blob(self, store: Content, blob: Descriptor) -> None:
        async with self.room:
            sent = await self.repository.blob_exists(blob.digest) is None
            if sent and blob.size <= IN_MEMORY_BYTES:
                await self.repository.push_blob(await store.read(blob.digest, limit=IN_MEMORY_BYTES), blob.digest)
            elif sent:
                await self._by_file(store, blob)
        self.screen.blob(blob, sent=sent)

    async def _by_file(self, store: Content, blob: Descriptor) -> None:
        with tempfile.NamedTemporaryFile(prefix="soci-push-") as file:
            async with aclosing(store.stream(blob.digest)) as chunks:
                async for chunk in chunks:
                    await asyncio.to_thread(file.write, chunk)
            file.flush()
            await self.repository.push_blob_file(Path(file.name), blob.digest)


def listing_of(index: SociIndex, content: bytes) -> Descriptor:
    """How an index stands in the list of what refers to its image."""
    return Descriptor(
        OCI_MANIFEST,
        sha256_digest(content),
        len(content),
        annotations=index.annotations,
        artifact_type=index.artifact_type,
    )
