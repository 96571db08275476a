# SPDX-License-Identifier: Apache-2.0
"""The wire for many bytes: ranges (the hot path), whole blobs, uploads of files."""

from __future__ import annotations

import asyncio
import io
import math
import socket
import ssl
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from soci_registry.failure import Kind, TryError
from soci_registry.manner import PLAIN, Trust, context_of, headers_for
from soci_registry.room import Room
from soci_registry.settings import RegistrySettings
from soci_registry.urls import URL_LENGTH_MAX, is_link_local, is_loopback, origin_of
from soci_registry.wire import Request, certificate_refused, describe, fill_from, safe_cause

READ_BUFFER_BYTES = 1024 * 1024
"""How much may wait in a connection before its socket is paused: fewer pauses, and still bounded memory."""

KEEP_ALIVE_SECONDS = 30.0


class AiohttpAnswer:
    """See `soci_registry.wire.Answer`."""

    __slots__ = ("_min_rate", "_response", "_window", "status")

    def __init__(self, response: aiohttp.ClientResponse, *, min_rate: int, window: float) -> None:
        self._response = response
        self._min_rate = min_rate
        self._window = window
        self.status = response.status

    def header(self, name: str) -> str | None:
        """The header's value, repeated ones joined by commas."""
        values = self._response.headers.getall(name, ())
        return ", ".join(values) if values else None

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives: each chunk is what came in one read of the socket, not copied again.

        A body that stays under the least rate for a whole window is given up (`Kind.STALL`). The time that the
        consumer takes is not counted against the server.
        """
        clock = asyncio.get_running_loop().time
        waited, arrived = 0.0, 0
        try:
            while True:
                asked = clock()
                chunk, _ = await self._response.content.readchunk()
                if not chunk:
                    if self._response.content.at_eof():
                        return
                    continue
                waited += clock() - asked
                arrived += len(chunk)
                if waited >= self._window:
                    if arrived < self._min_rate * waited:
                        raise TryError(Kind.STALL, f"{arrived} bytes in {waited:.0f} s: too slow")
                    waited, arrived = 0.0, 0
                yield chunk
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _try_error(error) from safe_cause(error)

    async def fill(self, room: Room) -> None:
        """The body's bytes into ``room``, to the body's end."""
        await fill_from(self.chunks(), room)


class AiohttpWire:
    """An async context manager; see `soci_registry.wire.Wire`."""

    def __init__(self, settings: RegistrySettings, tls: ssl.SSLContext) -> None:
        self._settings = settings
        self._tls = tls
        self._proxies = urllib.request.getproxies() if settings.use_environment_proxies else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        settings = self._settings
        connector = aiohttp.TCPConnector(
            limit=0,  # connections are counted by host, above the wire
            ssl=self._tls,
            resolver=GuardedResolver(),
            keepalive_timeout=KEEP_ALIVE_SECONDS,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            read_bufsize=READ_BUFFER_BYTES,
            max_field_size=URL_LENGTH_MAX,  # a Location with a signature and a session token is long
            trust_env=False,  # it would also take credentials out of ~/.netrc
            headers={"User-Agent": settings.user_agent, "Accept-Encoding": "identity"},
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    def _proxy_for(self, url: URL) -> str | None:
        proxy = self._proxies.get(url.scheme)
        if not proxy or not url.host or is_loopback(url.host) or urllib.request.proxy_bypass(url.host):
            return None
        return proxy

    async def _context(self, trust: Trust | None, *, home: bool) -> ssl.SSLContext | bool:
        """The TLS context for a request: True is the session's own."""
        if trust is None:
            return True
        wanted = trust if home else trust.away()
        return await asyncio.to_thread(context_of, wanted, self._settings.ca_file)

    @asynccontextmanager
    async def send(self, request: Request, url: str, authorization: str | None) -> AsyncIterator[AiohttpAnswer]:
        """Send ``request`` to ``url``; a try takes ``total_timeout`` at most unless the request is endless."""
        if self._session is None:
            raise RuntimeError("the wire is not open")
        settings = self._settings
        manner = request.access.manner or PLAIN
        home = origin_of(url) == request.access.origin
        headers = headers_for(manner, request.headers, authorization, home=home)
        tls = await self._context(manner.trust, home=home)
        connect = manner.connect_timeout or settings.connect_timeout
        total = settings.total_timeout if manner.total_timeout is None else manner.total_timeout
        data: io.BytesIO | AsyncIterator[bytes] | None = None
        if request.body is not None:
            source = request.body.source
            data = io.BytesIO(source) if isinstance(source, bytes) else source()  # in pieces, not in one write
            headers["Content-Length"] = str(request.body.size)
        timeout = aiohttp.ClientTimeout(
            total=None if request.endless or math.isinf(total) else total,
            sock_connect=connect,
            sock_read=settings.stall_timeout,
        )
        # With a body to send, headers may be long in coming; the silence of the socket is watched all the same.
        first = None if request.body else connect + settings.header_timeout
        try:
            # As it stands: a signature covers the URL's exact spelling.
            target = URL(url, encoded=True)
            async with asyncio.timeout(first):
                response = await self._session.request(
                    request.method,
                    target,
                    headers=headers,
                    data=data,
                    timeout=timeout,
                    allow_redirects=False,
                    proxy=self._proxy_for(target),
                    ssl=tls,
                )
        except aiohttp.InvalidURL:
            raise TryError(Kind.MALFORMED, "not a URL") from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _try_error(error) from safe_cause(error)
        except ValueError:  # after the others: a refused certificate is a ValueError too
            raise TryError(Kind.MALFORMED, "not a URL, or a proxy that is none") from None
        try:
            yield AiohttpAnswer(response, min_rate=settings.min_rate, window=settings.stall_timeout)
        finally:
            # Gives the connection back if the body was read to its end, and closes it otherwise.
            response.release()


class LinkLocalRefusedError(OSError):
    """A name that stands for link-local addresses only."""


class GuardedResolver(AbstractResolver):
    """The system's resolver without link-local answers: no name leads to the metadata service of a cloud."""

    def __init__(self) -> None:
        self._system = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The addresses of ``host``; `OSError` where none is left."""
        found = await self._system.resolve(host, port, family)
        kept = [one for one in found if not is_link_local(one["host"])]
        if not kept:
            raise LinkLocalRefusedError
        return kept

    async def close(self) -> None:
        """Nothing to close."""
        await self._system.close()


def _try_error(error: Exception) -> TryError:
    if certificate_refused(error):
        return TryError(Kind.TLS, "the server's certificate is not trusted")
    if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, LinkLocalRefusedError):
        return TryError(Kind.REDIRECT, "the host's name stands for a link-local address: refused")
    if isinstance(
        error, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.ClientProxyConnectionError)
    ):
        return TryError(Kind.CONNECT, f"no connection ({describe(error)})")
    if isinstance(error, TimeoutError):
        return TryError(Kind.STALL, f"no byte for too long ({describe(error)})")
    return TryError(Kind.SHORT, f"the connection broke ({describe(error)})")
