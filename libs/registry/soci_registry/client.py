# SPDX-License-Identifier: Apache-2.0
"""The face of this library: a `Registry` a process, a `Repository` an image."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

import httpx

from soci.digest import Digest, parse_digest, sha256_digest
from soci.errors import NotFound
from soci.oci import Descriptor
from soci.reference import Reference, parse_reference
from soci_registry import fetch, push, referrers
from soci_registry.auth import Authorizer
from soci_registry.credentials import Credentials
from soci_registry.fetch import Fetched, PushedManifest, Resolved
from soci_registry.settings import RegistrySettings
from soci_registry.transport import Transport
from soci_registry.urls import Place, place_of
from soci_registry.wire import tls_context
from soci_registry.wire_aiohttp import AiohttpWire
from soci_registry.wire_httpx import HttpxWire


class Registry:
    """All registries, through two HTTP clients that it owns: an async context manager, one a process.

    ``small_transport`` replaces the network under manifests and tokens, in tests.
    """

    def __init__(
        self,
        *,
        settings: RegistrySettings,
        credentials: Credentials,
        small_transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.settings = settings
        tls = tls_context(settings)
        self._small = HttpxWire(settings, tls, small_transport)
        self._bulk = AiohttpWire(settings, tls)
        authorizer = Authorizer(wire=self._small, credentials=credentials, settings=settings)
        self._transport = Transport(small=self._small, bulk=self._bulk, authorizer=authorizer, settings=settings)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._small)
            await stack.enter_async_context(self._bulk)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def repository(self, image: str | Reference) -> Repository:
        """The repository of ``image``; its tag and digest don't matter. `InvalidReference` where it is none."""
        reference = parse_reference(image) if isinstance(image, str) else image
        place = place_of(reference.registry, reference.repository, self.settings.plain_http)
        return Repository(place, self._transport)


class Repository:
    """One repository at one registry; cheap to make.

    Every method raises `Unauthorized`, `NotFound` or `RegistryUnavailable`, after the tries that the settings allow,
    and `Mismatch` for content that is not what its digest promised.
    """

    def __init__(self, place: Place, transport: Transport) -> None:
        self.place = place
        self._transport = transport

    async def manifest(self, reference: str | Digest) -> Fetched:
        """The manifest under a tag or digest, at most `MANIFEST_BYTES_MAX` (`LimitExceeded`)."""
        return await fetch.fetch_manifest(self._transport, self.place, reference)

    async def resolve(self, reference: str | Digest) -> Resolved:
        """Digest, media type and size of the manifest under a tag or digest, without its content if possible."""
        return await fetch.resolve(self._transport, self.place, reference)

    async def manifest_exists(self, reference: str | Digest) -> int | None:
        """The manifest's size in bytes, or None where there is none."""
        try:
            return (await self.resolve(reference)).size
        except NotFound:
            return None

    async def blob_exists(self, digest: Digest) -> int | None:
        """The blob's size in bytes, or None where there is none."""
        return await fetch.blob_size(self._transport, self.place, parse_digest(digest))

    async def blob(self, digest: Digest, *, limit: int) -> bytes:
        """A whole blob, checked; `LimitExceeded` above ``limit`` bytes."""
        return await fetch.fetch_blob(self._transport, self.place, parse_digest(digest), limit)

    def blob_stream(self, digest: Digest) -> AsyncGenerator[bytes, None]:
        """A whole blob in chunks, resumed after broken connections; `Mismatch` after the last one if it is wrong.

        Close it where it is left early: ``async with aclosing(repository.blob_stream(digest)) as chunks``.
        """
        return fetch.stream_blob(self._transport, self.place, parse_digest(digest))

    async def blob_range(self, digest: Digest, start: int, end: int, *, deadline: float | None = None) -> bytes:
        """Bytes [start, end) of a blob, exactly as many; what they hold is the caller's to check.

        Tried for ``deadline`` seconds (None: ``settings.range_deadline``), then `DeadlineExceeded`.
        """
        return await fetch.fetch_range(self._transport, self.place, parse_digest(digest), (start, end), deadline)

    async def push_blob(self, content: bytes, digest: Digest | None = None) -> bool:
        """Upload a blob; False where the registry had it already."""
        known = sha256_digest(content) if digest is None else parse_digest(digest)
        return await push.push_bytes(self._transport, self.place, content, known)

    async def push_blob_file(self, path: Path, digest: Digest) -> bool:
        """Upload a file that has ``digest``, streamed; False where the registry had it already."""
        return await push.push_file(self._transport, self.place, path, parse_digest(digest))

    async def push_manifest(
        self, content: bytes, media_type: str, reference: str | Digest | None = None
    ) -> PushedManifest:
        """PUT a manifest under a tag, or (None) under its own sha256 digest."""
        return await fetch.put_manifest(self._transport, self.place, content, media_type, reference)

    async def referrers(self, digest: Digest, artifact_type: str) -> list[Descriptor]:
        """The descriptors of ``artifact_type`` that refer to manifest ``digest``; empty where there are none."""
        return await referrers.referrers(self._transport, self.place, parse_digest(digest), artifact_type)

    async def attach_referrer_tag(self, subject: Digest, descriptor: Descriptor) -> bool:
        """Add ``descriptor`` to the list under ``subject``'s fallback tag; False where it was there already.

        For registries that did not answer a push with ``OCI-Subject`` (`PushedManifest.subject_handled`).
        """
        return await referrers.attach(self._transport, self.place, parse_digest(subject), descriptor)
