# SPDX-License-Identifier: Apache-2.0
"""Which SOCI index belongs to an image manifest.

Order: an index named by the client; the one that the image manifest names in an annotation (version 2); one that
refers to the manifest (version 1: referrers API, or its tag fallback). The first that is there decides; one that is
there but unusable ends the search, so that a broken index is seen and not silently replaced by another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from soci.digest import Digest, parse_digest
from soci.errors import InvalidManifest, NoIndex, NotFound
from soci.index import INDEX_DIGEST_ANNOTATION, SOCI_INDEX_V1
from soci.oci import Descriptor, Manifest, parse_manifest

FoundBy = Literal["explicit", "v2-annotation", "v1-referrer"]


class Document(Protocol):
    """A manifest as it came."""

    @property
    def content(self) -> bytes:
        """Its bytes, which have the digest that was asked for."""


class Referring(Protocol):
    """A repository: `soci_registry.Repository` is one."""

    async def manifest(self, reference: str | Digest) -> Document:
        """The manifest under a digest; `NotFound` where there is none."""

    async def referrers(self, digest: Digest, artifact_type: str) -> list[Descriptor]:
        """What refers to a manifest, by artifact type."""


@dataclass(frozen=True, slots=True)
class Located:
    """The index that was chosen, and by what."""

    index: Digest
    found_by: FoundBy


def choose_referrer(referrers: Sequence[Descriptor]) -> Descriptor | None:
    """Of several v1 indexes, the one with the smallest digest: registries list them in no promised order."""
    return min(referrers, key=lambda descriptor: descriptor.digest, default=None)


async def locate(  # noqa: PLR0913  one parameter each
    repository: Referring, image: str, manifest: Digest, explicit: Digest | None = None, *, v1: bool, v2: bool
) -> Located:
    """The index for ``manifest`` of ``image`` (whose name is for the message).

    Raises `NoIndex` where there is none, `InvalidManifest` or `InvalidDigest` for a manifest that cannot say, and
    what the repository raises.
    """
    if explicit:
        return Located(explicit, "explicit")
    if not (v1 or v2):
        raise NoIndex("all lazy pull modes are disabled (pull_modes.soci_v1, pull_modes.soci_v2)")
    if v2:
        named = _named(manifest, (await repository.manifest(manifest)).content)
        if named:
            return Located(named, "v2-annotation")
    if v1:
        try:
            chosen = choose_referrer(await repository.referrers(manifest, SOCI_INDEX_V1))
        except NotFound:
            chosen = None
        if chosen:
            return Located(chosen.digest, "v1-referrer")
    raise NoIndex(f"{image} has no SOCI index for {manifest}: make one with `soci index build {image}`")


def _named(digest: Digest, content: bytes) -> Digest | None:
    manifest = parse_manifest(content)
    if not isinstance(manifest, Manifest):
        raise InvalidManifest(f"{digest} is an image index, not an image manifest")
    named = manifest.annotations.get(INDEX_DIGEST_ANNOTATION)
    return parse_digest(named) if named else None
