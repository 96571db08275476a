# SPDX-License-Identifier: Apache-2.0
"""What the verbs on local artifacts work with: containerd, the content store, the artifacts database; and images."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from soci.digest import Digest
from soci.errors import FailedPrecondition, InvalidManifest, NotFound, Unavailable
from soci.oci import (
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    Descriptor,
    ImageIndex,
    Manifest,
    Platform,
    choose_platform,
    parse_config,
    parse_manifest,
    parse_platform,
)
from soci.reference import parse_reference
from soci_cli.containerd_store import ContainerdStore
from soci_cli.values import DEFAULT_PLATFORM, Globals
from soci_containerd import Client, Image, connect
from soci_indexing.artifacts import FILE_NAME, ArtifactsDb
from soci_indexing.stores import Blobs, Content, LayoutStore

GC_INDEX: Final = "containerd.io/gc.ref.content.soci-index"
"""Label of an image for its first SOCI index; ``.1``, ``.2``… are appended for more. containerd's collector keeps
what any label with that beginning names."""
MAX_INDEX_LABELS: Final = 1000


@dataclass(frozen=True, slots=True)
class Local:
    """An opened set. ``images`` are containerd's blobs; ``store`` holds the artifacts, and may be the same."""

    client: Client
    images: ContainerdStore
    store: Blobs
    db: ArtifactsDb
    flags: Globals

    @property
    def in_containerd(self) -> bool:
        """Whether the artifacts are in containerd too."""
        return self.store is self.images

    @asynccontextmanager
    async def leased(self, purpose: str) -> AsyncIterator[Local]:
        """The same, where nothing found or made is collected until the block ends."""
        async with self.client.lease(purpose) as client:
            images = ContainerdStore(client)
            store = images if self.in_containerd else self.store
            yield Local(client, images, store, self.db, self.flags)


@dataclass(frozen=True, slots=True)
class ImageManifest:
    """One platform's manifest of an image. ``descriptor`` is as it was found: media type, digest, size."""

    descriptor: Descriptor
    manifest: Manifest
    platform: Platform


def make_root(root: Path) -> Path:
    """The root folder, made with mode 0700 where it is missing; its parents are not made."""
    try:
        root.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise FailedPrecondition(f"cannot make the folder {root} (--root): {error.strerror}") from error
    return root


def artifacts_of(flags: Globals) -> ArtifactsDb:
    """The artifacts database of ``--root``."""
    return ArtifactsDb(make_root(flags.root) / FILE_NAME)


@asynccontextmanager
async def opened(flags: Globals) -> AsyncIterator[Local]:
    """Everything the flags name. Raises `Unavailable` without containerd."""
    db = artifacts_of(flags)
    async with connect(flags.address, flags.namespace) as client:
        images = ContainerdStore(client)
        store: Blobs = images if flags.content_store == "containerd" else LayoutStore(flags.root)
        yield Local(client, images, store, db, flags)


@asynccontextmanager
async def opened_store(flags: Globals) -> AsyncIterator[Content]:
    """The content store alone: the one below ``--root`` needs no containerd."""
    if flags.content_store == "soci":
        yield LayoutStore(flags.root)
        return
    async with opened(flags) as local:
        yield local.store


async def all_images(flags: Globals) -> list[Image]:
    """Containerd's images; with artifacts below ``--root``, none where containerd is away."""
    try:
        async with connect(flags.address, flags.namespace) as client:
            return await client.images.all()
    except Unavailable:
        if flags.content_store == "soci":
            return []
        raise


async def find_image(client: Client, name: str) -> Image:
    """The image by the name as given, or else by its complete form. Raises `NotFound`."""
    try:
        return await client.images.get(name)
    except NotFound:
        complete = str(parse_reference(name))
        if complete == name:
            raise
    return await client.images.get(complete)


async def manifests_of(
    blobs: Content,
    image: Image,
    platforms: Sequence[Platform] = (),
    *,
    every: bool = False,
    missing_is_fine: bool = False,
) -> list[ImageManifest]:
    """The image's manifests for these platforms, for ``every`` one it has, or (neither) for this machine's.

    An image of one manifest has that, unless other platforms are asked for. Raises `NotFound` for a platform that the
    image has not, and (unless ``missing_is_fine``) for one whose manifest was never pulled.
    """
    target = image.target
    parsed = parse_manifest(await blobs.read(target.digest, limit=MAX_MANIFEST_BYTES))
    if isinstance(parsed, Manifest):
        platform = await _platform_of(blobs, parsed)
        if not every and platforms and not all(platform.matches(one) for one in platforms):
            raise NotFound(f"{image.name} is for {platform} alone")
        return [ImageManifest(Descriptor(target.media_type, target.digest, target.size), parsed, platform)]
    wanted = _images_in(parsed) if every else platforms or (parse_platform(DEFAULT_PLATFORM),)
    found: dict[Digest, ImageManifest] = {}
    for platform in dict.fromkeys(one.normalized() for one in wanted):
        entry = choose_platform(parsed, platform)
        here = not missing_is_fine or await blobs.info(entry.digest) is not None
        if entry.digest not in found and here:
            manifest = await _manifest(blobs, image, entry, platform)
            found[entry.digest] = ImageManifest(
                Descriptor(entry.media_type, entry.digest, entry.size), manifest, platform
            )
    if not found and not missing_is_fine:
        raise NotFound(f"{image.name} has no image for any platform")
    return list(found.values())


async def _manifest(blobs: Content, image: Image, entry: Descriptor, platform: Platform) -> Manifest:
    try:
        manifest = parse_manifest(await blobs.read(entry.digest, limit=MAX_MANIFEST_BYTES))
    except NotFound as error:
        raise NotFound(f"{image.name}: the manifest for {platform} is not here: pull it first") from error
    if not isinstance(manifest, Manifest):
        raise InvalidManifest(f"{image.name}: the manifest for {platform} is an image index again")
    return manifest


async def _platform_of(blobs: Content, manifest: Manifest) -> Platform:
    config = parse_config(await blobs.read(manifest.config.digest, limit=MAX_CONFIG_BYTES))
    return config.platform.normalized()


def _images_in(index: ImageIndex) -> list[Platform]:
    """The platforms of an image index; attestations and artifacts are none's."""
    there = [entry.platform for entry in index.manifests if entry.platform and not entry.artifact_type]
    return [one for one in there if "unknown" not in (one.os, one.architecture)]


async def keep_with_image(local: Local, name: str, indexes: Iterable[Digest]) -> None:
    """Make containerd keep these indexes as long as the image: a label of its own for each, no other overwritten."""
    with await asyncio.to_thread(_Locked, local.flags.root):
        labels = dict((await local.client.images.get(name)).labels)
        added: dict[str, str] = {}
        for digest in indexes:
            taken = labels | added
            if digest not in (value for key, value in taken.items() if is_index_label(key)):
                free = (key for key in _index_labels() if not taken.get(key))
                added[next(free, GC_INDEX)] = digest
        await local.client.images.update_labels(name, added)


async def forget_with_images(client: Client, indexes: Iterable[Digest]) -> None:
    """Take the labels of these indexes from all images."""
    gone = set(indexes)
    for image in await client.images.all():
        dead = {key: "" for key, value in image.labels.items() if is_index_label(key) and value in gone}
        await client.images.update_labels(image.name, dead)


def is_index_label(key: str) -> bool:
    """Whether a label keeps a SOCI index."""
    return key == GC_INDEX or key.startswith(GC_INDEX + ".")


def _index_labels() -> list[str]:
    return [GC_INDEX, *(f"{GC_INDEX}.{number}" for number in range(1, MAX_INDEX_LABELS))]


class _Locked:
    """The root folder, locked against other processes of ours that read labels to change them."""

    def __init__(self, root: Path) -> None:
        self._descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
