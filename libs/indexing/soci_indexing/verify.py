# SPDX-License-Identifier: Apache-2.0
"""Is a SOCI index right? Somebody else's word against the layers themselves.

A container sees names, modes and sizes as the index's tables say, and a zTOC's span digests tie compressed bytes to
places, not to files. Whoever may push an index is therefore trusted with the metadata, unless it is proved: each
layer is streamed once and everything that the index says of it is compared with what the layer says itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Final

from soci.digest import Digest
from soci.errors import InvalidInput, InvalidManifest, InvalidZtoc, LimitExceeded, Mismatch, NotFound
from soci.index import LAYER_DIGEST_ANNOTATION, LAYER_MEDIA_TYPE_ANNOTATION, IndexEntry, SociIndex, parse_index
from soci.oci import (
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    Descriptor,
    Manifest,
    layer_compression,
    parse_config,
    parse_manifest,
)
from soci.span import Spans
from soci.toc import MAX_ZTOC_BYTES, Ztoc
from soci.ztoc import parse_ztoc, xattrs
from soci_indexing.compare import shown
from soci_indexing.prefetch import MAX_PREFETCH_BYTES, parse_prefetch
from soci_indexing.proof import Defect, Defects, LayerProof
from soci_indexing.stores import Content

FEED_BYTES: Final = 1 << 20
"""Bytes of a layer that are looked at in one go of a thread."""
_OPAQUE: Final = b".wh..wh..opq"


@dataclass(frozen=True, slots=True)
class LayerVerdict:
    """What was found of one layer. ``ztoc`` None: the index has none for it, which is no defect."""

    layer: Descriptor
    ztoc: Descriptor | None
    algorithm: str = ""
    spans: int = 0
    members: int = 0
    defects: tuple[Defect, ...] = ()
    more: int = 0  # defects that are only counted


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found of the index. ``defects`` are those of the index itself; each layer has its own."""

    index: Digest
    version: int  # 0: it is no SOCI index
    layers: tuple[LayerVerdict, ...]
    defects: tuple[Defect, ...]

    @property
    def proven(self) -> bool:
        """Whether nothing is wrong."""
        return not self.defects and not any(layer.defects for layer in self.layers)

    @property
    def all_defects(self) -> list[Defect]:
        """The index's first, then layer by layer."""
        return [*self.defects, *(defect for layer in self.layers for defect in layer.defects)]


@dataclass(slots=True)
class _Facts:
    """What the image says of a layer, and the index."""

    layer: Descriptor
    diff_id: Digest | None
    entries: list[IndexEntry] = field(default_factory=list)


async def verify_index(
    content: Content,
    subject: Descriptor,
    manifest: Manifest,
    index: Digest,
    report: Callable[[LayerVerdict], None] = lambda _: None,
) -> Verdict:
    """Prove ``index`` for image ``manifest``, whose descriptor is ``subject``; ``report`` hears of each layer at once.

    Everything is read from ``content``, layers as streams, once each. What is wrong with index, zTOCs and layers is in
    the verdict; raises only where something cannot be read at all: what ``content`` raises, but for `Mismatch`.
    """
    defects = Defects(None)
    try:
        raw = await content.read(index, limit=MAX_MANIFEST_BYTES)
        found = parse_index(raw)
    except (InvalidManifest, Mismatch, LimitExceeded) as error:
        defects.add("index", error)
        return Verdict(index, 0, (), tuple(defects.found))
    _check_index(raw, found, subject, defects)
    facts = {
        layer.digest: _Facts(layer, diff_id)
        for layer, diff_id in zip(manifest.layers, await _diff_ids(content, manifest, defects), strict=True)
    }
    for entry in found.layers:
        if entry.layer in facts:
            facts[entry.layer].entries.append(entry)
        else:
            defects.add("index", f"names layer {entry.layer}, which the image does not have")
    verdicts = []
    counts: dict[Digest, int] = {}
    for fact in facts.values():
        verdict = await _verify_layer(content, fact)
        counts[fact.layer.digest] = verdict.spans
        verdicts.append(verdict)
        report(verdict)
    for entry in found.prefetch:
        await _check_prefetch(content, entry, counts.get(entry.layer, 0), defects)
    return Verdict(index, found.version, tuple(verdicts), tuple(defects.found))


def _check_index(raw: bytes, index: SociIndex, subject: Descriptor, defects: Defects) -> None:
    said = index.subject
    if index.version == 1 and said is None:
        defects.add("index", "version 1 without a subject: no image can have it")
    if said is not None and said.digest != subject.digest:
        defects.add("index", f"is for manifest {said.digest}, the image's is {subject.digest}")
    elif said is not None and (said.size, said.media_type) != (subject.size, subject.media_type):
        defects.add(
            "index",
            f"says that its subject is {said.media_type} of {said.size} bytes; "
            f"it is {subject.media_type} of {subject.size}",
        )
    if not index.layers:
        defects.add("index", "has no zTOC")
    document = parse_manifest(raw)
    for number, entry in enumerate(document.layers if isinstance(document, Manifest) else ()):
        if LAYER_DIGEST_ANNOTATION not in entry.annotations:
            defects.add("index", f"blob {number}, {entry.digest}, does not say which layer it is for")


async def _diff_ids(content: Content, manifest: Manifest, defects: Defects) -> tuple[Digest | None, ...]:
    """Of each layer what the config says; None for all of them where it cannot be read."""
    try:
        diff_ids = parse_config(await content.read(manifest.config.digest, limit=MAX_CONFIG_BYTES)).diff_ids
        if len(diff_ids) == len(manifest.layers):
            return diff_ids
        defects.add("config", f"has {len(diff_ids)} diff_ids for {len(manifest.layers)} layers")
    except (InvalidManifest, Mismatch, LimitExceeded, NotFound) as error:
        defects.add("config", error)
    return (None,) * len(manifest.layers)


async def _verify_layer(content: Content, fact: _Facts) -> LayerVerdict:
    if not fact.entries:
        return LayerVerdict(fact.layer, None)
    entry = fact.entries[-1]  # the one that counts where there are several
    defects = Defects(fact.layer.digest)
    for other in fact.entries:
        if other.ztoc.digest != entry.ztoc.digest:
            defects.add("index", f"has two zTOCs for it, {other.ztoc.digest} and {entry.ztoc.digest}")
    said = entry.ztoc.annotations.get(LAYER_MEDIA_TYPE_ANNOTATION)
    if said is not None and said != fact.layer.media_type:
        defects.add("index", f"says that it is {said}, the manifest {fact.layer.media_type}")
    ztoc = await _ztoc(content, entry.ztoc, defects)
    if ztoc is None:
        return LayerVerdict(fact.layer, entry.ztoc, defects=tuple(defects.found))
    try:
        spans = Spans.of(ztoc)
    except InvalidZtoc as error:
        defects.add("zTOC", error)
        return LayerVerdict(fact.layer, entry.ztoc, ztoc.algorithm, defects=tuple(defects.found))
    _check_claims(fact.layer, entry, ztoc, defects)
    await _prove(content, LayerProof(fact.layer, ztoc, spans, fact.diff_id, defects), fact.layer.digest, defects)
    return LayerVerdict(
        fact.layer, entry.ztoc, ztoc.algorithm, spans.count, len(ztoc.entries), tuple(defects.found), defects.more
    )


async def _ztoc(content: Content, descriptor: Descriptor, defects: Defects) -> Ztoc | None:
    if descriptor.size > MAX_ZTOC_BYTES:
        defects.add("zTOC", f"{descriptor.digest} has {descriptor.size} bytes; at most {MAX_ZTOC_BYTES} are allowed")
        return None
    try:
        blob = await content.read(descriptor.digest, limit=descriptor.size)
        if len(blob) != descriptor.size:
            raise Mismatch(f"{descriptor.digest} has {len(blob)} bytes, the index says {descriptor.size}")
        return await asyncio.to_thread(parse_ztoc, blob)
    except NotFound:
        defects.add("zTOC", f"{descriptor.digest} is not there")
    except (InvalidInput, Mismatch, LimitExceeded) as error:
        defects.add("zTOC", error)
    return None


def _check_claims(layer: Descriptor, entry: IndexEntry, ztoc: Ztoc, defects: Defects) -> None:
    compression = layer_compression(layer.media_type)
    if ztoc.algorithm != compression:
        defects.add("zTOC", f"is of {ztoc.algorithm}, the layer's type is {layer.media_type}")
    if ztoc.compressed_size != layer.size:
        defects.add("zTOC", f"is for a layer of {ztoc.compressed_size} bytes; this one has {layer.size}")
    if entry.disable_xattrs:
        for member in ztoc.entries:
            if xattrs(member) or member.name.endswith(_OPAQUE):
                defects.add(f"path {shown(member.name)}", "has an extended attribute, the index says that none has")


async def _prove(content: Content, proof: LayerProof, layer: Digest, defects: Defects) -> None:
    try:
        waiting = bytearray()
        # What a wrong digest leaves of the layer is looked at too: it says what is wrong with it.
        with suppress(Mismatch):
            async with aclosing(content.stream(layer)) as chunks:
                async for chunk in chunks:
                    waiting += chunk
                    if len(waiting) >= FEED_BYTES:
                        piece, waiting = bytes(waiting), bytearray()
                        await asyncio.to_thread(proof.feed, piece)
                        if proof.hopeless:
                            return
        await asyncio.to_thread(proof.feed, bytes(waiting))
        await asyncio.to_thread(proof.finish)
    except NotFound:
        defects.add("layer", "is not there")
    finally:
        proof.close()


async def _check_prefetch(content: Content, entry: IndexEntry, spans: int, defects: Defects) -> None:
    where = f"prefetch list {entry.ztoc.digest}"
    try:
        ranges = parse_prefetch(await content.read(entry.ztoc.digest, limit=MAX_PREFETCH_BYTES))
    except (InvalidManifest, Mismatch, LimitExceeded, NotFound) as error:
        defects.add(where, error)
        return
    # A list may end one behind the last span: builders count the byte behind a file's last one.
    last = max(one.end for one in ranges)
    if last > spans or any(one.start >= spans for one in ranges):
        defects.add(where, f"goes up to span {last} of layer {entry.layer}, which has {spans}")
