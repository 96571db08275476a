# SPDX-License-Identifier: Apache-2.0
"""Image documents changed without loss: a converted image's digests depend on every byte of them.

The documents are handled as JSON objects, not as the values of `soci.oci`, so that members nobody here knows survive.
Known members come first, in the canonical order of the OCI image-spec's Go types, those that are optional and empty
left out; unknown members follow in their own order. A document without unknown members therefore becomes exactly
what other converters make of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final, cast

from soci.digest import Digest, sha256_digest
from soci.errors import InvalidManifest, LimitExceeded
from soci.index import IMAGE_MANIFEST_DIGEST_ANNOTATION, INDEX_DIGEST_ANNOTATION, SOCI_INDEX_V2
from soci.oci import (
    DOCKER_CONFIG,
    MAX_MANIFEST_BYTES,
    MAX_MANIFESTS,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    ImageIndex,
    descriptor_json,
    encode_json,
    parse_manifest,
)

Json = dict[str, Any]

REFERENCE_DIGEST_ANNOTATION: Final = "vnd.docker.reference.digest"
"""Annotation of an attestation's descriptor in an image index: the image manifest that it attests."""
NAME_ANNOTATIONS: Final = frozenset({"org.opencontainers.image.ref.name", "io.containerd.image.name"})
"""Annotations that name an entry of a layout's ``index.json``, and mean nothing in any other image index."""

_DESCRIPTOR_OPTIONS: Final = ("urls", "annotations", "data", "platform", "artifactType")
_PLATFORM_OPTIONS: Final = ("os.version", "os.features", "variant")


def document_of(content: bytes) -> Json:
    """The JSON object of a manifest or image index that `parse_manifest` has accepted, which bounds it."""
    return cast("Json", json.loads(content))


def parse_index(content: bytes) -> ImageIndex:
    """An image index; `InvalidManifest` for all else."""
    parsed = parse_manifest(content)
    if not isinstance(parsed, ImageIndex):
        raise InvalidManifest("not an image index, but a manifest")
    return parsed


def canonical_index(document: Mapping[str, Any]) -> Json:
    """An image index in canonical order."""
    return _ordered(
        document,
        {"schemaVersion": 2},
        {
            "mediaType": document.get("mediaType"),
            "artifactType": document.get("artifactType"),
            "manifests": None,
            "subject": _descriptor_or_none(document.get("subject")),
            "annotations": _sorted(document.get("annotations")),
        },
        {"manifests": _descriptors(document.get("manifests"))},
    )


def canonical_manifest(document: Mapping[str, Any]) -> Json:
    """A manifest in canonical order. ``layers`` that are absent become ``null``, as Go writes them."""
    return _ordered(
        document,
        {"schemaVersion": 2},
        {
            "mediaType": document.get("mediaType"),
            "artifactType": document.get("artifactType"),
            "config": None,
            "layers": None,
            "subject": _descriptor_or_none(document.get("subject")),
            "annotations": _sorted(document.get("annotations")),
        },
        {"config": canonical_descriptor(document["config"]), "layers": _descriptors(document.get("layers"))},
    )


def canonical_descriptor(descriptor: Mapping[str, Any]) -> Json:
    """A descriptor in canonical order."""
    required = {name: descriptor.get(name) for name in ("mediaType", "digest", "size")}
    optional = {name: descriptor.get(name) for name in _DESCRIPTOR_OPTIONS}
    optional["annotations"] = _sorted(optional["annotations"])
    platform = optional["platform"]
    if isinstance(platform, dict):
        named = {"architecture": platform.get("architecture") or "", "os": platform.get("os") or ""}
        optional["platform"] = _ordered(platform, named, {name: platform.get(name) for name in _PLATFORM_OPTIONS}, {})
    return _ordered(descriptor, required, optional, {})


def index_of_one(manifest: Descriptor) -> Json:
    """An image index whose only entry is ``manifest``."""
    return {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [descriptor_json(manifest)]}


def rewrite_image(content: bytes, soci_index: Digest | None) -> bytes:
    """An image's manifest as an OCI one that names ``soci_index``; without one, an index named before stays named.

    Config and layers are the same blobs as before. The types of layers stay too: Docker's are understood everywhere.
    """
    document = document_of(content)
    document["mediaType"] = OCI_MANIFEST
    if document["config"].get("mediaType") == DOCKER_CONFIG:
        document["config"]["mediaType"] = OCI_CONFIG  # registries tell an image by it
    if soci_index:
        document["annotations"] = (document.get("annotations") or {}) | {INDEX_DIGEST_ANNOTATION: soci_index}
    return encode_json(canonical_manifest(document))


def rewrite_artifact(content: bytes, moved: Mapping[Digest, Descriptor]) -> bytes:
    """An attestation, signature or the like, whose ``subject`` follows the manifest that it is about.

    ``moved`` has what became of each manifest. Byte for byte the same where nothing needs to change.
    """
    document = document_of(content)
    subject = document.get("subject")
    new = moved.get(subject["digest"]) if subject else None
    if subject and new and new.digest != subject["digest"]:
        document["subject"] = subject | {"mediaType": new.media_type, "digest": new.digest, "size": new.size}
    elif document.get("mediaType", OCI_MANIFEST) == OCI_MANIFEST:
        return content
    document["mediaType"] = OCI_MANIFEST
    return encode_json(canonical_manifest(document))


def rewrite_entry(entry: Mapping[str, Any], content: bytes) -> Json:
    """The entry of an image index for a manifest that is ``content`` now.

    Annotations of the manifest join those that the entry had.
    """
    annotations = (entry.get("annotations") or {}) | (document_of(content).get("annotations") or {})
    changed = {"mediaType": OCI_MANIFEST, "digest": sha256_digest(content), "size": len(content)}
    return canonical_descriptor({**entry, **changed, "annotations": annotations, "data": None})


def follow(entry: Mapping[str, Any], moved: Mapping[Digest, Descriptor]) -> Json:
    """An entry whose annotations name manifests by their new digests."""
    annotations = dict(entry.get("annotations") or {})
    for name in (REFERENCE_DIGEST_ANNOTATION, IMAGE_MANIFEST_DIGEST_ANNOTATION):
        if annotations.get(name) in moved:
            annotations[name] = moved[annotations[name]].digest
    return canonical_descriptor({**entry, "annotations": annotations})


def soci_entry(index: Descriptor, image_manifest: Digest) -> Json:
    """The entry of an image index for the SOCI index of ``image_manifest``. ``index`` has its platform."""
    return descriptor_json(
        Descriptor(
            OCI_MANIFEST,
            index.digest,
            index.size,
            {IMAGE_MANIFEST_DIGEST_ANNOTATION: image_manifest},
            index.platform,
            SOCI_INDEX_V2,
        )
    )


def without_names(entry: Mapping[str, Any]) -> Json:
    """An entry of ``index.json`` for use in an image index of the registry kind."""
    annotations = entry.get("annotations") or {}
    return {**entry, "annotations": {key: text for key, text in annotations.items() if key not in NAME_ANNOTATIONS}}


def encode_index(document: Mapping[str, Any], entries: Iterable[Mapping[str, Any]]) -> bytes:
    """The bytes of an image index with other ``entries``.

    Raises `LimitExceeded` where they are more, or larger, than readers take.
    """
    manifests = list(entries)
    content = encode_json(canonical_index({**document, "mediaType": OCI_INDEX, "manifests": manifests}))
    if len(manifests) > MAX_MANIFESTS or len(content) > MAX_MANIFEST_BYTES:
        raise LimitExceeded(
            f"an image index of {len(manifests)} entries and {len(content)} bytes: at most {MAX_MANIFESTS} and "
            f"{MAX_MANIFEST_BYTES} are read again (MAX_MANIFESTS, MAX_MANIFEST_BYTES)"
        )
    parse_index(content)
    return content


def _ordered(
    document: Mapping[str, Any], required: Json, optional: Mapping[str, Any], in_place: Mapping[str, Any]
) -> Json:
    """``required`` members, ``optional`` ones that hold something (or are ``in_place``, with that value), the rest."""
    out = dict(required)
    for name, value in optional.items():
        if name in in_place:
            out[name] = in_place[name]
        elif value:
            out[name] = value
    known = required.keys() | optional.keys()
    out.update((name, value) for name, value in document.items() if name not in known)
    return out


def _descriptors(items: list[Json] | None) -> list[Json] | None:
    return None if items is None else [canonical_descriptor(item) for item in items]


def _descriptor_or_none(item: Json | None) -> Json | None:
    return canonical_descriptor(item) if item else None


def _sorted(annotations: Mapping[str, str] | None) -> dict[str, str]:
    return dict(sorted((annotations or {}).items()))
