# SPDX-License-Identifier: Apache-2.0
"""OCI and Docker image documents as values: manifest, image index, image config (OCI image-spec 1.1).

The documents come from registries, so every parser bounds and checks what it is given and raises `InvalidManifest`
and nothing else. Members that nothing here needs are dropped: store the original bytes, not a re-encoded value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from soci.digest import Digest
from soci.errors import InvalidManifest, NotFound
from soci.oci_json import Fields, encode_json, load
from soci.platforms import Platform, parse_platform

__all__ = [
    "DOCKER_CONFIG",
    "DOCKER_LAYER",
    "DOCKER_LAYER_FOREIGN",
    "DOCKER_LAYER_FOREIGN_GZIP",
    "DOCKER_LAYER_GZIP",
    "DOCKER_LAYER_ZSTD",
    "DOCKER_LIST",
    "DOCKER_MANIFEST",
    "EMPTY_JSON",
    "INDEX_TYPES",
    "MANIFEST_TYPES",
    "MAX_CONFIG_BYTES",
    "MAX_LAYERS",
    "MAX_MANIFESTS",
    "MAX_MANIFEST_BYTES",
    "OCI_CONFIG",
    "OCI_EMPTY",
    "OCI_INDEX",
    "OCI_LAYER",
    "OCI_LAYER_GZIP",
    "OCI_LAYER_NONDISTRIBUTABLE",
    "OCI_LAYER_NONDISTRIBUTABLE_GZIP",
    "OCI_LAYER_ZSTD",
    "OCI_MANIFEST",
    "Compression",
    "Config",
    "Descriptor",
    "ImageIndex",
    "Manifest",
    "Platform",
    "chain_ids",
    "choose_platform",
    "descriptor_json",
    "encode_json",
    "encode_manifest",
    "is_layer",
    "layer_compression",
    "parse_config",
    "parse_manifest",
    "parse_platform",
]

OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
OCI_EMPTY: Final = "application/vnd.oci.empty.v1+json"
OCI_LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP: Final = OCI_LAYER + "+gzip"
OCI_LAYER_ZSTD: Final = OCI_LAYER + "+zstd"
OCI_LAYER_NONDISTRIBUTABLE: Final = "application/vnd.oci.image.layer.nondistributable.v1.tar"
OCI_LAYER_NONDISTRIBUTABLE_GZIP: Final = OCI_LAYER_NONDISTRIBUTABLE + "+gzip"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG: Final = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER: Final = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_LAYER_GZIP: Final = DOCKER_LAYER + ".gzip"
DOCKER_LAYER_ZSTD: Final = DOCKER_LAYER + ".zstd"
DOCKER_LAYER_FOREIGN: Final = "application/vnd.docker.image.rootfs.foreign.diff.tar"
DOCKER_LAYER_FOREIGN_GZIP: Final = DOCKER_LAYER_FOREIGN + ".gzip"
MANIFEST_TYPES: Final = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
INDEX_TYPES: Final = frozenset({OCI_INDEX, DOCKER_LIST})

EMPTY_JSON: Final = b"{}"
"""The content of a config that says nothing."""

MAX_MANIFEST_BYTES: Final = 4 * 2**20
"""Bytes of a manifest or an image index: what registries accept at most."""
MAX_CONFIG_BYTES: Final = 8 * 2**20
MAX_LAYERS: Final = 1_000
MAX_MANIFESTS: Final = 1_000
"""Entries of an image index."""

Compression = Literal["gzip", "uncompressed", "zstd"]

_OCI_LAYER_PREFIX: Final = "application/vnd.oci.image.layer."
_DOCKER_COMPRESSION: Final[Mapping[str, Compression]] = {
    DOCKER_LAYER: "uncompressed",
    DOCKER_LAYER_FOREIGN: "uncompressed",
    DOCKER_LAYER_GZIP: "gzip",
    DOCKER_LAYER_FOREIGN_GZIP: "gzip",
    DOCKER_LAYER_ZSTD: "zstd",
}


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What and how large a blob is (OCI image-spec, descriptor.md)."""

    media_type: str
    digest: Digest
    size: int  # bytes
    annotations: Mapping[str, str] = field(default_factory=dict)
    platform: Platform | None = None
    artifact_type: str | None = None
    urls: tuple[str, ...] = ()
    data: str = ""  # the content itself in base64, or nothing


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image for one platform, or an artifact in an image manifest's clothes."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]  # lowest first
    subject: Descriptor | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)
    artifact_type: str | None = None


@dataclass(frozen=True, slots=True)
class ImageIndex:
    """One image for several platforms: OCI's image index or Docker's manifest list."""

    media_type: str
    manifests: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(default_factory=dict)
    subject: Descriptor | None = None
    artifact_type: str | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """An image config, as far as launching an image and checking its layers need it."""

    diff_ids: tuple[Digest, ...]  # of the uncompressed layers, lowest first
    os: str = ""
    architecture: str = ""
    variant: str = ""
    env: tuple[str, ...] = ()  # NAME=value
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    stop_signal: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def platform(self) -> Platform:
        """The platform that the config claims."""
        return Platform(self.os, self.architecture, self.variant)


def parse_manifest(data: bytes) -> Manifest | ImageIndex:
    """A manifest or an image index, told apart by ``mediaType`` or, where it is absent, by the members there are.

    Raises `InvalidManifest` for anything else: also for Docker's schema 1, and for a document that is a manifest
    and an image index at once, which two readers would take differently.
    """
    document = load(data, "manifest", MAX_MANIFEST_BYTES)
    many = "manifests" in document
    media_type = document.text("mediaType", OCI_INDEX if many else OCI_MANIFEST)
    if document.integer("schemaVersion") != 2 or "fsLayers" in document:
        raise InvalidManifest("manifest: only schema version 2 is known; push the image again with a current tool")
    if media_type in INDEX_TYPES and not ("layers" in document or "config" in document):
        return ImageIndex(
            media_type,
            tuple(map(_descriptor, document.members("manifests", MAX_MANIFESTS))),
            document.text_map("annotations"),
            _descriptor(document.member("subject")) if "subject" in document else None,
            document.text("artifactType", "") or None,
        )
    if media_type not in MANIFEST_TYPES or many:
        document.refuse("mediaType", "is unknown or does not fit the members of the document", media_type)
    return Manifest(
        media_type,
        _descriptor(document.member("config")),
        tuple(map(_descriptor, document.members("layers", MAX_LAYERS))),
        _descriptor(document.member("subject")) if "subject" in document else None,
        document.text_map("annotations"),
        document.text("artifactType", "") or None,
    )


def choose_platform(index: ImageIndex, platform: Platform) -> Descriptor:
    """The first entry for ``platform``; `NotFound` names what there is instead.

    Entries that are no image are passed over: artifacts (a SOCI index carries its image's platform), attestations
    (platform ``unknown/unknown``) and entries without a platform.
    """
    images = [entry for entry in index.manifests if entry.platform is not None and not entry.artifact_type]
    for entry in images:
        if entry.platform is not None and entry.platform.matches(platform):
            return entry
    there = sorted({str(entry.platform) for entry in images})
    raise NotFound(f"no image for {platform}; there is {', '.join(there[:20]) or 'none for any platform'}")


def parse_config(data: bytes) -> Config:
    """An image config; `InvalidManifest` for anything that lists no layers, such as an artifact's empty config."""
    document = load(data, "image config", MAX_CONFIG_BYTES)
    rootfs = document.member("rootfs")
    if rootfs.text("type") != "layers":
        rootfs.refuse("type", 'is not "layers"', rootfs.text("type"))
    diff_ids = rootfs.digests("diff_ids")
    if len(diff_ids) > MAX_LAYERS:
        raise InvalidManifest(f"image config: {len(diff_ids):,} diff_ids are over the limit of {MAX_LAYERS:,}")
    run = document.member("config") if "config" in document else Fields({}, "image config")
    return Config(
        diff_ids=diff_ids,
        os=document.text("os", ""),
        architecture=document.text("architecture", ""),
        variant=document.text("variant", ""),
        env=run.texts("Env"),
        entrypoint=run.texts("Entrypoint"),
        cmd=run.texts("Cmd"),
        working_dir=run.text("WorkingDir", ""),
        user=run.text("User", ""),
        stop_signal=run.text("StopSignal", ""),
        labels=run.text_map("Labels"),
    )


def chain_ids(diff_ids: Sequence[Digest]) -> tuple[Digest, ...]:
    """The chain id of each layer upon all below it (OCI image-spec, config.md "Layer ChainID")."""
    chain: list[Digest] = []
    for diff_id in diff_ids:
        below = f"{chain[-1]} {diff_id}".encode() if chain else b""
        chain.append(Digest("sha256:" + hashlib.sha256(below).hexdigest()) if chain else diff_id)
    return tuple(chain)


def is_layer(media_type: str) -> bool:
    """Whether a blob of this type is an image layer, whatever we can do with it."""
    return media_type.startswith(_OCI_LAYER_PREFIX) or media_type.partition("+")[0] in _DOCKER_COMPRESSION


def layer_compression(media_type: str) -> Compression | None:
    """How a layer of this type is compressed; None for what cannot be read (encrypted, unknown) or is no layer.

    The type alone decides, never the bytes. Of several suffixes the last in alphabetical order counts, as
    containerd has it.
    """
    base, *suffixes = media_type.split("+")
    if base in _DOCKER_COMPRESSION:
        return None if suffixes else _DOCKER_COMPRESSION[base]
    if base not in (OCI_LAYER, OCI_LAYER_NONDISTRIBUTABLE) or "encrypted" in suffixes:
        return None
    if not suffixes:
        return "uncompressed" if base == OCI_LAYER else None
    match max(suffixes):
        case "gzip":
            return "gzip"
        case "zstd":
            return "zstd"
        case _:
            return None


def encode_manifest(document: Manifest | ImageIndex) -> bytes:
    """The canonical bytes of a manifest or an image index."""
    if isinstance(document, Manifest):
        body: dict[str, Any] = {
            "config": descriptor_json(document.config),
            "layers": [descriptor_json(layer) for layer in document.layers],
        }
    else:
        body = {"manifests": [descriptor_json(entry) for entry in document.manifests]}
    return encode_json(
        {"schemaVersion": 2, "mediaType": document.media_type}
        | _present(artifactType=document.artifact_type)
        | body
        | _present(
            subject=descriptor_json(document.subject) if document.subject else None,
            annotations=dict(sorted(document.annotations.items())),
        )
    )


def descriptor_json(descriptor: Descriptor) -> dict[str, Any]:
    """A descriptor for `encode_json`, members in canonical order, empty ones left out."""
    return {
        "mediaType": descriptor.media_type,
        "digest": descriptor.digest,
        "size": descriptor.size,
    } | _present(
        urls=list(descriptor.urls),
        annotations=dict(sorted(descriptor.annotations.items())),
        data=descriptor.data,
        platform=_platform_json(descriptor.platform) if descriptor.platform else None,
        artifactType=descriptor.artifact_type,
    )


def _platform_json(platform: Platform) -> dict[str, Any]:
    optional = {
        "os.version": platform.os_version,
        "os.features": list(platform.os_features),
        "variant": platform.variant,
    }
    return {"architecture": platform.architecture, "os": platform.os} | _present(**optional)


def _present(**members: Any) -> dict[str, Any]:
    return {name: value for name, value in members.items() if value}


def _descriptor(fields: Fields) -> Descriptor:
    return Descriptor(
        media_type=fields.text("mediaType"),
        digest=fields.digest("digest"),
        size=fields.integer("size"),
        annotations=fields.text_map("annotations"),
        platform=_platform(fields.member("platform")) if "platform" in fields else None,
        artifact_type=fields.text("artifactType", "") or None,
        urls=fields.texts("urls"),
        data=fields.text("data", ""),
    )


def _platform(fields: Fields) -> Platform:
    return Platform(
        os=fields.text("os", ""),
        architecture=fields.text("architecture", ""),
        variant=fields.text("variant", ""),
        os_version=fields.text("os.version", ""),
        os_features=fields.texts("os.features"),
    )
