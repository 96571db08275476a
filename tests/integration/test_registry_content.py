# SPDX-License-Identifier: Apache-2.0
"""A repository of a real registry with a content store's face."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from soci.digest import Digest, sha256_digest
from soci.errors import LimitExceeded, Mismatch, NotFound, Unsupported
from soci.index import SOCI_INDEX_V1, SociIndex, encode_index, ztoc_entry
from soci.oci import OCI_CONFIG, OCI_LAYER_GZIP, OCI_MANIFEST, Descriptor, Manifest, encode_manifest
from soci_indexing.stores import Content
from soci_registry import NoCredentials, Registry, RegistrySettings, Repository
from soci_registry.content import RegistryContent

GONE = Digest("sha256:" + "e" * 64)


@asynccontextmanager
async def opened(registry: str) -> AsyncIterator[tuple[Content, RegistryContent, Repository]]:
    async with Registry(settings=RegistrySettings(), credentials=NoCredentials()) as client:
        repository = client.repository(f"{registry}/c/{secrets.token_hex(6)}:1")
        content = RegistryContent(repository)
        yield content, content, repository


def blob(content: bytes, media_type: str = "application/octet-stream") -> Descriptor:
    return Descriptor(media_type, sha256_digest(content), len(content))


async def test_blobs_and_manifests_by_digest_alone(registry: str) -> None:
    """Whoever reads need not know which is which: size, content, and their absence."""
    manifest = encode_manifest(Manifest(OCI_MANIFEST, blob(b"{}", OCI_CONFIG), ()))
    async with opened(registry) as (content, _, repository):
        assert await content.push(blob(b"{}"), b"{}")
        assert not await content.push(blob(b"{}"), b"{}")
        assert await content.push(blob(manifest, OCI_MANIFEST), manifest)
        assert not await content.push(blob(manifest, OCI_MANIFEST), manifest)
        assert (await repository.manifest(sha256_digest(manifest))).content == manifest
        for what in (b"{}", manifest):
            digest = sha256_digest(what)
            assert await content.info(digest) == len(what)
            assert await content.read(digest, limit=len(what)) == what
            with pytest.raises(LimitExceeded):
                await content.read(digest, limit=len(what) - 1)
        assert b"".join([chunk async for chunk in content.stream(sha256_digest(b"{}"))]) == b"{}"
        assert await content.info(GONE) is None
        with pytest.raises(NotFound):
            await content.read(GONE, limit=10)
        with pytest.raises(Mismatch):
            await content.push(Descriptor("x/y", GONE, 2), b"{}")
        await content.label(GONE, {"a": "b"})
        with pytest.raises(Unsupported):
            await content.delete(sha256_digest(b"{}"))


async def test_a_manifest_with_a_subject_is_listed(registry: str) -> None:
    """This registry keeps no list of referrers, so the tag is written, once however often it is pushed."""
    layer = blob(b"layer", OCI_LAYER_GZIP)
    manifest = encode_manifest(Manifest(OCI_MANIFEST, blob(b"{}", OCI_CONFIG), (layer,)))
    subject = blob(manifest, OCI_MANIFEST)
    index = encode_index(SociIndex.v1((ztoc_entry(layer, sha256_digest(b"ztoc"), 4, 1 << 22),), subject))
    async with opened(registry) as (content, registry_content, repository):
        for one in (b"{}", b"layer", b"ztoc"):
            await content.push(blob(one), one)
        await content.push(subject, manifest)
        assert registry_content.listed == {}
        for _ in range(2):
            await content.push(blob(index, OCI_MANIFEST), index)
        assert registry_content.listed == {sha256_digest(index): "tag"}
        (found,) = await repository.referrers(subject.digest, SOCI_INDEX_V1)
        assert (found.digest, found.size, found.media_type) == (sha256_digest(index), len(index), OCI_MANIFEST)
        assert found.annotations == {"com.amazon.soci.build-tool-identifier": "AWS SOCI CLI v0.2"}
