# SPDX-License-Identifier: Apache-2.0
"""The wire for small answers: manifests, tokens, HEADs, uploads of small blobs."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Self

import httpx

from soci.errors import InvalidConfig
from soci_registry.failure import Kind, TryError
from soci_registry.room import Room
from soci_registry.settings import RegistrySettings
from soci_registry.urls import is_link_local, is_loopback, origin_of
from soci_registry.wire import Request, certificate_refused, describe, fill_from, safe_cause

# httpx logs each URL with its query at INFO: tokens and signatures would reach the log of the whole process.
logging.getLogger("httpx").setLevel(logging.WARNING)

LOOPBACK = ("all://localhost", "all://127.0.0.1", "all://[::1]")
_KEPT_CONNECTIONS = 32


class HttpxAnswer:
    """See `soci_registry.wire.Answer`."""

    __slots__ = ("_response", "status")

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self.status = response.status_code

    def header(self, name: str) -> str | None:
        """The header's value, repeated ones joined by commas."""
        value: str | None = self._response.headers.get(name)
        return value

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives."""
        try:
            async for chunk in self._response.aiter_raw():
                yield chunk
        except (httpx.HTTPError, httpx.StreamError, OSError) as error:
            raise _try_error(error) from safe_cause(error)

    async def fill(self, room: Room) -> None:
        """The body's bytes into ``room``, to the body's end."""
        await fill_from(self.chunks(), room)


class HttpxWire:
    """An async context manager; see `soci_registry.wire.Wire`. ``transport`` replaces the network in tests."""

    def __init__(
        self, settings: RegistrySettings, tls: ssl.SSLContext, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self._settings = settings
        self._tls = tls
        self._transport = transport
        self._client: httpx.AsyncClient | None = None

    async def __aenter__(self) -> Self:
        settings = self._settings
        timeout = httpx.Timeout(
            connect=settings.connect_timeout, read=settings.header_timeout, write=settings.stall_timeout, pool=None
        )
        try:
            client = self._new_client(timeout)
        except (ValueError, ImportError, httpx.InvalidURL) as error:
            raise InvalidConfig(f"the environment's proxies cannot be used: {type(error).__name__}") from None
        self._client = await client.__aenter__()
        return self

    def _new_client(self, timeout: httpx.Timeout) -> httpx.AsyncClient:
        settings = self._settings
        return httpx.AsyncClient(
            transport=self._transport,
            verify=self._tls,
            trust_env=settings.use_environment_proxies and self._transport is None,
            mounts=None if self._transport else dict.fromkeys(LOOPBACK),
            timeout=timeout,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=_KEPT_CONNECTIONS),
            follow_redirects=False,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            headers={"User-Agent": settings.user_agent, "Accept-Encoding": "identity"},
        )

    async def __aexit__(self, *_: object) -> None:
        if self._client is not None:
            await self._client.aclose()

    @asynccontextmanager
    async def send(self, request: Request, url: str, authorization: str | None) -> AsyncIterator[HttpxAnswer]:
        """Send ``request`` to ``url``; the body is read within ``total_timeout``."""
        if self._client is None:
            raise RuntimeError("the wire is not open")
        if origin_of(url) != request.access.origin:
            await refuse_link_local(url)
        headers = dict(request.headers)
        if authorization is not None:
            headers["Authorization"] = authorization
        content: bytes | AsyncIterator[bytes] | None = None
        if request.body is not None:
            source = request.body.source
            content = source if isinstance(source, bytes) else source()
            headers["Content-Length"] = str(request.body.size)
        try:
            built = self._client.build_request(request.method, url, headers=headers, content=content)
            response = await self._client.send(built, stream=True)
        except httpx.InvalidURL:
            raise TryError(Kind.MALFORMED, "not a URL") from None
        except (httpx.HTTPError, OSError) as error:
            raise _try_error(error) from safe_cause(error)
        try:
            yield HttpxAnswer(response)
        finally:
            await response.aclose()


async def refuse_link_local(url: str) -> None:
    """Refuse (`TryError`) a target whose name stands for a link-local address: cloud metadata lives there.

    A name that does not resolve is left to the client: behind a proxy only the proxy can resolve it.
    """
    origin = origin_of(url)
    if is_loopback(origin.host):
        return
    try:
        found = await asyncio.get_running_loop().getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return
    if any(is_link_local(str(address[4][0])) for address in found):
        raise TryError(Kind.REDIRECT, f"{origin.host} is a link-local address: refused")


def _try_error(error: Exception) -> TryError:
    if certificate_refused(error):
        return TryError(Kind.TLS, "the server's certificate is not trusted")
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError)):
        return TryError(Kind.CONNECT, f"no connection ({describe(error)})")
    if isinstance(error, httpx.TimeoutException):
        return TryError(Kind.STALL, f"no byte for too long ({describe(error)})")
    if isinstance(error, httpx.UnsupportedProtocol):
        return TryError(Kind.MALFORMED, "not an http or https URL")
    return TryError(Kind.SHORT, f"the connection broke ({describe(error)})")
