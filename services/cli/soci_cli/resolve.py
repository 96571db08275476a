# SPDX-License-Identifier: Apache-2.0
"""From an image reference to everything that must be known before its first layer: over the registry, or locally."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from soci.digest import Digest
from soci.errors import InvalidManifest, Unsupported
from soci.oci import (
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    Config,
    Descriptor,
    ImageIndex,
    Manifest,
    Platform,
    chain_ids,
    choose_platform,
    parse_config,
    parse_manifest,
)
from soci.reference import Reference
from soci_containerd import Client
from soci_registry import Repository


class Source(Protocol):
    """Where documents come from; each raises `NotFound` for one that is not there."""

    async def manifest(self, descriptor: Descriptor) -> bytes:
        """A manifest, checked against its digest."""
        ...

    async def config(self, descriptor: Descriptor) -> bytes:
        """An image config, checked against its digest."""
        ...


@dataclass(frozen=True, slots=True)
class Document:
    """A small blob with its descriptor."""

    descriptor: Descriptor
    content: bytes


@dataclass(frozen=True, slots=True)
class Resolved:
    """An image for one platform. ``index`` is None where its name stands for a manifest itself.

    ``number`` is the manifest's place in the index; ``chains`` are the chain ids of its layers, lowest first.
    """

    name: str
    index: Document | None
    number: int
    manifest: Document
    config: Document
    layers: tuple[Descriptor, ...]
    parsed: Config
    chains: tuple[Digest, ...]

    @property
    def target(self) -> Descriptor:
        """What the image's name stands for."""
        return (self.index or self.manifest).descriptor


@dataclass(frozen=True, slots=True)
class _FromRegistry:
    repository: Repository

    async def manifest(self, descriptor: Descriptor) -> bytes:
        return (await self.repository.manifest(descriptor.digest)).content

    async def config(self, descriptor: Descriptor) -> bytes:
        return await self.repository.blob(descriptor.digest, limit=MAX_CONFIG_BYTES)


@dataclass(frozen=True, slots=True)
class _FromContainerd:
    client: Client

    async def manifest(self, descriptor: Descriptor) -> bytes:
        return await self.client.content.read(descriptor.digest, MAX_MANIFEST_BYTES)

    async def config(self, descriptor: Descriptor) -> bytes:
        return await self.client.content.read(descriptor.digest, MAX_CONFIG_BYTES)


async def from_registry(repository: Repository, reference: Reference, platform: Platform) -> Resolved:
    """Resolve at the registry. Raises `NotFound`, `InvalidManifest`, `Unauthorized`, `RegistryUnavailable`."""
    fetched = await repository.manifest(reference.target)
    top = Document(Descriptor(fetched.media_type, fetched.digest, len(fetched.content)), fetched.content)
    return await resolve(str(reference), top, platform, _FromRegistry(repository))


async def from_containerd(client: Client, name: str, platform: Platform) -> Resolved:
    """Resolve from what containerd has. Raises `NotFound` where the image or one of its documents is not here."""
    source = _FromContainerd(client)
    target = (await client.images.get(name)).target
    return await resolve(name, Document(target, await source.manifest(target)), platform, source)


async def resolve(name: str, top: Document, platform: Platform, source: Source) -> Resolved:
    """What ``top`` means for ``platform``. Raises `InvalidManifest`, `NotFound`, `Unsupported`."""
    index, number, document = None, 0, top
    parsed = parse_manifest(top.content)
    if isinstance(parsed, ImageIndex):
        index = top
        chosen = choose_platform(parsed, platform)
        number = next(place for place, listed in enumerate(parsed.manifests) if listed.digest == chosen.digest)
        document = Document(chosen, await source.manifest(chosen))
        parsed = parse_manifest(document.content)
    if not isinstance(parsed, Manifest):
        raise Unsupported(f"{name}: the manifest for {platform} is an image index again")
    config = Document(parsed.config, await source.config(parsed.config))
    values = parse_config(config.content)
    if not parsed.layers or len(values.diff_ids) != len(parsed.layers):
        raise InvalidManifest(f"{name} has {len(parsed.layers)} layers and {len(values.diff_ids)} diff ids")
    chains = chain_ids(values.diff_ids)
    return Resolved(name, index, number, document, config, parsed.layers, values, chains)
