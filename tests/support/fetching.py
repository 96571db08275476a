# SPDX-License-Identifier: Apache-2.0
"""A fetcher's parts over a real registry and a span cache of their own."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soci.digest import Digest, sha256_digest
from soci.index import INDEX_DIGEST_ANNOTATION, SociIndex, encode_index, ztoc_entry
from soci.launch import LaunchId, TraceParent
from soci.oci import OCI_MANIFEST, Descriptor
from soci_bus.asks import FetchSpans, SpansFetched
from soci_bus.events import Event
from soci_bus.face import Context
from soci_cache import LayerStore
from soci_dev import image
from soci_dev.tarball import member
from soci_fetcher.layers import LayerFetcher
from soci_fetcher.links import Links
from soci_fetcher.quiet import Quiet
from soci_fetcher.source import RegistrySource
from soci_fetcher.spans import SpanFetcher
from soci_registry import NoCredentials, Registry, RegistrySettings
from soci_runtime.flights import Flights
from support.bus import LAUNCH, LIMIT
from support.images import noise
from support.mounter_layers import Made

PATIENCE = RegistrySettings(range_deadline=20.0, range_max_wait=0.1, max_wait=0.1)
CONTEXT = Context(TraceParent(LaunchId(LAUNCH), "1" * 16), LIMIT)
GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"


@dataclass
class Fetching:
    """One fetcher process's worth."""

    registry: Registry
    store: LayerStore
    spans: SpanFetcher
    layers: LayerFetcher
    scratch: Path
    events: list[Event] = field(default_factory=list)
    quiet: Quiet | None = None

    def told(self, kind: type[Event]) -> list[Any]:
        """The events of a class."""
        return [event for event in self.events if isinstance(event, kind)]


@asynccontextmanager
async def fetching(cache: Path, *, attempts: int = 3, settings: RegistrySettings = PATIENCE) -> AsyncIterator[Fetching]:
    """A fetcher on this cache."""
    events: list[Event] = []
    store = LayerStore(cache)
    async with Registry(settings=settings, credentials=NoCredentials()) as registry, Flights() as flights:
        quiet = Quiet(cache)
        source = RegistrySource(registry, Links())
        spans = SpanFetcher(store, source, events.append, flights, attempts=attempts, quiet=quiet, seen=source.seen)
        layers = LayerFetcher(store, registry, events.append, cache / "whole")
        try:
            yield Fetching(registry, store, spans, layers, cache / "whole", events, quiet)
        finally:
            spans.close()
            quiet.close()


async def push_layer(host: str, made: Made, *, blob: bytes | None = None) -> str:
    """Put a layer and its zTOC into a new repository; returns its name without the host."""
    name = "t/" + secrets.token_hex(6)
    async with Registry(settings=PATIENCE, credentials=NoCredentials()) as registry:
        repository = registry.repository(f"{host}/{name}:1")
        await repository.push_blob(made.blob if blob is None else blob)
        await repository.push_blob(made.ztoc_bytes)
    return name


def spans_of(reference: str, made: Made, first: int, last: int, why: str = "miss") -> FetchSpans:
    """The ask for spans ``first``..``last``."""
    return FetchSpans(reference, made.layer, made.ztoc_digest, first, last, why)


def check(store: LayerStore, made: Made) -> list[int]:
    """The spans that are here; each must have its bytes."""
    with store.read(made.layer, made.ztoc_digest) as reader:
        here = [span for span in range(reader.spans.count) if reader.present(span)]
        for span in here:
            start, end = reader.spans.uncompressed(span)
            assert reader.pread(end - start, start) == made.tar[start:end], f"span {span} is wrong"
        return here


async def whole(fetcher: Fetching, reference: str, made: Made) -> SpansFetched:
    """Fetch every span."""
    last = len(made.ztoc.span_digests) - 1
    return await fetcher.spans.fetch(spans_of(reference, made, 0, last), CONTEXT)


def small_image(folder: Path, *, layers: int = 2, gzip: bool = True) -> image.Image:
    """An image that no other test has."""
    seed = secrets.randbelow(1 << 30)
    made = [
        image.add_layer(folder, [member(f"file-{n}", content=noise(seed + n, 300_000))], gzip=gzip)
        for n in range(layers)
    ]
    return image.write_image(folder, made)


async def push_index(registry: Registry, reference: str, built: image.Image, version: int, ztoc: bytes) -> Digest:
    """An index of either version that gives ``ztoc`` for the image's first layer, under its digest alone."""
    repository = registry.repository(reference)
    first = built.manifest["layers"][0]
    await repository.push_blob(b"{}")
    await repository.push_blob(ztoc)
    layer = Descriptor(first["mediaType"], first["digest"], first["size"])
    entries = (ztoc_entry(layer, sha256_digest(ztoc), len(ztoc), 1 << 22),)
    subject = Descriptor(OCI_MANIFEST, Digest(built.digest), len(manifest_bytes(built)))
    index = SociIndex.v1(entries, subject) if version == 1 else SociIndex.v2(entries)
    content = encode_index(index)
    pushed = await repository.push_manifest(content, OCI_MANIFEST, sha256_digest(content))
    return pushed.digest


def manifest_bytes(built: image.Image) -> bytes:
    """The image's manifest as it is in the registry."""
    return (built.folder / "blobs" / "sha256" / built.digest.removeprefix("sha256:")).read_bytes()


async def push_annotated(registry: Registry, reference: str, built: image.Image, index: str) -> Digest:
    """The image's manifest with the annotation that names a SOCI index; returns its digest."""
    content: Mapping[str, Any] = {**built.manifest, "annotations": {INDEX_DIGEST_ANNOTATION: index}}
    pushed = await registry.repository(reference).push_manifest(json.dumps(content).encode(), OCI_MANIFEST)
    return pushed.digest
