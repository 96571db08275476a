# SPDX-License-Identifier: Apache-2.0
"""What refers to a manifest (OCI distribution specification 1.1, "Listing Referrers" and "Referrers Tag Schema").

Registries without the referrers API keep the list in an image index under the tag ``sha256-<hex>``, which clients
maintain themselves.
"""

from __future__ import annotations

import json
from urllib.parse import quote, urljoin

from soci.digest import Digest
from soci.errors import InvalidManifest, LimitExceeded, NotFound, RegistryUnavailable
from soci.oci import OCI_INDEX, Descriptor, ImageIndex, descriptor_json, encode_json, parse_manifest
from soci_registry.failure import TryError
from soci_registry.fetch import fetch_manifest, put_manifest
from soci_registry.settings import MANIFEST_BYTES_MAX
from soci_registry.transport import Transport
from soci_registry.urls import Place, next_link, origin_of, redact, redirect_target
from soci_registry.wire import Answer, Request, read_bounded

PAGES_MAX = 100
REFERRERS_MAX = 10_000
TAG_LENGTH_MAX = 128


def fallback_tag(digest: Digest) -> str:
    """``sha256-<hex>``: where the list is kept by registries without the API. Cut to what a tag may be long."""
    return digest.replace(":", "-", 1)[:TAG_LENGTH_MAX]


async def referrers(transport: Transport, place: Place, digest: Digest, artifact_type: str) -> list[Descriptor]:
    """All descriptors of ``artifact_type`` that refer to manifest ``digest``, in the registry's order.

    The registry's filter is used and never trusted. Nothing found is an empty list.
    """
    url = place.url("referrers", digest)
    url += f"{'&' if '?' in url else '?'}artifactType={quote(artifact_type, safe='')}"
    found: list[Descriptor] = []
    for _ in range(PAGES_MAX):
        page = await _page(transport, place, url)
        if page is None:
            if found:
                raise RegistryUnavailable(f"referrers of {digest}: a page is missing")
            return await _from_tag(transport, place, digest, artifact_type)
        descriptors, following = page
        found += [one for one in descriptors if one.artifact_type == artifact_type]
        if len(found) > REFERRERS_MAX:
            raise LimitExceeded(f"referrers of {digest}: more than {REFERRERS_MAX}")
        if following is None:
            return found
        url = _same_place(url, following)
    raise LimitExceeded(f"referrers of {digest}: more than {PAGES_MAX} pages")


async def _page(transport: Transport, place: Place, url: str) -> tuple[tuple[Descriptor, ...], str | None] | None:
    """(descriptors, link to the next page), or None where this registry has no referrers API."""

    async def read(answer: Answer) -> tuple[str, str | None, bytes]:
        kind = (answer.header("content-type") or "").partition(";")[0].strip().lower()
        if kind != OCI_INDEX:
            return kind, None, b""
        content = await read_bounded(answer, MANIFEST_BYTES_MAX, f"referrers at {redact(url)}")
        return kind, next_link(answer.header("link")), content

    try:
        kind, following, content = await transport.call(
            Request("GET", url, place.access(), {"Accept": OCI_INDEX}), read
        )
    except NotFound:
        return None
    if kind != OCI_INDEX:
        return None
    return _index(content, url).manifests, following


def _index(content: bytes, where: str) -> ImageIndex:
    index = parse_manifest(content)
    if not isinstance(index, ImageIndex):
        raise InvalidManifest(f"referrers at {redact(where)}: not an image index")
    return index


def _same_place(current: str, following: str) -> str:
    # The request carries the registry's token: a next page elsewhere is not the registry's word.
    try:
        url = redirect_target(current, following)
        if origin_of(url) == origin_of(current):
            return url
    except TryError as error:
        raise RegistryUnavailable(f"referrers: next page: {error}") from error
    raise RegistryUnavailable(f"referrers: the next page is at another host: {redact(urljoin(current, following))}")


async def _from_tag(transport: Transport, place: Place, digest: Digest, artifact_type: str) -> list[Descriptor]:
    try:
        listed = await fetch_manifest(transport, place, fallback_tag(digest))
    except NotFound:
        return []
    index = _index(listed.content, fallback_tag(digest))
    return [one for one in index.manifests if one.artifact_type == artifact_type]


async def attach(transport: Transport, place: Place, subject: Digest, descriptor: Descriptor) -> bool:
    """Add ``descriptor`` to the fallback list of ``subject``; False where it was there already.

    Registries offer no conditional PUT: of two clients that do this at once, one entry can be lost. The replaced list
    is left to the registry's garbage collection, because another tag may have the same digest.
    """
    tag = fallback_tag(subject)
    entry = descriptor_json(descriptor)
    try:
        listed = await fetch_manifest(transport, place, tag)
        if any(one.digest == descriptor.digest for one in _index(listed.content, tag).manifests):
            return False
        document = json.loads(listed.content)  # as it is: members that we do not know belong to others
        document["manifests"] = [*(document.get("manifests") or ()), entry]
    except NotFound:
        document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}
    content = encode_json(document)
    await put_manifest(transport, place, content, OCI_INDEX, tag)
    return True
