# SPDX-License-Identifier: Apache-2.0
"""The seam between our rules and the HTTP clients: one request out, one answer in.

Three wires implement it. Plain ranges, the hot path, have one of their own (`wire_raw`); whole blobs and uploads go
over aiohttp, which needs a third of httpx's CPU for a byte; httpx is the pleasanter client for the rest. Redirects,
credentials and retries are decided above the seam, once for all.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from soci.errors import InvalidConfig, LimitExceeded
from soci_registry.failure import Kind, TryError
from soci_registry.ranges import Heads, parse_length
from soci_registry.room import Room
from soci_registry.settings import RegistrySettings
from soci_registry.urls import Access

BodySource = Callable[[], AsyncIterator[bytes]]
"""Makes the body anew for each try."""

_WHOLE_ANSWER = frozenset({200})


@dataclass(frozen=True, slots=True)
class Body:
    """What is sent: bytes, or a source of chunks whose total is known beforehand."""

    source: bytes | BodySource
    size: int


@dataclass(frozen=True, slots=True)
class Request:
    """One request to a registry.

    ``expect`` are the statuses that make a good answer; ``remember`` keys the redirect target that is kept for the
    next request to the same blob; ``bulk`` chooses the wire that is made for many bytes.
    """

    method: str
    url: str
    access: Access
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Body | None = None
    expect: frozenset[int] = _WHOLE_ANSWER
    remember: tuple[str, str] | None = None
    bulk: bool = False
    endless: bool = False
    """No limit on the whole time of a try: the body is as long as a layer."""
    urgent: bool = True
    """Somebody waits: it may take the slots that are kept for such requests."""


class Answer(Protocol):
    """An answer whose body has not been read yet. Errors while reading it are `TryError`."""

    @property
    def status(self) -> int:
        """The status code."""

    def header(self, name: str) -> str | None:
        """The header's value, repeated ones joined by commas; None where absent."""

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives, once, undecoded."""

    async def fill(self, room: Room) -> None:
        """The body's bytes into ``room``, to the body's end; `TryError` where there are more than it takes."""


class Wire(Protocol):
    """An HTTP client without redirects, cookies, retries or credentials of its own."""

    def send(self, request: Request, url: str, authorization: str | None) -> AbstractAsyncContextManager[Answer]:
        """Send ``request`` to ``url``; the answer's headers are there on entry. Failures are `TryError`."""


class Particular(Wire, Protocol):
    """A wire that is made for some requests alone."""

    def can_send(self, request: Request, url: str) -> bool:
        """Whether ``request`` to ``url`` is one of them."""


@dataclass(frozen=True, slots=True)
class Wires:
    """All wires as one. A host with manners of its own goes over the bulk one: it takes TLS and times a request."""

    small: Wire
    bulk: Wire
    ranges: Particular | None = None
    """For those bulk requests that it can send."""

    def send(self, request: Request, url: str, authorization: str | None) -> AbstractAsyncContextManager[Answer]:
        """Send over the wire that is made for ``request``."""
        wire = self.bulk if request.bulk or request.access.manner is not None else self.small
        if request.bulk and self.ranges is not None and self.ranges.can_send(request, url):
            wire = self.ranges
        return wire.send(request, url, authorization)


def tls_context(settings: RegistrySettings) -> ssl.SSLContext:
    """The trust of both wires."""
    try:
        return ssl.create_default_context(cafile=settings.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise InvalidConfig(f"certificate authorities {settings.ca_file}: {error}") from error


def certificate_refused(error: BaseException) -> bool:
    """Whether a certificate was the cause: another try won't change it."""
    seen: BaseException | None = error
    for _ in range(8):
        if seen is None:
            return False
        if isinstance(seen, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY_FAILED" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def describe(error: BaseException) -> str:
    """What a client's exception says about itself that cannot hold a URL."""
    reason = getattr(error, "strerror", None)
    return f"{type(error).__name__}: {reason}" if isinstance(reason, str) else type(error).__name__


def safe_cause(error: BaseException) -> BaseException | None:
    """``error`` as a cause to raise from, or None where its text may show a URL with a signature."""
    return None if "?" in str(error) else error


def heads_of(answer: Answer) -> Heads:
    """The headers that decide what the body is. An encoded body (which was not asked for) is a `TryError`."""
    encoding = (answer.header("content-encoding") or "identity").strip().lower()
    if encoding != "identity":
        raise TryError(Kind.BAD_ANSWER, f"the body is encoded ({encoding[:20]!r}), which was not asked for")
    return Heads(
        answer.status,
        answer.header("content-range"),
        answer.header("content-length"),
        answer.header("content-type"),
    )


async def read_bounded(answer: Answer, limit: int, what: str) -> bytes:
    """The whole body of a good answer; `LimitExceeded` beyond ``limit`` bytes, before they are read if possible."""
    length = parse_length(heads_of(answer).content_length)
    if length is not None and length > limit:
        raise LimitExceeded(f"{what}: {length} bytes, limit {limit}")
    parts: list[bytes] = []
    size = 0
    async for chunk in answer.chunks():
        size += len(chunk)
        if size > limit:
            raise LimitExceeded(f"{what}: more than {limit} bytes")
        parts.append(chunk)
    if length is not None and size != length:
        raise TryError(Kind.SHORT, f"{size} of {length} bytes arrived")
    return b"".join(parts)


async def read_into(room: Room, answer: Answer, skip: int) -> None:
    """Fill ``room`` with what follows the first ``skip`` bytes; what came before an error is counted in it.

    More bytes than it takes are an error unless the blob was sent whole.
    """
    if skip > 0 or answer.status == 200:
        await _read_from(room, answer, skip)
    else:
        await answer.fill(room)
    if room.missing:  # and yet the body came to its end: a lie, not a broken connection
        raise TryError(Kind.BAD_ANSWER, f"{room.count} of {room.size} bytes arrived")


async def _read_from(room: Room, answer: Answer, skip: int) -> None:
    async for chunk in answer.chunks():
        data = memoryview(chunk)[skip:]
        skip = max(0, skip - len(chunk))
        room.put(data[: room.missing])
        if not room.missing:
            break


async def fill_from(chunks: AsyncIterator[bytes], room: Room) -> None:
    """What `Answer.fill` does where bytes come in chunks. It reads on after the last one: a byte more is a lie."""
    async for chunk in chunks:
        if len(chunk) > room.missing:
            raise TryError(Kind.BAD_ANSWER, f"more than the {room.size} bytes that were asked for")
        room.put(chunk)


async def read_head(answer: Answer, limit: int) -> bytes:
    """The first ``limit`` bytes of an error's body; whatever goes wrong is no news about an answer already bad."""
    head = b""
    try:
        async for chunk in answer.chunks():
            head += chunk[: limit - len(head)]
            if len(head) >= limit:
                break
    except TryError:
        pass
    return head
