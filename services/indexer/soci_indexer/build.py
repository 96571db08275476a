# SPDX-License-Identifier: Apache-2.0
"""Jobs to indexes: each layer streamed once from the registry through the zTOC builder, nothing of it kept on disk.

What an index holds is decided in `soci_indexing.build`, the same for this service and the command line; here it gets
a repository to read from and write to, and its progress becomes events.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from soci.digest import Digest
from soci.errors import InvalidManifest
from soci.index import INDEX_DIGEST_ANNOTATION, SOCI_INDEX_V1
from soci.oci import (
    DOCKER_CONFIG,
    OCI_CONFIG,
    Descriptor,
    Manifest,
    choose_platform,
    is_layer,
    parse_manifest,
    parse_platform,
)
from soci.reference import parse_reference
from soci_bus.asks import BuildIndex, IndexBuilt, IndexedLayer
from soci_bus.events import Event, LayerIndexed
from soci_indexing.build import IndexWish, LayerBegun, LayerDone, Progress, build_index, plan
from soci_indexing.pool import BuildPool
from soci_registry import Registry, Repository
from soci_registry.content import RegistryContent


class IndexBuilder:
    """Builds and pushes one index at a time, several of its layers side by side in ``pool``."""

    def __init__(self, registry: Registry, pool: BuildPool, publish: Callable[[Event], None]) -> None:
        self._registry = registry
        self._pool = pool
        self._publish = publish

    async def build(self, job: BuildIndex, job_id: str) -> IndexBuilt:
        """Index the image's manifest for the platform; push zTOCs, index and, where needed, the fallback tag.

        Raises `NoZtoc` when no layer can be indexed, and what registry and layers raise.
        """
        repository = self._registry.repository(job.image)
        subject, manifest = await self._manifest(repository, job)
        wish = IndexWish(job.span_size, job.min_layer_size)
        layers = [one.layer.digest for one in plan(manifest.layers, wish.min_layer_size)]
        content = RegistryContent(repository)
        made = await build_index(
            content,
            content,
            None,
            self._pool,
            wish,
            subject=subject,
            manifest=manifest,
            image=subject.digest,
            platform=job.platform,
            report=_Events(self._publish, job_id, layers).report,
        )
        return IndexBuilt(
            made.descriptor.digest,
            subject.digest,
            tuple(IndexedLayer(entry.layer, entry.ztoc.digest, entry.ztoc.size) for entry in made.entries),
            tuple((one.layer.digest, one.skipped) for one in made.skipped),
            content.listed[made.descriptor.digest],
        )

    async def needless(self, job: BuildIndex) -> str:
        """Why nobody needs this index, or nothing: for jobs that nobody asked for, but a registry's notification.

        A push may have been of anything in a manifest's clothes, the index that we pushed ourselves among it.
        """
        repository = self._registry.repository(job.image)
        subject, manifest = await self._manifest(repository, job)
        if manifest.config.media_type not in (OCI_CONFIG, DOCKER_CONFIG):
            return f"it is no image: its config is {manifest.config.media_type[:100]}"
        if not all(is_layer(layer.media_type) for layer in manifest.layers):
            return "it is no image: it has other things than layers"
        if INDEX_DIGEST_ANNOTATION in manifest.annotations:
            return "it names its SOCI index itself"
        if all(one.skipped for one in plan(manifest.layers, job.min_layer_size)):
            return "none of its layers would get a zTOC"
        if await repository.referrers(subject.digest, SOCI_INDEX_V1):
            return "it has a SOCI index already"
        return ""

    async def _manifest(self, repository: Repository, job: BuildIndex) -> tuple[Descriptor, Manifest]:
        """The platform's image manifest, and the descriptor by which an index refers to it."""
        reference = parse_reference(job.image)
        fetched = await repository.manifest(reference.target)
        parsed = parse_manifest(fetched.content)
        if not isinstance(parsed, Manifest):
            chosen = choose_platform(parsed, parse_platform(job.platform))
            fetched = await repository.manifest(chosen.digest)
            parsed = parse_manifest(fetched.content)
        if not isinstance(parsed, Manifest):
            raise InvalidManifest(f"{job.image}: an image index inside an image index")
        return Descriptor(fetched.media_type, fetched.digest, len(fetched.content)), parsed


class _Events:
    """Progress as events: one of each layer, in the image's order, whichever is done first."""

    def __init__(self, publish: Callable[[Event], None], job_id: str, layers: list[Digest]) -> None:
        self._publish = publish
        self._job_id = job_id
        self._order = list(dict.fromkeys(layers))
        self._begun: dict[Digest, float] = {}
        self._done: dict[Digest, LayerIndexed] = {}

    def report(self, progress: Progress) -> None:
        """A `soci_indexing.build.Report`."""
        match progress:
            case LayerBegun(layer):
                self._begun[layer.digest] = time.monotonic()
            case LayerDone(layer):
                now = time.monotonic()
                self._done[layer.digest] = LayerIndexed(
                    self._job_id,
                    layer.digest,
                    progress.ztoc,
                    progress.ztoc_size,
                    layer.size,
                    progress.skipped,
                    now - self._begun.get(layer.digest, now),
                )
        while self._order and self._order[0] in self._done:
            self._publish(self._done.pop(self._order.pop(0)))
