# SPDX-License-Identifier: Apache-2.0
"""Manifests and blobs of one repository: read whole, in ranges, as a stream; manifests also written."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Protocol

from soci.digest import Digest, new_hash, parse_digest, sha256_digest
from soci.errors import (
    InvalidDigest,
    InvalidReference,
    LimitExceeded,
    Mismatch,
    SociError,
    Unauthorized,
)
from soci.oci import DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST
from soci_registry.failure import Kind, TryError
from soci_registry.ranges import parse_content_range, parse_length, resume_for, skip_for
from soci_registry.room import Room
from soci_registry.settings import MANIFEST_BYTES_MAX, RegistrySettings
from soci_registry.transport import Transport, shown
from soci_registry.urls import Place
from soci_registry.wire import Answer, Body, Request, heads_of, read_bounded, read_into

ACCEPT = f"{OCI_MANIFEST}, {OCI_INDEX}, {DOCKER_MANIFEST}, {DOCKER_LIST}"

_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9!#$&^_.+-]{1,127}/[A-Za-z0-9!#$&^_.+-]{1,127}")
# 405 and 501: a server that has no HEAD.
_HEAD_ANSWERS = frozenset({200, 405, 501})
_PARTIAL = frozenset({200, 206})
_BROKEN = frozenset({Kind.SHORT, Kind.STALL})


@dataclass(frozen=True, slots=True)
class Fetched:
    """A manifest or image index: its bytes as they came, and what the registry calls them."""

    content: bytes
    media_type: str
    digest: Digest


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a reference stands for now. ``size`` is in bytes."""

    digest: Digest
    media_type: str
    size: int


@dataclass(frozen=True, slots=True)
class PushedManifest:
    """A manifest that the registry has taken.

    ``subject_handled``: the registry maintains the list of referrers itself (it answered with ``OCI-Subject``).
    """

    digest: Digest
    subject_handled: bool


def digest_of(reference: str) -> Digest | None:
    """``reference`` as a digest, or None for a tag; `InvalidReference` for neither."""
    if _TAG.fullmatch(reference):
        return None
    try:
        return parse_digest(reference)
    except InvalidDigest as error:
        raise InvalidReference(f"neither a tag nor a digest: {reference[:100]!r}") from error


def matches(content: bytes, digest: Digest) -> bool:
    """Whether ``content`` has ``digest``."""
    state = new_hash(digest)
    state.update(content)
    return state.hexdigest() == digest.partition(":")[2]


async def fetch_manifest(transport: Transport, place: Place, reference: str) -> Fetched:
    """The manifest under a tag or digest, checked against the digest asked for and the one the registry names."""
    wanted = digest_of(reference)
    what = f"manifest {reference} of {place.repository}"

    async def read(answer: Answer) -> Fetched:
        content = await read_bounded(answer, MANIFEST_BYTES_MAX, what)
        digest = wanted or _claimed(answer) or sha256_digest(content)
        if not matches(content, digest):
            raise TryError(Kind.MISMATCH, f"the content is not {digest}")
        return Fetched(content, _media_type(answer), digest)

    url = place.url("manifests", reference)
    return await transport.call(Request("GET", url, place.access(), {"Accept": ACCEPT}), read)


async def resolve(transport: Transport, place: Place, reference: str) -> Resolved:
    """Digest, media type and size of a manifest, by HEAD where the registry tells all three."""
    wanted = digest_of(reference)

    async def read(answer: Answer) -> Resolved | None:
        if answer.status != 200:
            return None
        digest = wanted or _claimed(answer)
        size = parse_length(answer.header("content-length"))
        return None if digest is None or size is None else Resolved(digest, _media_type(answer), size)

    url = place.url("manifests", reference)
    head = Request("HEAD", url, place.access(), {"Accept": ACCEPT}, expect=_HEAD_ANSWERS)
    found = await transport.call(head, read)
    if found is not None:
        return found
    fetched = await fetch_manifest(transport, place, reference)
    return Resolved(fetched.digest, fetched.media_type, len(fetched.content))


def _claimed(answer: Answer) -> Digest | None:
    try:
        return parse_digest(answer.header("docker-content-digest") or "")
    except InvalidDigest:
        return None


def _media_type(answer: Answer) -> str:
    found = (answer.header("content-type") or "").partition(";")[0].strip()
    return found if _MEDIA_TYPE.fullmatch(found) else "application/octet-stream"


async def put_manifest(
    transport: Transport, place: Place, content: bytes, media_type: str, reference: str | None = None
) -> PushedManifest:
    """PUT a manifest under a tag, a digest, or (None) its own sha256 digest.

    `Mismatch` where the content is not of that digest, or where the registry says that it took something else.
    """
    if len(content) > MANIFEST_BYTES_MAX:
        raise LimitExceeded(f"manifest of {len(content)} bytes, limit {MANIFEST_BYTES_MAX}")
    own = sha256_digest(content)
    digest = own if reference is None else digest_of(reference) or own
    if not matches(content, digest):
        raise Mismatch(f"manifest: the content is not {digest}")

    async def read(answer: Answer) -> PushedManifest:
        claimed = _claimed(answer)
        if claimed is not None and not matches(content, claimed):
            raise TryError(Kind.MISMATCH, f"the registry took {claimed}, sent was {digest}")
        return PushedManifest(digest, subject_handled=answer.header("oci-subject") is not None)

    request = Request(
        "PUT",
        place.url("manifests", reference or digest),
        place.access("pull,push"),
        {"Content-Type": media_type},
        Body(content, len(content)),
        frozenset({200, 201, 202}),
    )
    return await transport.call(request, read)


async def blob_size(transport: Transport, place: Place, digest: Digest) -> int:
    """The blob's size in bytes: by HEAD, or by a range of one byte where HEAD is mute. `NotFound` where it is not."""
    url = place.url("blobs", digest)

    async def read_length(answer: Answer) -> int | None:
        return parse_length(answer.header("content-length")) if answer.status == 200 else None

    async def read_total(answer: Answer) -> int | None:
        if answer.status == 200:
            return parse_length(answer.header("content-length"))
        found = parse_content_range(answer.header("content-range"))
        return found.total if found else None

    size: int | None = None
    # A store's URL that is signed for GET alone refuses HEAD.
    with suppress(Unauthorized):
        size = await transport.call(Request("HEAD", url, place.access(), expect=_HEAD_ANSWERS), read_length)
    if size is None:
        probe = Request("GET", url, place.access(), {"Range": "bytes=0-0"}, expect=_PARTIAL, bulk=True)
        size = await transport.call(probe, read_total)
    if size is None:
        raise Mismatch(f"blob {digest} of {place.repository}: the registry does not say its size")
    return size


async def fetch_blob(transport: Transport, place: Place, digest: Digest, limit: int) -> bytes:
    """A whole blob in memory, checked; `LimitExceeded` above ``limit`` bytes."""
    what = f"blob {digest} of {place.repository}"

    async def read(answer: Answer) -> bytes:
        content = await read_bounded(answer, limit, what)
        if not matches(content, digest):
            raise TryError(Kind.MISMATCH, f"the content is not {digest}")
        return content

    return await transport.call(_blob_request(place, digest, urgent=True), read)


def room_for(settings: RegistrySettings, start: int, end: int) -> Room:
    """Memory for bytes [start, end) of a blob; `LimitExceeded` where they are more than one range may have."""
    if not 0 <= start <= end:
        raise ValueError(f"not a range: {start}..{end}")
    if end - start > settings.range_max:
        raise LimitExceeded(f"a range of {end - start} bytes, limit {settings.range_max} (range_max)")
    return Room(end - start)


async def fill_range(  # noqa: PLR0913  where, what, how long
    transport: Transport,
    place: Place,
    digest: Digest,
    start: int,
    room: Room,
    *,
    deadline: float | None = None,
    urgent: bool = True,
) -> None:
    """Fill ``room`` with the bytes of a blob that begin at ``start``: exactly those, not checked against anything.

    What the room holds already is not asked for again, whether an earlier try or another host gave it.
    """
    settings = transport.settings
    url = place.url("blobs", digest)
    remember = (place.url("blobs", ""), digest)

    def rest() -> Request:
        headers = {"Range": f"bytes={start + room.count}-{start + room.size - 1}"}
        return Request(
            "GET", url, place.access(), headers, expect=_PARTIAL, remember=remember, bulk=True, urgent=urgent
        )

    async def read(answer: Answer) -> None:
        before = room.count
        skip = skip_for(heads_of(answer), start + before, start + room.size, settings.range_skip_max)
        try:
            await read_into(room, answer, skip)
        except TryError as error:
            if error.kind not in _BROKEN:
                room.count = before  # of a lie nothing is kept
            raise

    if room.missing:
        limit = settings.range_deadline if deadline is None else deadline
        await transport.call(rest, read, retry=settings.range_retry, deadline=limit)


class Way(Protocol):
    """How a stream goes on after a failure: the host to ask now, and what a failure there leads to."""

    @property
    def place(self) -> Place:
        """Where to ask."""

    async def failed(self, request: Request, error: TryError | SociError) -> None:
        """Wait, or turn to another host; raises the error for callers where nothing is left to try."""

    def progress(self) -> None:
        """So much has arrived that the tries are counted anew."""

    def served(self) -> None:
        """The host gave all that it was asked for."""

    def distrust(self, why: str) -> None:
        """What came was not the promised content."""


async def stream_blob(transport: Transport, way: Way, digest: Digest) -> AsyncGenerator[bytes, None]:
    """A whole blob in chunks; goes on from the last byte after a broken connection; `Mismatch` at the end if wrong.

    The bytes are proved only when the iterator ends without an error.
    """
    settings = transport.settings
    state = new_hash(digest)
    offset, proved = 0, 0
    size: int | None = None
    while True:
        request = _blob_request(way.place, digest, offset)
        try:
            async with transport.open(request) as answer:
                skip, size = resume_for(heads_of(answer), offset, size)
                async with aclosing(_after(answer, skip)) as chunks:
                    async for chunk in chunks:
                        state.update(chunk)
                        offset += len(chunk)
                        yield chunk
                if size is not None and offset < size:
                    raise TryError(Kind.SHORT, f"{offset} of {size} bytes arrived")
                break
        except (TryError, SociError) as error:
            if offset - proved >= settings.resume_progress:
                proved = offset
                way.progress()
            await way.failed(request, error)
    if (size is not None and offset != size) or state.hexdigest() != digest.partition(":")[2]:
        way.distrust(f"{digest} does not match")
        raise Mismatch(f"{shown(request)}: the {offset} bytes are not {digest}")
    way.served()


async def _after(answer: Answer, skip: int) -> AsyncGenerator[bytes, None]:
    async for chunk in answer.chunks():
        if skip >= len(chunk):
            skip -= len(chunk)
            continue
        yield chunk[skip:] if skip else chunk
        skip = 0
    if skip:
        raise TryError(Kind.SHORT, "the blob ends before the byte to go on from")


def _blob_request(place: Place, digest: Digest, offset: int = 0, *, urgent: bool = False) -> Request:
    return Request(
        "GET",
        place.url("blobs", digest),
        place.access(),
        {"Range": f"bytes={offset}-"} if offset else {},
        expect=_PARTIAL if offset else frozenset({200}),
        remember=(place.url("blobs", ""), digest),
        bulk=True,
        endless=True,
        urgent=urgent,
    )
