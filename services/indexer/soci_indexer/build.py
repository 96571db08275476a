# SPDX-License-Identifier: Apache-2.0
"""An index for an image: each layer streamed once through the zTOC builder, nothing of it kept on disk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from soci.build import Built, ZtocBuilder
from soci.digest import Digest, sha256_digest
from soci.errors import InvalidManifest, Mismatch, NoZtoc, SociError
from soci.index import (
    EMPTY_CONFIG,
    EMPTY_CONFIG_DIGEST,
    SOCI_INDEX_V1,
    IndexEntry,
    SociIndex,
    encode_index,
    ztoc_entry,
)
from soci.oci import (
    OCI_MANIFEST,
    Descriptor,
    Manifest,
    choose_platform,
    layer_compression,
    parse_manifest,
    parse_platform,
)
from soci.reference import parse_reference
from soci_bus.asks import BuildIndex, IndexBuilt, IndexedLayer
from soci_bus.events import Event, LayerIndexed
from soci_registry import Registry, Repository

FEED_BYTES = 1 << 20
"""Compressed bytes that go to the builder at a time."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of one layer: a zTOC, or why there is none."""

    layer: Descriptor
    compression: str | None
    skipped: str = ""


def plan(layers: tuple[Descriptor, ...], min_layer_size: int) -> list[Plan]:
    """Which layers get a zTOC. Pure; the rules are the reference's."""
    plans = []
    for layer in layers:
        compression = layer_compression(layer.media_type)
        if layer.size < min_layer_size:
            plans.append(Plan(layer, compression, f"{layer.size} bytes are under the minimum of {min_layer_size}"))
        elif compression not in {"gzip", "uncompressed"}:
            plans.append(Plan(layer, compression, f"{layer.media_type} cannot be indexed yet"))
        else:
            plans.append(Plan(layer, compression))
    return plans


class IndexBuilder:
    """Builds and pushes one index at a time."""

    def __init__(self, registry: Registry, publish: Callable[[Event], None]) -> None:
        self._registry = registry
        self._publish = publish

    async def build(self, job: BuildIndex, job_id: str) -> IndexBuilt:
        """Index the image's manifest for the platform; push zTOCs, index and, where needed, the fallback tag.

        Raises `NoZtoc` when no layer can be indexed, and what registry and layers raise.
        """
        repository = self._registry.repository(job.image)
        subject, manifest = await self._manifest(repository, job)
        entries: list[IndexEntry] = []
        skipped = []
        for one in plan(manifest.layers, job.min_layer_size):
            begun = time.monotonic()
            if one.skipped:
                skipped.append((one.layer.digest, one.skipped))
                self._publish(LayerIndexed(job_id, one.layer.digest, None, 0, one.layer.size, one.skipped, 0.0))
                continue
            built = await self._layer(repository, one, job.span_size)
            digest = sha256_digest(built.ztoc_bytes)
            await repository.push_blob(built.ztoc_bytes, digest)
            entries.append(ztoc_entry(one.layer, digest, len(built.ztoc_bytes), job.span_size))
            seconds = time.monotonic() - begun
            self._publish(
                LayerIndexed(job_id, one.layer.digest, digest, len(built.ztoc_bytes), one.layer.size, "", seconds)
            )
        if not entries:
            raise NoZtoc(f"{job.image}: no layer can be indexed: " + "; ".join(f"{d}: {why}" for d, why in skipped))
        index, discovery = await self._push(repository, subject, entries)
        layers = tuple(IndexedLayer(entry.layer, entry.ztoc.digest, entry.ztoc.size) for entry in entries)
        return IndexBuilt(index, subject.digest, layers, tuple(skipped), discovery)

    async def _manifest(self, repository: Repository, job: BuildIndex) -> tuple[Descriptor, Manifest]:
        """The platform's image manifest, and the descriptor by which an index refers to it."""
        reference = parse_reference(job.image)
        fetched = await repository.manifest(reference.digest or reference.tag or "latest")
        parsed = parse_manifest(fetched.content)
        if not isinstance(parsed, Manifest):
            chosen = choose_platform(parsed, parse_platform(job.platform))
            fetched = await repository.manifest(chosen.digest)
            parsed = parse_manifest(fetched.content)
        if not isinstance(parsed, Manifest):
            raise InvalidManifest(f"{job.image}: an image index inside an image index")
        return Descriptor(fetched.media_type, fetched.digest, len(fetched.content)), parsed

    async def _layer(self, repository: Repository, one: Plan, span_size: int) -> Built:
        builder = ZtocBuilder("gzip" if one.compression == "gzip" else "uncompressed", span_size)
        waiting = bytearray()
        async for chunk in repository.blob_stream(one.layer.digest):
            waiting += chunk
            if len(waiting) >= FEED_BYTES:
                piece, waiting = waiting, bytearray()
                await asyncio.to_thread(builder.feed, bytes(piece))
        await asyncio.to_thread(builder.feed, bytes(waiting))
        try:
            built = await asyncio.to_thread(builder.finish)
        except SociError as error:
            raise type(error)(f"layer {one.layer.digest}: {error}") from error
        if built.layer != one.layer.digest or built.layer_size != one.layer.size:
            raise Mismatch(f"layer {one.layer.digest} came as {built.layer} with {built.layer_size} bytes")
        return built

    async def _push(self, repository: Repository, subject: Descriptor, entries: list[IndexEntry]) -> tuple[Digest, str]:
        await repository.push_blob(EMPTY_CONFIG, EMPTY_CONFIG_DIGEST)
        index = SociIndex.v1(tuple(entries), subject)
        content = encode_index(index)
        pushed = await repository.push_manifest(content, OCI_MANIFEST, sha256_digest(content))
        if pushed.subject_handled:
            return pushed.digest, "referrers"
        descriptor = Descriptor(
            OCI_MANIFEST, pushed.digest, len(content), annotations=index.annotations, artifact_type=SOCI_INDEX_V1
        )
        await repository.attach_referrer_tag(subject.digest, descriptor)
        return pushed.digest, "tag"
