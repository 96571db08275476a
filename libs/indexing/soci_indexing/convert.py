# SPDX-License-Identifier: Apache-2.0
"""An image made anew so that it carries its SOCI indexes: ``soci convert``, in whatever content store.

The result is an image index. In it each image manifest names its SOCI index by an annotation, and the SOCI indexes
(version 2) are entries of their own behind the images, so that everything travels wherever the image is copied.
Configs and layers stay as they are. For a plain image the bytes are those that the reference converter writes. Beyond
it, nothing else in the image is broken: attestations stay as they are and follow their image by its new digest, and
platforms that are not converted keep the SOCI indexes that they had.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from soci.digest import Digest, parse_digest, sha256_digest
from soci.errors import InvalidInput, InvalidManifest, NotFound, NoZtoc
from soci.index import (
    EMPTY_CONFIG,
    EMPTY_CONFIG_DIGEST,
    IMAGE_MANIFEST_DIGEST_ANNOTATION,
    SOCI_INDEX_V2,
)
from soci.index import (
    parse_index as parse_soci_index,
)
from soci.oci import (
    DOCKER_CONFIG,
    MANIFEST_TYPES,
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    ImageIndex,
    Manifest,
    Platform,
    choose_platform,
    parse_config,
    parse_manifest,
)
from soci.ztoc import MAX_ZTOC_BYTES
from soci_indexing.artifacts import ArtifactsDb
from soci_indexing.build import IndexResult, IndexWish, Noticed, Report, build_index, gc_labels
from soci_indexing.pool import BuildPool
from soci_indexing.rewrite import (
    Json,
    canonical_descriptor,
    document_of,
    encode_index,
    follow,
    index_of_one,
    parse_index,
    rewrite_artifact,
    rewrite_entry,
    rewrite_image,
    soci_entry,
)
from soci_indexing.stores import Content

GC_CONTENT: Final = "containerd.io/gc.ref.content"
UNKNOWN: Final = "unknown"
"""The operating system and architecture of entries that run on none: attestations."""

Build = Callable[[Descriptor, Manifest, Platform], Awaitable[Descriptor]]
"""Builds and stores the SOCI index version 2 of a manifest; `NoZtoc` where no layer of it can be indexed."""


@dataclass(frozen=True, slots=True)
class ConvertWish:
    """For which platforms. ``host`` is the one meant where the image is for several and none is named."""

    host: Platform
    platforms: tuple[Platform, ...] = ()
    all_platforms: bool = False


@dataclass(frozen=True, slots=True)
class Converted:
    """The image index that came out, and the new SOCI indexes in it by platform (a descriptor's ``platform``)."""

    target: Descriptor
    indexes: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True)
class Child:
    """An entry of the image index, and the manifest behind it where it is here.

    ``kind``: ``image``; ``artifact`` for other manifests, as attestations and SOCI indexes; ``other`` for what is
    absent or no manifest, and stays as it is.
    """

    entry: Descriptor
    raw: Json
    kind: Literal["image", "artifact", "other"]
    content: bytes = b""
    manifest: Manifest | None = None


@dataclass(frozen=True, slots=True)
class _Image:
    document: Json  # of the image index to begin with
    children: tuple[Child, ...]
    single: Platform | None = None  # of an image that was one manifest


@dataclass(slots=True)
class _Moved:
    """What became of manifests, by their old digests, and of the entries, in order."""

    to: dict[Digest, Descriptor] = field(default_factory=dict)
    entries: list[Json] = field(default_factory=list)


async def convert(  # noqa: PLR0913  each is another party
    content: Content, target: Descriptor, wish: ConvertWish, *, build: Build, db: ArtifactsDb | None, report: Report
) -> Converted:
    """Convert image ``target``; everything new is in ``content``, labelled so that the image index keeps it all.

    Raises `NoZtoc` where no platform has a layer to index, `NotFound` for a platform that the image is not for or
    whose manifest is not here, `InvalidManifest`, `Unsupported`, and what ``build`` and the store raise.
    """
    image = await open_image(content, target)
    built = await _build(image, platforms_of(image, wish), build, report)
    moved = await _rewrite(content, image, {old: index.digest for old, index, _ in built})
    entries = moved.entries
    for old, index, platform in built:
        added = soci_entry(replace(index, platform=platform), moved.to[old].digest)
        entries = place_soci_entry(entries, image.children, added, platform)
    encoded = encode_index(image.document, [follow(entry, moved.to) for entry in entries])
    result = Descriptor(OCI_INDEX, sha256_digest(encoded), len(encoded))
    listed = parse_index(encoded)
    kept = {f"{GC_CONTENT}.m.{number}": str(entry.digest) for number, entry in enumerate(listed.manifests)}
    await content.push(result, encoded, kept)
    if db is not None:
        await asyncio.to_thread(_note, db, listed, result.digest)
    return Converted(result, tuple(replace(index, platform=platform) for _, index, platform in built))


def index_builder(  # noqa: PLR0913  each is another party
    content: Content,
    artifacts: Content,
    db: ArtifactsDb | None,
    *,
    pool: BuildPool,
    wish: IndexWish,
    image: Digest,
    report: Report,
) -> Build:
    """What `convert` builds indexes with. ``image`` is the digest of the image to convert.

    zTOCs are looked for and stored in ``artifacts``; where that is another store than ``content``, which the image is
    in, they are stored in both, for the converted image needs them beside it.
    """
    wish = replace(wish, version=2)

    async def build(subject: Descriptor, manifest: Manifest, platform: Platform) -> Descriptor:
        result = await build_index(
            content,
            artifacts,
            db,
            pool,
            wish,
            subject=subject,
            manifest=manifest,
            image=image,
            platform=platform,
            report=report,
        )
        if artifacts is not content:
            await _copy(artifacts, content, result)
        return result.descriptor

    return build


async def _copy(artifacts: Content, content: Content, result: IndexResult) -> None:
    """Store in ``content`` what an index needs, and then the index."""
    for entry in result.entries + result.prefetch:
        blob = await artifacts.read(entry.ztoc.digest, limit=MAX_ZTOC_BYTES)
        await content.push(entry.ztoc, blob)
    await content.push(Descriptor(SOCI_INDEX_V2, EMPTY_CONFIG_DIGEST, len(EMPTY_CONFIG)), EMPTY_CONFIG)
    await content.push(result.descriptor, result.content, gc_labels(parse_soci_index(result.content)))


async def open_image(content: Content, target: Descriptor) -> _Image:
    """The image index to begin with: the target itself, or a new one around a single manifest."""
    data = await content.read(target.digest, limit=MAX_MANIFEST_BYTES)
    parsed = parse_manifest(data)
    if isinstance(parsed, ImageIndex):
        document = document_of(data)
        raws = zip(parsed.manifests, document["manifests"] or [], strict=True)
        children = [await _child(content, entry, raw) for entry, raw in raws]
        return _Image(document, tuple(children))
    # What the target is called in its store says nothing about the manifest.
    platform = await _platform_of_config(content, parsed)
    entry = Descriptor(parsed.media_type, target.digest, len(data), target.annotations, platform)
    document = index_of_one(entry)
    return _Image(document, (Child(entry, document["manifests"][0], "image", data, parsed),), platform)


async def _child(content: Content, entry: Descriptor, raw: Json) -> Child:
    if entry.media_type not in MANIFEST_TYPES or await content.info(entry.digest) is None:
        return Child(entry, raw, "other")
    data = await content.read(entry.digest, limit=MAX_MANIFEST_BYTES)
    manifest = parse_manifest(data)
    if not isinstance(manifest, Manifest):
        raise InvalidManifest(f"the image index calls {entry.digest} a manifest, but it is an image index")
    attests = entry.platform is not None and UNKNOWN in (entry.platform.os, entry.platform.architecture)
    is_image = manifest.config.media_type in (OCI_CONFIG, DOCKER_CONFIG) and not manifest.artifact_type
    if attests or not is_image or entry.artifact_type:
        return Child(entry, raw, "artifact", data, manifest)
    if entry.platform is None:
        # Clients prefer entries with a platform: without one here, they would take the SOCI index for the image.
        entry = replace(entry, platform=await _platform_of_config(content, manifest))
        raw = canonical_descriptor({**raw, "platform": index_of_one(entry)["manifests"][0]["platform"]})
    return Child(entry, raw, "image", data, manifest)


async def _platform_of_config(content: Content, manifest: Manifest) -> Platform:
    """The platform that an image's config names, and with it Windows' version."""
    data = await content.read(manifest.config.digest, limit=MAX_CONFIG_BYTES)
    platform = parse_config(data).platform
    if not platform.os or not platform.architecture:
        raise InvalidManifest(f"image config {manifest.config.digest} names no platform")
    document = document_of(data)
    version, features = document.get("os.version"), document.get("os.features")
    return replace(
        platform.normalized(),
        os_version=version if isinstance(version, str) else "",
        os_features=tuple(text for text in features if isinstance(text, str)) if isinstance(features, list) else (),
    )


def platforms_of(image: _Image, wish: ConvertWish) -> list[Platform]:
    """The platforms to convert, each once, in the order of the wish; `InvalidInput` where the image has none."""
    own = [
        replace(platform.normalized(), os_version=platform.os_version, os_features=platform.os_features)
        for child in image.children
        if (platform := child.entry.platform)
        and child.kind in ("image", "other")
        and not child.entry.artifact_type
        and UNKNOWN not in (platform.os, platform.architecture)
    ]
    if not own:
        raise InvalidInput("the image is for no platform: there is nothing in it to convert")
    default = [image.single or wish.host]
    wanted = own if wish.all_platforms else [platform.normalized() for platform in wish.platforms] or default
    once: dict[Platform, Platform] = {}
    for platform in wanted:
        once.setdefault(platform.normalized(), platform)
    return list(once.values())


async def _build(
    image: _Image, platforms: Sequence[Platform], build: Build, report: Report
) -> list[tuple[Digest, Descriptor, Platform]]:
    """For each platform: the digest that its manifest had, its new SOCI index, and itself."""
    candidates = [child for child in image.children if child.kind in ("image", "other")]
    listed = ImageIndex(OCI_INDEX, tuple(child.entry for child in candidates))
    built = []
    for platform in platforms:
        entry = choose_platform(listed, platform)
        child = next(child for child in candidates if child.entry is entry)
        if child.manifest is None:
            raise NotFound(f"the manifest for {platform}, {entry.digest}, is not here: get the image for that platform")
        try:
            built.append((entry.digest, await build(entry, child.manifest, platform), platform))
        except NoZtoc as error:
            report(Noticed(f"{platform} is left as it is: {error}"))
    if not built:
        raise NoZtoc("no ztocs created, all layers either skipped or produced errors")
    return built


async def _rewrite(content: Content, image: _Image, indexes: dict[Digest, Digest]) -> _Moved:
    """Store every manifest as it is to be: first images, then what is about them."""
    moved = _Moved()
    bodies: dict[Digest, bytes] = {}
    for kind in ("image", "artifact"):
        for child in image.children:
            if child.kind != kind or child.manifest is None:
                continue
            old = child.entry.digest
            body = (
                rewrite_image(child.content, indexes.get(old))
                if kind == "image"
                else rewrite_artifact(child.content, moved.to)
            )
            bodies[old] = body
            moved.to[old] = Descriptor(OCI_MANIFEST, old if body is child.content else sha256_digest(body), len(body))
            await content.push(moved.to[old], body, _labels(child.manifest))
    for child in image.children:
        changed = child.entry.digest in bodies and bodies[child.entry.digest] is not child.content
        moved.entries.append(rewrite_entry(child.raw, bodies[child.entry.digest]) if changed else child.raw)
    return moved


def _labels(manifest: Manifest) -> dict[str, str]:
    """A manifest keeps its config and its layers."""
    layers = {f"{GC_CONTENT}.l.{number}": str(layer.digest) for number, layer in enumerate(manifest.layers)}
    return {f"{GC_CONTENT}.config": str(manifest.config.digest), **layers}


def place_soci_entry(entries: list[Json], children: Sequence[Child], added: Json, platform: Platform) -> list[Json]:
    """The entries with a SOCI index in the place of the platform's old one, or else at the end.

    ``children`` are what the first entries were.
    """
    for number, child in enumerate(children):
        if _is_v2(child) and child.entry.platform is not None and child.entry.platform.matches(platform):
            return [*entries[:number], added, *entries[number + 1 :]]
    return [*entries, added]


def _is_v2(child: Child) -> bool:
    # Some tools drop an entry's artifact type.
    config = child.manifest.config.media_type if child.manifest else ""
    return SOCI_INDEX_V2 in (child.entry.artifact_type, config)


def _note(db: ArtifactsDb, index: ImageIndex, image: Digest) -> None:
    """Say in the database which image and manifest the SOCI indexes belong to now."""
    for entry in index.manifests:
        original = entry.annotations.get(IMAGE_MANIFEST_DIGEST_ANNOTATION)
        if entry.artifact_type == SOCI_INDEX_V2 and original:
            db.move_index(entry.digest, image=image, original=parse_digest(original))
