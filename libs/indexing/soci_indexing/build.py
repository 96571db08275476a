# SPDX-License-Identifier: Apache-2.0
"""A SOCI index of one image manifest: which layers get a zTOC, which have one already, and what is written where.

The same wish for the same manifest gives the same bytes, on every machine and in whatever order layers are done.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Final, Literal

from soci.build import DEFAULT_BUILD_TOOL, DEFAULT_SPAN_SIZE, Built
from soci.digest import Digest, sha256_digest
from soci.errors import InvalidInput, InvalidManifest, Mismatch, NotFound, NoZtoc, SociError
from soci.index import (
    BUILD_TOOL_ANNOTATION,
    EMPTY_CONFIG,
    EMPTY_CONFIG_DIGEST,
    PREFETCH_MEDIA_TYPE,
    IndexEntry,
    SociIndex,
    encode_index,
    prefetch_entry,
    ztoc_entry,
    ztoc_media_type,
)
from soci.oci import OCI_MANIFEST, Descriptor, Manifest, Platform, is_layer, layer_compression
from soci.ztoc import MAX_ZTOC_BYTES, Algorithm, Ztoc, parse_ztoc, xattrs
from soci_indexing.artifacts import Artifact, ArtifactsDb
from soci_indexing.pool import BuildPool
from soci_indexing.prefetch import Finder, Hit, LayerFiles, SpanRange, collect, encode_prefetch
from soci_indexing.stores import Content

DEFAULT_MIN_LAYER_SIZE: Final = 10 << 20
"""Bytes: smaller layers come faster whole."""
MAX_SIZE: Final = 2**63 - 1
"""The largest span size and smallest layer size that can be wished for: what fits the zTOC's fields."""
XATTR: Final = "xattr"
"""The optimization that says of layers without extended attributes that a mount need not answer for them."""
OPTIMIZATIONS: Final = frozenset({XATTR})

GC_CONFIG: Final = "containerd.io/gc.ref.content.config"
GC_ZTOC: Final = "containerd.io/gc.ref.content.ztoc."

_OPAQUE: Final = b".wh..wh..opq"


@dataclass(frozen=True, slots=True)
class IndexWish:
    """What kind of index. Sizes are in bytes. Raises `InvalidInput` for values that nobody can mean."""

    span_size: int = DEFAULT_SPAN_SIZE
    min_layer_size: int = DEFAULT_MIN_LAYER_SIZE
    build_tool: str = DEFAULT_BUILD_TOOL
    optimizations: frozenset[str] = frozenset()
    force: bool = False  # build zTOCs that are here already, too
    prefetch_files: tuple[str, ...] = ()
    version: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        for what, size in (("span size", self.span_size), ("minimal layer size", self.min_layer_size)):
            if not 0 <= size <= MAX_SIZE:
                raise InvalidInput(f"{what} {size}: from 0 to {MAX_SIZE} bytes")
        unknown = sorted(self.optimizations - OPTIMIZATIONS)
        if unknown:
            raise InvalidInput(
                f"unknown optimization {unknown[0][:100]!r}; there is {', '.join(sorted(OPTIMIZATIONS))}"
            )


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of one layer: built with ``algorithm``, or skipped and why."""

    layer: Descriptor
    algorithm: Algorithm | None
    skipped: str = ""


@dataclass(frozen=True, slots=True)
class LayerBegun:
    """A layer is being read."""

    layer: Descriptor


@dataclass(frozen=True, slots=True)
class LayerRead:
    """``count`` more bytes of a layer were read."""

    layer: Descriptor
    count: int


@dataclass(frozen=True, slots=True)
class LayerDone:
    """A layer has its zTOC, of ``ztoc_size`` bytes, newly built or from an earlier build; or it has none and why."""

    layer: Descriptor
    ztoc: Digest | None
    ztoc_size: int = 0
    reused: bool = False
    skipped: str = ""


@dataclass(frozen=True, slots=True)
class Noticed:
    """Something that is no error, and that the user should know."""

    message: str


Progress = LayerBegun | LayerRead | LayerDone | Noticed
Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class IndexResult:
    """The index that was written. ``skipped`` are the layers without zTOC, and why."""

    descriptor: Descriptor
    content: bytes
    entries: tuple[IndexEntry, ...]
    skipped: tuple[Plan, ...]
    prefetch: tuple[IndexEntry, ...] = ()


def ignore(_progress: Progress) -> None:
    """A report that tells nobody."""


def plan(layers: Sequence[Descriptor], min_layer_size: int) -> tuple[Plan, ...]:
    """Which layers get a zTOC. The media type alone decides how a layer is read, never its bytes.

    Prefetch lists among the layers are passed over. Raises `InvalidManifest` for what is no layer at all.
    """
    plans = []
    for layer in layers:
        if layer.media_type == PREFETCH_MEDIA_TYPE:
            continue
        if not is_layer(layer.media_type):
            raise InvalidManifest(f"{layer.digest} is not a layer but {layer.media_type[:100]!r}")
        if layer.size < min_layer_size:
            plans.append(Plan(layer, None, f"{layer.size} bytes, under the minimum of {min_layer_size}"))
            continue
        compression = layer_compression(layer.media_type)
        if compression is not None:
            plans.append(Plan(layer, compression))
        else:
            plans.append(Plan(layer, None, "no zTOC can be made of this type"))
    return tuple(plans)


def needs_no_xattrs(ztoc: Ztoc) -> bool:
    """Whether no member has an extended attribute, and no directory is opaque, which is told by one."""
    return not any(xattrs(entry) or entry.name.endswith(_OPAQUE) for entry in ztoc.entries)


async def build_index(  # noqa: PLR0913  one parameter each
    source: Content,
    target: Content,
    db: ArtifactsDb | None,
    pool: BuildPool,
    wish: IndexWish,
    *,
    subject: Descriptor,
    manifest: Manifest,
    image: Digest,
    platform: Platform | str,
    report: Report = ignore,
) -> IndexResult:
    """Index ``manifest`` (whose descriptor is ``subject``): layers from ``source``, artifacts into ``target``.

    ``image`` is the digest of what the image's name stands for. Blobs are stored before what names them; where the
    store has a collector, hold a lease. Raises `NoZtoc` where there would be none in the index, `InvalidManifest`
    for something that is no image, and what layers and stores raise, of several layers joined to one error.
    """
    plans = plan(manifest.layers, wish.min_layer_size)
    building = _Building(source, target, db, pool, wish, report)
    done = await building.layers(plans)
    skipped = tuple(one for one in plans if one.skipped)
    if not done:
        why = "; ".join(f"layer {one.layer.digest}: {one.skipped}" for one in skipped) or "there are no layers"
        raise NoZtoc(f"no zTOC for any layer of {subject.digest}: {why}")
    lists = await building.prefetch(done)
    entries = tuple(one.entry for one in done)
    index = SociIndex(
        wish.version,
        entries,
        subject if wish.version == 1 else None,
        {BUILD_TOOL_ANNOTATION: wish.build_tool},
        lists,
    )
    content = encode_index(index)
    found = Descriptor(OCI_MANIFEST, sha256_digest(content), len(content), artifact_type=index.artifact_type)
    config = Descriptor(index.artifact_type, EMPTY_CONFIG_DIGEST, len(EMPTY_CONFIG))
    await target.push(config, EMPTY_CONFIG)
    await target.push(found, content, gc_labels(index))
    if db is not None:
        made = Artifact(
            found.digest,
            "soci_index",
            subject.digest,
            image_digest=image,
            platform=str(platform),
            location=subject.digest,
            media_type=found.media_type,
            artifact_type=index.artifact_type,
            size=found.size,
        )
        await asyncio.to_thread(db.put, made)
    return IndexResult(found, content, entries, skipped, lists)


def gc_labels(index: SociIndex) -> dict[str, str]:
    """What makes containerd's collector keep an index's blobs with it."""
    blobs = [entry.ztoc.digest for entry in index.layers + index.prefetch]
    return {GC_CONFIG: EMPTY_CONFIG_DIGEST, **{f"{GC_ZTOC}{at}": digest for at, digest in enumerate(blobs)}}


@dataclass(frozen=True, slots=True)
class _Done:
    entry: IndexEntry
    files: LayerFiles | None  # where names are to be looked up


@dataclass(frozen=True, slots=True)
class _Building:
    """One index in the making."""

    source: Content
    target: Content
    db: ArtifactsDb | None
    pool: BuildPool
    wish: IndexWish
    report: Report

    async def layers(self, plans: Sequence[Plan]) -> list[_Done]:
        """Every planned layer, in the image's order; all are tried before one's error is raised."""
        # An image may have a layer twice: it is read once, and is in the index twice.
        async with asyncio.TaskGroup() as group:
            tasks = {
                one.layer.digest: group.create_task(self._tried(one))
                for one in {one.layer.digest: one for one in plans}.values()
            }
        results = [tasks[one.layer.digest].result() for one in plans]
        errors = [done for task in tasks.values() if isinstance(done := task.result(), SociError)]
        if errors:
            raise _joined(errors)
        return [one for one in results if isinstance(one, _Done)]

    async def _tried(self, one: Plan) -> _Done | SociError | None:
        if one.algorithm is None:
            self.report(LayerDone(one.layer, None, skipped=one.skipped))
            return None
        try:
            return await self._reused(one.layer) or await self._built(one.layer, one.algorithm)
        except SociError as error:
            named = str(error) if str(error).startswith("layer ") else f"layer {one.layer.digest}: {error}"
            return type(error)(named).with_traceback(error.__traceback__)

    async def _reused(self, layer: Descriptor) -> _Done | None:
        """The zTOC of an earlier build; None where there is none whose blob is still here."""
        if self.wish.force or self.db is None:
            return None
        for known in await asyncio.to_thread(self.db.ztocs_of, layer.digest, self.wish.span_size):
            try:
                content = await self.target.read(known.digest, limit=MAX_ZTOC_BYTES)
            except NotFound:
                continue
            except Mismatch:
                await self.target.delete(known.digest)
                continue
            descriptor = Descriptor(ztoc_media_type(layer.media_type), known.digest, len(content))
            await self.target.push(descriptor, content)  # not new, but now in our lease
            ztoc = await asyncio.to_thread(parse_ztoc, content) if self._looks_inside() else None
            self.report(LayerDone(layer, known.digest, len(content), reused=True))
            return self._done(layer, descriptor, ztoc)
        return None

    async def _built(self, layer: Descriptor, algorithm: Algorithm) -> _Done:
        async with aclosing(self._counted(layer)) as chunks:
            built = await self.pool.build(chunks, algorithm, self.wish.span_size, self.wish.build_tool)
        _check_layer(layer, built)
        descriptor = Descriptor(
            ztoc_media_type(layer.media_type), sha256_digest(built.ztoc_bytes), len(built.ztoc_bytes)
        )
        await self.target.push(descriptor, built.ztoc_bytes)
        if self.db is not None:
            made = Artifact(
                descriptor.digest,
                "soci_layer",
                layer.digest,
                location=layer.digest,
                media_type=descriptor.media_type,
                size=descriptor.size,
                span_size=self.wish.span_size,
            )
            await asyncio.to_thread(self.db.put, made)
        self.report(LayerDone(layer, descriptor.digest, descriptor.size))
        return self._done(layer, descriptor, built.ztoc)

    def _done(self, layer: Descriptor, descriptor: Descriptor, ztoc: Ztoc | None) -> _Done:
        quiet = XATTR in self.wish.optimizations and ztoc is not None and needs_no_xattrs(ztoc)
        entry = ztoc_entry(layer, descriptor.digest, descriptor.size, self.wish.span_size, disable_xattrs=quiet)
        names = ztoc is not None and self.wish.prefetch_files
        return _Done(entry, LayerFiles.of(layer.digest, ztoc) if names and ztoc is not None else None)

    def _looks_inside(self) -> bool:
        return bool(self.wish.prefetch_files) or XATTR in self.wish.optimizations

    async def _counted(self, layer: Descriptor) -> AsyncGenerator[bytes, None]:
        self.report(LayerBegun(layer))
        async with aclosing(self.source.stream(layer.digest)) as chunks:
            async for chunk in chunks:
                self.report(LayerRead(layer, len(chunk)))
                yield chunk

    async def prefetch(self, done: Sequence[_Done]) -> tuple[IndexEntry, ...]:
        """A list for each layer that has one of the wished files; names that are not there are noticed only."""
        if not self.wish.prefetch_files:
            return ()
        hits = await asyncio.to_thread(self._hits, [one.files for one in done if one.files is not None])
        ranges = collect(hits)
        # One layer may be in an image twice; its list is the same both times.
        layers = dict.fromkeys(one.entry.layer for one in done if one.entry.layer in ranges)
        return tuple([await self._list(layer, ranges[layer]) for layer in layers])

    def _hits(self, files: list[LayerFiles]) -> list[Hit]:
        finder, hits = Finder(files), []
        for name in self.wish.prefetch_files:
            try:
                hits.append(finder.find(name))
            except InvalidInput as error:
                self.report(Noticed(str(error)))
        return hits

    async def _list(self, layer: Digest, ranges: tuple[SpanRange, ...]) -> IndexEntry:
        content = encode_prefetch(ranges)
        entry = prefetch_entry(layer, sha256_digest(content), len(content))
        await self.target.push(replace(entry.ztoc, annotations={}), content)
        if self.db is not None:
            made = Artifact(
                entry.ztoc.digest,
                "soci_prefetch",
                layer,
                location=layer,
                media_type=PREFETCH_MEDIA_TYPE,
                size=entry.ztoc.size,
            )
            await asyncio.to_thread(self.db.put, made)
        return entry


def _check_layer(layer: Descriptor, built: Built) -> None:
    if built.layer_size != layer.size:
        raise Mismatch(f"layer {layer.digest} has {built.layer_size} bytes, not {layer.size}")
    if built.layer != layer.digest and layer.digest.startswith("sha256:"):
        raise Mismatch(f"layer {layer.digest} came as {built.layer}")


def _joined(errors: Sequence[SociError]) -> SociError:
    """One error that tells all; of the first one's class."""
    if len(errors) == 1:
        return errors[0]
    return type(errors[0])("; ".join(str(error) for error in errors))
