# SPDX-License-Identifier: Apache-2.0
"""``soci rebuild-db``: the artifacts database from what the content store holds, and what images say of it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import click

from soci.digest import Digest, parse_digest
from soci.errors import InvalidDigest, NotFound, SociError
from soci.index import IMAGE_MANIFEST_DIGEST_ANNOTATION, SOCI_INDEX_V2, IndexEntry, SociIndex, parse_index
from soci.oci import MAX_CONFIG_BYTES, MAX_MANIFEST_BYTES, ImageIndex, Manifest, parse_config, parse_manifest
from soci_cli.border import run_command
from soci_cli.local import Local, opened
from soci_cli.progress import warn
from soci_cli.values import Globals
from soci_containerd import Image
from soci_indexing.artifacts import INDEX, PREFETCH, ZTOC, Artifact

MIN_INDEX_BYTES: Final = 10
"""No index is shorter."""


@dataclass(frozen=True, slots=True)
class Owner:
    """The image manifest that an index is of."""

    image: Digest
    manifest: Digest
    platform: str


@dataclass(slots=True)
class Known:
    """What containerd's images say: the image of each manifest, and the owner of each index version 2."""

    images: dict[Digest, Digest] = field(default_factory=dict)
    owners: dict[Digest, Owner] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """Entries that were added, and removed because their blobs are gone."""

    added: int
    removed: int


async def rebuild(local: Local) -> Rebuilt:
    """Forget what is no longer there, and add every index found, with its zTOCs and prefetch lists.

    A file that is no index is passed over; an index whose image is not here is told, and passed over.
    """
    there = {digest: size async for digest, size in local.store.digests()}
    artifacts = await asyncio.to_thread(local.db.all)
    gone = {one.digest for one in artifacts if one.digest not in there}
    await asyncio.to_thread(local.db.remove, gone)
    entries = {(one.digest, one.original_digest) for one in artifacts if one.digest not in gone}
    indexes = {one.digest for one in artifacts if one.type == INDEX}
    known = await _known(local, await local.client.images.all())
    added: list[Artifact] = []
    for digest, size in there.items():
        index = await _index(local, digest) if MIN_INDEX_BYTES <= size <= MAX_MANIFEST_BYTES else None
        if index is None:
            continue
        owner = await _owner(local, digest, index, known)
        if owner is None:
            continue
        if digest not in indexes:
            added.append(_index_entry(digest, size, index, owner))
        blobs = _blob_entries(index.layers, ZTOC) + _blob_entries(index.prefetch, PREFETCH)
        fresh = [one for one in blobs if one.digest in there and (one.digest, one.original_digest) not in entries]
        entries |= {(one.digest, one.original_digest) for one in fresh}
        added += fresh
    await asyncio.to_thread(local.db.put, *added)
    return Rebuilt(len(added), len(gone))


async def _index(local: Local, digest: Digest) -> SociIndex | None:
    try:
        return parse_index(await local.store.read(digest, limit=MAX_MANIFEST_BYTES))
    except SociError:
        return None


async def _known(local: Local, images: Sequence[Image]) -> Known:
    known = Known()
    for image in sorted(images, key=lambda one: one.name):
        try:
            document = parse_manifest(await local.images.read(image.target.digest, limit=MAX_MANIFEST_BYTES))
        except SociError:
            continue  # not an image, or not here
        if isinstance(document, ImageIndex):
            _note(known, image.target.digest, document)
        else:
            known.images[image.target.digest] = image.target.digest  # before any image index that lists it too
    return known


def _note(known: Known, target: Digest, index: ImageIndex) -> None:
    for entry in index.manifests:
        if entry.artifact_type != SOCI_INDEX_V2:
            known.images.setdefault(entry.digest, target)
            continue
        try:
            manifest = parse_digest(entry.annotations.get(IMAGE_MANIFEST_DIGEST_ANNOTATION, ""))
        except InvalidDigest:
            continue
        known.owners.setdefault(entry.digest, Owner(target, manifest, str(entry.platform or "")))


async def _owner(local: Local, digest: Digest, index: SociIndex, known: Known) -> Owner | None:
    if index.subject is None:
        if digest not in known.owners:
            warn(f"index {digest} (v2) is in no image here: passed over")
        return known.owners.get(digest)
    manifest = index.subject.digest
    try:
        platform = await _platform(local, manifest)
    except SociError as error:
        warn(f"index {digest}: its image is not here: passed over ({error})")
        return None
    return Owner(known.images.get(manifest, manifest), manifest, platform)


async def _platform(local: Local, digest: Digest) -> str:
    manifest = parse_manifest(await local.images.read(digest, limit=MAX_MANIFEST_BYTES))
    if not isinstance(manifest, Manifest):
        raise NotFound(f"{digest} is an image index")
    config = parse_config(await local.images.read(manifest.config.digest, limit=MAX_CONFIG_BYTES))
    return str(config.platform.normalized())


def _index_entry(digest: Digest, size: int, index: SociIndex, owner: Owner) -> Artifact:
    return Artifact(
        digest,
        INDEX,
        owner.manifest,
        image_digest=owner.image,
        platform=owner.platform,
        location=owner.manifest,
        media_type="application/vnd.oci.image.manifest.v1+json",
        artifact_type=index.artifact_type,
        size=size,
    )


def _blob_entries(entries: Sequence[IndexEntry], kind: str) -> list[Artifact]:
    return [
        Artifact(
            one.ztoc.digest,
            PREFETCH if kind == PREFETCH else ZTOC,
            one.layer,
            location=one.layer,
            media_type=one.ztoc.media_type,
            size=one.ztoc.size,
            span_size=one.span_size or 0,
        )
        for one in entries
    ]


@click.command("rebuild-db")
@click.pass_obj
def command(flags: Globals) -> None:
    """Build the artifacts database anew from the content store."""

    async def work() -> Rebuilt:
        async with opened(flags) as local:
            return await rebuild(local)

    done = run_command(work, flags)
    print(f"artifacts database: {done.added} added, {done.removed} removed", file=sys.stderr)
