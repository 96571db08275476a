# SPDX-License-Identifier: Apache-2.0
"""The SOCI index: which zTOC belongs to which layer of an image.

It is an OCI image manifest whose config's media type says that it is a SOCI index. Version 1 names its image by
``subject`` and is found through the registry's referrers; version 2 has no subject, for the image names *it*, in an
annotation of the image's manifest. An index is known by its digest, so `encode_index` writes exact bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from soci.digest import Digest, parse_digest, sha256_digest
from soci.errors import InvalidDigest, InvalidManifest, NoZtoc
from soci.oci import EMPTY_JSON, OCI_MANIFEST, Descriptor, Manifest, encode_manifest, layer_compression, parse_manifest

SOCI_INDEX_V1: Final = "application/vnd.amazon.soci.index.v1+json"
SOCI_INDEX_V2: Final = "application/vnd.amazon.soci.index.v2+json"
ZTOC_MEDIA_TYPE: Final = "application/octet-stream"
SOCIABLE_ZTOC_MEDIA_TYPE: Final = "application/vnd.sociable.ztoc.v1"
"""The type of a zstd layer's zTOC, which this project alone understands: other readers leave its entry out."""
PREFETCH_MEDIA_TYPE: Final = "application/vnd.amazon.soci.prefetch.v1+json"

ZTOC_MEDIA_TYPES: Final = frozenset({ZTOC_MEDIA_TYPE, SOCIABLE_ZTOC_MEDIA_TYPE})

BUILD_TOOL_ANNOTATION: Final = "com.amazon.soci.build-tool-identifier"
"""Annotation of the index: the tool that made it."""
LAYER_DIGEST_ANNOTATION: Final = "com.amazon.soci.image-layer-digest"
"""Annotation of a zTOC's and a prefetch list's descriptor: the layer blob it is for."""
LAYER_MEDIA_TYPE_ANNOTATION: Final = "com.amazon.soci.image-layer-mediaType"
SPAN_SIZE_ANNOTATION: Final = "com.amazon.soci.span-size"
DISABLE_XATTRS_ANNOTATION: Final = "com.amazon.soci.disable-xattrs"
"""Annotation of a zTOC's descriptor, ``true`` where no member has an extended attribute or opaque marker."""
INDEX_DIGEST_ANNOTATION: Final = "com.amazon.soci.index-digest"
"""Annotation of an image manifest, and of its descriptor: its SOCI index version 2."""
IMAGE_MANIFEST_DIGEST_ANNOTATION: Final = "com.amazon.soci.image-manifest-digest"
"""Annotation of a SOCI index's descriptor in an image index: the image manifest it is for."""

EMPTY_CONFIG: Final = EMPTY_JSON
"""The content of every SOCI index's config: its media type says it all."""
EMPTY_CONFIG_DIGEST: Final = sha256_digest(EMPTY_CONFIG)

DEFAULT_BUILD_TOOL: Final = "AWS SOCI CLI v0.2"
"""The identifier that indexes and zTOCs carry. Their digests depend on it: with this one they are the reference's."""

_TYPES: Final[Mapping[int, str]] = {1: SOCI_INDEX_V1, 2: SOCI_INDEX_V2}
_TRUE: Final = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_SPAN_SIZE: Final = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """A layer and the blob that the index has for it: its zTOC, or its list of spans to fetch ahead."""

    layer: Digest  # of the layer blob as the image manifest has it
    ztoc: Descriptor

    @property
    def span_size(self) -> int | None:
        """Bytes between checkpoints as configured when the zTOC was built; None where the index does not say."""
        text = self.ztoc.annotations.get(SPAN_SIZE_ANNOTATION, "")
        return int(text) if _SPAN_SIZE.fullmatch(text) else None

    @property
    def disable_xattrs(self) -> bool:
        """Whether the layer has no extended attribute and no opaque directory, so that a mount need not answer."""
        return self.ztoc.annotations.get(DISABLE_XATTRS_ANNOTATION) in _TRUE


def ztoc_entry(
    layer: Descriptor, ztoc: Digest, size: int, span_size: int, *, disable_xattrs: bool = False
) -> IndexEntry:
    """The entry of an index for ``layer``, whose zTOC has ``size`` bytes and was built with ``span_size``."""
    annotations = {
        LAYER_DIGEST_ANNOTATION: str(layer.digest),
        LAYER_MEDIA_TYPE_ANNOTATION: layer.media_type,
        SPAN_SIZE_ANNOTATION: str(span_size),
    }
    if disable_xattrs:
        annotations[DISABLE_XATTRS_ANNOTATION] = "true"
    return IndexEntry(layer.digest, Descriptor(ztoc_media_type(layer.media_type), ztoc, size, annotations))


def ztoc_media_type(layer_media_type: str) -> str:
    """The media type of the zTOC of a layer of the given type."""
    return SOCIABLE_ZTOC_MEDIA_TYPE if layer_compression(layer_media_type) == "zstd" else ZTOC_MEDIA_TYPE


def prefetch_entry(layer: Digest, prefetch: Digest, size: int) -> IndexEntry:
    """The entry for a layer's list of spans to fetch ahead, of ``size`` bytes."""
    return IndexEntry(layer, Descriptor(PREFETCH_MEDIA_TYPE, prefetch, size, {LAYER_DIGEST_ANNOTATION: str(layer)}))


def _default_annotations() -> dict[str, str]:
    return {BUILD_TOOL_ANNOTATION: DEFAULT_BUILD_TOOL}


@dataclass(frozen=True, slots=True)
class SociIndex:
    """A SOCI index. ``layers`` are in the image's order; a layer without a zTOC leaves no gap."""

    version: Literal[1, 2]
    layers: tuple[IndexEntry, ...]
    subject: Descriptor | None = None  # version 1: the image's manifest (never an image index)
    annotations: Mapping[str, str] = field(default_factory=_default_annotations)
    prefetch: tuple[IndexEntry, ...] = ()

    @classmethod
    def v1(cls, layers: tuple[IndexEntry, ...], subject: Descriptor) -> SociIndex:
        """An index that the registry's referrers of ``subject``, the image's manifest, will list."""
        return cls(1, layers, subject)

    @classmethod
    def v2(cls, layers: tuple[IndexEntry, ...]) -> SociIndex:
        """An index that the image's own manifest will name."""
        return cls(2, layers)

    @property
    def artifact_type(self) -> str:
        """The media type by which registries list this index."""
        return _TYPES[self.version]

    def find(self, layer: Digest) -> IndexEntry | None:
        """The zTOC of ``layer`` or None. Of several the last counts, as other readers have it."""
        return next((entry for entry in reversed(self.layers) if entry.layer == layer), None)

    def of_layer(self, layer: Digest) -> IndexEntry:
        """As `find`, but raises `NoZtoc`."""
        entry = self.find(layer)
        if entry is None:
            raise NoZtoc(f"the SOCI index has no zTOC for layer {layer}")
        return entry


def encode_index(index: SociIndex) -> bytes:
    """The exact bytes of ``index``.

    Raises `InvalidManifest` where there is no zTOC at all, and where a version 1 lacks the subject by which alone it
    can be found, or a version 2 has one.
    """
    if not index.layers:
        raise InvalidManifest("a SOCI index without a zTOC: every layer is too small or of an unsupported type")
    if (index.version == 1) != (index.subject is not None):
        raise InvalidManifest(
            f"a SOCI index version {index.version} {'without' if index.version == 1 else 'with'} subject"
        )
    subject = index.subject and Descriptor(index.subject.media_type, index.subject.digest, index.subject.size)
    layers = [entry.ztoc for entry in index.layers + index.prefetch]
    config = Descriptor(index.artifact_type, EMPTY_CONFIG_DIGEST, len(EMPTY_CONFIG))
    return encode_manifest(Manifest(OCI_MANIFEST, config, tuple(layers), subject, index.annotations))


def parse_index(data: bytes) -> SociIndex:
    """A SOCI index of either version; raises `InvalidManifest` for any other document.

    Entries of unknown types and zTOCs that name no layer are left out: nothing could ask for them.
    """
    manifest = parse_manifest(data)
    if not isinstance(manifest, Manifest):
        raise InvalidManifest("not a SOCI index but an image index")
    versions: dict[str, Literal[1, 2]] = {SOCI_INDEX_V1: 1, SOCI_INDEX_V2: 2}
    version = versions.get(manifest.config.media_type)
    if version is None:
        raise InvalidManifest(f"not a SOCI index: config of type {manifest.config.media_type[:100]!r}")
    named = [IndexEntry(layer, entry) for entry in manifest.layers if (layer := _layer_of(entry)) is not None]
    return SociIndex(
        version,
        tuple(entry for entry in named if entry.ztoc.media_type in ZTOC_MEDIA_TYPES),
        manifest.subject,
        manifest.annotations,
        tuple(entry for entry in named if entry.ztoc.media_type == PREFETCH_MEDIA_TYPE),
    )


def _layer_of(descriptor: Descriptor) -> Digest | None:
    text = descriptor.annotations.get(LAYER_DIGEST_ANNOTATION)
    if text is None:
        return None
    try:
        return parse_digest(text)
    except InvalidDigest as error:
        raise InvalidManifest(f"SOCI index: {LAYER_DIGEST_ANNOTATION}: {error}") from error
