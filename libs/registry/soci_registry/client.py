# SPDX-License-Identifier: Apache-2.0
"""The face of this library: a `Registry` a process, a `Repository` an image."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

import httpx

from soci.digest import Digest, parse_digest, sha256_digest
from soci.errors import NotFound
from soci.oci import Descriptor
from soci.reference import Reference, parse_reference
from soci_registry import fetch, push
from soci_registry import referrers as lists
from soci_registry.auth import Authorizer
from soci_registry.budget import Budget
from soci_registry.credentials import Credentials
from soci_registry.fetch import Fetched, PushedManifest, Resolved
from soci_registry.gates import Gates
from soci_registry.health import Health, Tell, silent
from soci_registry.hosts import HostBook
from soci_registry.mirrors import Mirrors
from soci_registry.route import Route, route_of
from soci_registry.settings import RegistrySettings
from soci_registry.slots import SlotBook
from soci_registry.transport import Transport
from soci_registry.urls import Place, place_of
from soci_registry.wire import Wires, tls_context
from soci_registry.wire_aiohttp import AiohttpWire
from soci_registry.wire_httpx import HttpxWire
from soci_registry.wire_raw import RawWire

SERVED_MAX = 256
"""Ranges that a `Repository` remembers to have been given."""


class Registry:
    """All registries, through the HTTP clients that it owns: an async context manager, one a process.

    ``hosts`` knows mirrors; ``tell`` hears when one of them fails and when it is used again. With the same ``budget``
    folder all processes of the node share the requests that a host may have at a time, and its ``Retry-After``.
    ``small_transport`` replaces the network under manifests and tokens, in tests.
    """

    def __init__(  # noqa: PLR0913  two of them for tests and for the log
        self,
        *,
        settings: RegistrySettings,
        credentials: Credentials,
        hosts: HostBook | None = None,
        tell: Tell = silent,
        budget: Path | None = None,
        small_transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.settings = settings
        self._hosts = hosts or HostBook()
        tls = tls_context(settings)
        self._small = HttpxWire(settings, tls, small_transport)
        self._bulk = AiohttpWire(settings, tls)
        self._ranges = RawWire(settings, tls)
        wires = Wires(self._small, self._bulk, self._ranges if settings.raw_ranges else None)
        authorizer = Authorizer(wire=wires, credentials=credentials, settings=settings)
        limits = Budget(settings.connections_per_host)
        self._gates = Gates(SlotBook(limits, budget, pause_max=settings.retry_after_max, tell=tell))
        transport = Transport(wire=wires, authorizer=authorizer, settings=settings, gates=self._gates, tell=tell)
        health = Health(least=settings.mirror_aside_min, most=settings.mirror_aside_max, tell=tell)
        self._mirrors = Mirrors(transport, health)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._small)
            await stack.enter_async_context(self._bulk)
            await stack.enter_async_context(self._ranges)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()
        self._gates.close()

    def repository(self, image: str | Reference) -> Repository:
        """The repository of ``image``; its tag and digest don't matter. `InvalidReference` where it is none.

        `InvalidConfig` where the hosts that are configured for its registry cannot be used.
        """
        reference = parse_reference(image) if isinstance(image, str) else image
        name, repository = reference.registry, reference.repository
        place = place_of(name, repository, self.settings.plain_http)
        hosts = self._hosts.hosts(name)
        route = route_of(place, hosts, repository, name) if hosts else Route.only(place)
        return Repository(route, self._mirrors)


class Repository:
    """One repository of one registry, which may have mirrors; cheap to make.

    Every method raises `Unauthorized`, `NotFound` or `RegistryUnavailable`, after the tries that the settings allow,
    and `Mismatch` for content that is not what its digest promised. What is read may come from any of the registry's
    hosts; what is pushed goes to the registry itself.
    """

    def __init__(self, route: Route, mirrors: Mirrors) -> None:
        self._route = route
        self._mirrors = mirrors
        self._transport = mirrors.transport
        self._served: deque[tuple[Digest, int, int, frozenset[Place]]] = deque(maxlen=SERVED_MAX)

    @property
    def place(self) -> Place:
        """The registry's own place: where pushes go."""
        return self._route.own

    def _places(self, reference: str) -> tuple[Place, ...]:
        return self._route.resolve if fetch.digest_of(reference) is None else self._route.pull

    async def manifest(self, reference: str | Digest) -> Fetched:
        """The manifest under a tag or digest, at most `MANIFEST_BYTES_MAX` (`LimitExceeded`)."""
        places = self._places(reference)
        return await self._mirrors.first(places, lambda by, place: fetch.fetch_manifest(by, place, reference))

    async def resolve(self, reference: str | Digest) -> Resolved:
        """Digest, media type and size of the manifest under a tag or digest, without its content if possible."""
        places = self._places(reference)
        return await self._mirrors.first(places, lambda by, place: fetch.resolve(by, place, reference))

    async def manifest_exists(self, reference: str | Digest) -> int | None:
        """The manifest's size in bytes, or None where there is none."""
        try:
            return (await self.resolve(reference)).size
        except NotFound:
            return None

    async def blob_exists(self, digest: Digest) -> int | None:
        """The blob's size in bytes, or None where there is none."""
        known = parse_digest(digest)
        try:
            return await self._mirrors.first(self._route.pull, lambda by, place: fetch.blob_size(by, place, known))
        except NotFound:
            return None

    async def blob(self, digest: Digest, *, limit: int) -> bytes:
        """A whole blob, checked; `LimitExceeded` above ``limit`` bytes."""
        known = parse_digest(digest)
        return await self._mirrors.first(self._route.pull, lambda by, place: fetch.fetch_blob(by, place, known, limit))

    def blob_stream(self, digest: Digest) -> AsyncGenerator[bytes, None]:
        """A whole blob in chunks, resumed after broken connections; `Mismatch` after the last one if it is wrong.

        Close it where it is left early: ``async with aclosing(repository.blob_stream(digest)) as chunks``.
        """
        return self._mirrors.stream(self._route.pull, parse_digest(digest))

    async def blob_range(
        self, digest: Digest, start: int, end: int, *, deadline: float | None = None, urgent: bool = True
    ) -> bytes:
        """Bytes [start, end) of a blob, exactly as many; what they hold is the caller's to check.

        ``urgent`` is said of what somebody waits for: it may use the slots that are kept free for that.
        Tried for ``deadline`` seconds (None: ``settings.range_deadline``), then `DeadlineExceeded`. Who asks the same
        object again for bytes of what it got (or all of it) says that they were wrong: the mirror that gave them is
        then left aside.
        """
        known = parse_digest(digest)
        self._doubt(known, lambda first, last: first <= start and end <= last)
        content, gave = await self._mirrors.range(self._route.pull, known, (start, end), deadline, urgent=urgent)
        if gave:
            self._served.append((known, start, end, gave))
        return content

    def distrust(self, digest: Digest) -> None:
        """What came of this blob was not the promised content: the mirrors that gave of it are left aside."""
        self._doubt(parse_digest(digest), lambda _first, _last: True)

    def _doubt(self, digest: Digest, concerned: Callable[[int, int], bool]) -> None:
        for one in [one for one in self._served if one[0] == digest and concerned(one[1], one[2])]:
            self._served.remove(one)
            self._mirrors.distrust(one[3], f"wrong bytes of {digest}")

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
        """The descriptors of ``artifact_type`` that refer to manifest ``digest``; empty where there are none.

        A host that knows none is no proof that there are none: the next one is asked.
        """
        known = parse_digest(digest)
        places = self._route.resolve

        async def attempt(by: Transport, place: Place) -> list[Descriptor]:
            found = await lists.referrers(by, place, known, artifact_type)
            if not found and len(places) > 1:
                raise NotFound(f"nothing of {artifact_type} refers to {known}")
            return found

        try:
            return await self._mirrors.first(places, attempt, blame=False)
        except NotFound:
            return []

    async def attach_referrer_tag(self, subject: Digest, descriptor: Descriptor) -> bool:
        """Add ``descriptor`` to the list under ``subject``'s fallback tag; False where it was there already.

        For registries that did not answer a push with ``OCI-Subject`` (`PushedManifest.subject_handled`).
        """
        return await lists.attach(self._transport, self.place, parse_digest(subject), descriptor)
