# SPDX-License-Identifier: Apache-2.0
"""The wire for plain ranges, the hot path: a range's bytes go from the socket to the memory that is handed on.

It does no more than that. Requests with a body, of unbounded length, through a proxy, or to a host with manners of its
own go over the other wires (`can_send`).
"""

from __future__ import annotations

import asyncio
import ssl
import urllib.request
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self

from soci_registry.connection import Connection
from soci_registry.dial import addresses_of, dial
from soci_registry.failure import Kind, TryError
from soci_registry.http1 import Chunks, Head, framing_of, request_head
from soci_registry.pace import Limits, Pace
from soci_registry.room import Room
from soci_registry.settings import KIB, RegistrySettings
from soci_registry.urls import Origin, is_loopback, origin_of
from soci_registry.wire import Request, certificate_refused, describe, fill_from, safe_cause

KEPT_PER_HOST = 16
KEPT_MAX = 64
"""Connections that are kept open without a request, of a host and in all; the one kept for longest goes first."""

KEEP_ALIVE_SECONDS = 30.0

CLOSE_SECONDS = 2.0
"""How long the end waits for connections to be closed, which takes no time unless the loop is in trouble."""

PIECE_BYTES = 256 * KIB
"""Of a body that is read in pieces: one that is not the range that was asked for."""


class RawAnswer:
    """See `soci_registry.wire.Answer`."""

    def __init__(self, connection: Connection, head: Head, begun: bytes) -> None:
        self._connection = connection
        self._head = head
        self._framing = framing_of(head)
        self._begun = begun
        self.status = head.status
        self.ended = self._framing.size == 0
        """The body was read to its end."""

    def header(self, name: str) -> str | None:
        """The header's value, repeated ones joined by commas."""
        return self._head.fields.get(name.lower())

    @property
    def reusable(self) -> bool:
        """Whether the connection is good for another request."""
        clear = self._framing.chunked or self._framing.size is not None
        return self.ended and clear and self._head.keeps_open and (self._framing.size != 0 or not self._begun)

    async def fill(self, room: Room) -> None:
        """The body's bytes into ``room``, by the event loop itself where their number is known."""
        size = self._framing.size
        if size is None:
            await fill_from(self.chunks(), room)
            return
        if size > room.missing or len(self._begun) > size:
            raise TryError(Kind.BAD_ANSWER, f"more than the {room.size} bytes that were asked for")
        room.put(self._begun)
        left = size - len(self._begun)
        if left:
            sink = room.rest()[:left]
            try:
                await self._connection.receive(sink)
            finally:
                room.count += self._connection.received
                sink.release()
        self.ended = True

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives."""
        coding = Chunks() if self._framing.chunked else None
        left = self._framing.size
        data, self._begun = self._begun, b""
        buffer: memoryview | None = None
        while not self.ended:
            if data:
                if coding is not None:
                    for piece in coding.feed(memoryview(data)):
                        yield bytes(piece)
                    self.ended = coding.done
                elif left is None:
                    yield data
                else:
                    if len(data) > left:
                        raise TryError(Kind.BAD_ANSWER, "not HTTP: more bytes than the Content-Length")
                    left -= len(data)
                    self.ended = not left
                    yield data
            if self.ended:
                return
            buffer = buffer or memoryview(bytearray(PIECE_BYTES))
            count = await self._connection.receive(buffer, some=True)
            if not count and (coding is not None or left is not None):
                raise TryError(Kind.SHORT, "the connection ended before the body")
            self.ended = not count
            data = bytes(buffer[:count])


class RawWire:
    """An async context manager; see `soci_registry.wire.Wire`."""

    def __init__(self, settings: RegistrySettings, tls: ssl.SSLContext) -> None:
        self._settings = settings
        self._tls = tls
        self._proxies = urllib.request.getproxies() if settings.use_environment_proxies else {}
        self._common = {"User-Agent": settings.user_agent, "Accept": "*/*", "Accept-Encoding": "identity"}
        urgent = min(settings.stall_timeout, settings.urgent_stall_timeout)
        self._limits = {
            kind: Limits(settings.header_timeout, stall, settings.min_rate, settings.total_timeout)
            for kind, stall in ((True, urgent), (False, settings.stall_timeout))
        }
        self._kept: OrderedDict[Origin, deque[tuple[float, Connection]]] = OrderedDict()
        self._all: set[Connection] = set()
        self._sweep: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
        self._kept.clear()
        left = list(self._all)
        for one in left:
            one.abort()
        if left:
            await asyncio.wait([one.closed for one in left], timeout=CLOSE_SECONDS)

    def can_send(self, request: Request, url: str) -> bool:
        """Whether a request is one that this wire is made for."""
        if request.method != "GET" or request.body is not None or request.endless or "Range" not in request.headers:
            return False
        if request.access.manner is not None:
            return False
        if not self._proxies:
            return True
        origin = origin_of(url)
        bypassed = is_loopback(origin.host) or urllib.request.proxy_bypass(origin.host)
        return not self._proxies.get(origin.scheme) or bool(bypassed)

    @asynccontextmanager
    async def send(self, request: Request, url: str, authorization: str | None) -> AsyncIterator[RawAnswer]:
        """Send ``request`` to ``url``; a try takes ``total_timeout`` at most."""
        origin = origin_of(url)
        headers = {**self._common, **request.headers}
        if authorization is not None:
            headers["Authorization"] = authorization
        asked = request_head(request.method, url, headers)
        connection, head, begun = await self._ask(origin, asked, self._limits[request.urgent])
        try:
            answer = RawAnswer(connection, head, begun)
            yield answer
            if answer.reusable:
                connection.rest()
                if connection.usable:
                    self._keep(origin, connection)
                    return
            connection.abort()
        except BaseException:
            connection.abort()
            raise

    async def _ask(self, origin: Origin, asked: bytes, limits: Limits) -> tuple[Connection, Head, bytes]:
        """The head of the answer. A kept connection that ends without a byte is no answer: a new one is asked."""
        while True:
            kept = self._take(origin)
            connection = kept or await self._connect(origin)
            try:
                head, begun = await connection.ask(asked, Pace(limits, asyncio.get_running_loop().time()))
            except TryError as error:
                connection.abort()
                if kept is not None and not connection.heard:
                    self._forget(origin)  # what has silenced this one has silenced the others
                    if error.kind is Kind.SHORT:
                        continue
                raise
            except BaseException:
                connection.abort()
                raise
            return connection, head, begun

    async def _connect(self, origin: Origin) -> Connection:
        settings = self._settings
        loop = asyncio.get_running_loop()
        tls = self._tls if origin.scheme == "https" else None
        try:
            async with asyncio.timeout(settings.connect_timeout):
                made = await dial(await addresses_of(origin))
            # From here on the socket is the loop's, which closes it where this fails.
            async with asyncio.timeout(settings.header_timeout):
                _, connection = await loop.create_connection(
                    Connection, sock=made, ssl=tls, server_hostname=origin.host if tls else None
                )
        except (OSError, ValueError) as error:
            if certificate_refused(error):
                raise TryError(Kind.TLS, "the server's certificate is not trusted") from safe_cause(error)
            if isinstance(error, ValueError):  # a name that no resolver or certificate can have
                raise TryError(Kind.MALFORMED, "not a host's name") from None
            raise TryError(Kind.CONNECT, f"no connection ({describe(error)})") from safe_cause(error)
        self._all.add(connection)
        connection.closed.add_done_callback(lambda _: self._all.discard(connection))
        return connection

    # --- connections that are kept

    def _take(self, origin: Origin) -> Connection | None:
        row = self._kept.get(origin)
        while row:
            since, connection = row.pop()  # the one used last is the likeliest to be open
            if not row:
                del self._kept[origin]
            if connection.usable and asyncio.get_running_loop().time() - since < KEEP_ALIVE_SECONDS:
                return connection
            connection.abort()
        return None

    def _forget(self, origin: Origin) -> None:
        for _, connection in self._kept.pop(origin, ()):
            connection.abort()

    def _keep(self, origin: Origin, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        row = self._kept.setdefault(origin, deque())
        row.append((loop.time(), connection))
        self._kept.move_to_end(origin)
        if len(row) > KEPT_PER_HOST:
            row.popleft()[1].abort()
        while sum(map(len, self._kept.values())) > KEPT_MAX:
            self._forget(next(iter(self._kept)))
        if self._sweep is None:
            self._sweep = loop.call_later(KEEP_ALIVE_SECONDS, self._drop_old)

    def _drop_old(self) -> None:
        self._sweep = None
        loop = asyncio.get_running_loop()
        limit = loop.time() - KEEP_ALIVE_SECONDS
        for origin, row in list(self._kept.items()):
            while row and (row[0][0] <= limit or not row[0][1].usable):
                row.popleft()[1].abort()
            if not row:
                del self._kept[origin]
        if self._kept:
            self._sweep = loop.call_later(KEEP_ALIVE_SECONDS, self._drop_old)
