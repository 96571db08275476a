# SPDX-License-Identifier: Apache-2.0
"""A repository as a content store: blobs by digest, of which manifests live under another path."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping

from soci.digest import Digest
from soci.errors import InvalidManifest, LimitExceeded, NotFound, Unsupported
from soci.oci import INDEX_TYPES, MANIFEST_TYPES, Descriptor, Manifest, parse_manifest
from soci_registry.client import Repository
from soci_registry.settings import MANIFEST_BYTES_MAX

_NO_LABELS: Mapping[str, str] = {}


class RegistryContent:
    """One repository, with the face that index builders read from and write to (`soci_indexing.stores.Content`).

    What is pushed with a manifest's media type goes where manifests go, and where the registry keeps no list of what
    refers to its subject, the list under the fallback tag is written too. A registry has no labels.
    """

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self.listed: dict[Digest, str] = {}
        """How each pushed manifest that has a subject is found from there: ``referrers`` or ``tag``."""

    async def info(self, digest: Digest) -> int | None:
        """The size in bytes, or None where it is not there."""
        size = await self._repository.blob_exists(digest)
        return await self._repository.manifest_exists(digest) if size is None else size

    async def read(self, digest: Digest, *, limit: int) -> bytes:
        """A whole blob or manifest, checked. Raises `NotFound`, `Mismatch`, `LimitExceeded` beyond ``limit`` bytes."""
        try:
            return await self._repository.blob(digest, limit=limit)
        except NotFound as error:
            try:
                content = (await self._repository.manifest(digest)).content
            except NotFound:
                raise error from None
        if len(content) > limit:
            raise LimitExceeded(f"{digest} has more than {limit} bytes")
        return content

    def stream(self, digest: Digest) -> AsyncGenerator[bytes, None]:
        """A whole blob in chunks; `Mismatch` after the last one if it is another. Close it where it is left early."""
        return self._repository.blob_stream(digest)

    async def push(self, descriptor: Descriptor, content: bytes, labels: Mapping[str, str] = _NO_LABELS) -> bool:
        """Store a blob or manifest; False where it was there already. `Mismatch` where it is not the descriptor's."""
        del labels
        if descriptor.media_type not in MANIFEST_TYPES | INDEX_TYPES:
            return await self._repository.push_blob(content, descriptor.digest)
        was_there = len(content) <= MANIFEST_BYTES_MAX and await self._repository.manifest_exists(descriptor.digest)
        pushed = await self._repository.push_manifest(content, descriptor.media_type, descriptor.digest)
        document = parse_manifest(content)
        if document.subject is not None:
            self.listed[descriptor.digest] = "referrers" if pushed.subject_handled else "tag"
            if not pushed.subject_handled:
                await self._repository.attach_referrer_tag(document.subject.digest, _referrer(descriptor, content))
        return not was_there

    async def label(self, digest: Digest, labels: Mapping[str, str]) -> None:
        """Nothing."""

    async def delete(self, digest: Digest) -> None:
        """Raises `Unsupported`: what a registry holds, others may use."""
        raise Unsupported(f"{digest} stays in the registry: nothing is deleted there")


def _referrer(descriptor: Descriptor, content: bytes) -> Descriptor:
    """How a list of referrers names a manifest: with its artifact type, which may be its config's, and annotations."""
    document = parse_manifest(content)
    if not isinstance(document, Manifest):
        raise InvalidManifest(f"{descriptor.digest} is an image index that refers to another manifest")
    kind = document.artifact_type or document.config.media_type
    return Descriptor(descriptor.media_type, descriptor.digest, len(content), document.annotations, artifact_type=kind)
