# SPDX-License-Identifier: Apache-2.0
"""Where other nodes' fetchers get spans that this node owns: an HTTP server. Off unless configured.

    GET /v1/spans/<layer>/<zTOC>/<first>-<last>    a run of spans
    GET /v1/ztoc/<layer>/<zTOC>                    the zTOC

    200  the run's compressed bytes, each span of its digest; the zTOC's
    202  they are on their way from the registry, or too many ask: ask again
    401  not proven to be of this cluster (`soci_fetcher.peers_auth`)
    424  the registry refuses them to this node, or they cannot be kept here: ask it yourself
    502  the registry failed
    503  more requests than nonces can be remembered of

Bytes go from the page cache to the socket by sendfile(2), but with TLS.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from soci.digest import parse_digest
from soci.errors import (
    InvalidConfig,
    InvalidInput,
    LimitExceeded,
    Mismatch,
    NotFound,
    SociError,
    Unauthorized,
    Unavailable,
)
from soci_fetcher.peers_auth import Asked, Guard
from soci_fetcher.peers_own import KEPT_SECONDS, Key, OpenLayer, Owned
from soci_runtime.logs import log

REQUESTS_MAX: Final = 256
"""Requests at a time; more are told to come again."""
REQUEST_BYTES: Final = 64 << 20
"""Compressed bytes of one answer."""
COMING_SECONDS: Final = 0.3
"""How long an asker waits for bytes that are still to come before it is told that they are coming."""
SLOWEST_SEND: Final = 1 << 20
SEND_SECONDS: Final = 5.0
"""An asker that takes fewer bytes a second than the one, over the time that they take and the other, is cut off."""
PIECE: Final = 1 << 20
TLS_PIECE: Final = 1 << 18
"""Bytes handed to the socket at a time; with TLS, where they are in our memory."""
CONNECTIONS_MAX: Final = 4096
"""Connections at a time; more are closed at once."""
REQUEST_SECONDS: Final = 10.0
"""In so long a new connection must have made a request, and its TLS handshake before."""
KEEP_ALIVE_SECONDS: Final = 35.0
"""So long an idle connection stays: a little longer than with who asks."""
HEADER_BYTES: Final = 4096
"""Bytes of a request's line, and of a header."""
CLOSE_SECONDS: Final = 2.0
"""How long requests under way get on the way out."""
PORTS: Final = 16
"""So many ports are tried, from the configured one on: one for each fetcher of a node."""
PORT_LAST: Final = 65_535
SPANS_PATH: Final = "/v1/spans/{layer}/{ztoc}/{first:[0-9]{1,9}}-{last:[0-9]{1,9}}"
ZTOC_PATH: Final = "/v1/ztoc/{layer}/{ztoc}"

_ELSEWHERE = (Unauthorized, NotFound, LimitExceeded, Mismatch, InvalidInput)
"""Errors which say that another node may fare better."""


def path_of(key: Key, run: range) -> str:
    """The path that stands for a run."""
    return f"/v1/spans/{key[0]}/{key[1]}/{run.start}-{run[-1]}"


def ztoc_path(key: Key) -> str:
    """The path that stands for a layer's zTOC."""
    return f"/v1/ztoc/{key[0]}/{key[1]}"


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes of an open file."""

    file: int
    start: int
    size: int


class Door:
    """Answers for what is `Owned`."""

    def __init__(self, owned: Owned, guard: Guard, clock: Callable[[], float] = time.time) -> None:
        self._owned = owned
        self._guard = guard
        self._clock = clock
        self._under_way = 0
        self.strangers: set[asyncio.BaseProtocol] = set()  # connections that have made no request yet

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """One run, or a zTOC."""
        self.strangers.discard(request.protocol)
        if self._under_way >= REQUESTS_MAX:
            return _refuse(202, "busy")
        self._under_way += 1
        try:
            return await self._answer(request)
        except Unauthorized as error:  # of the asker; the registry's is told with 424
            log.warning("a peer was refused", peer=request.remote, why=str(error))
            return _refuse(401, str(error))
        except InvalidInput as error:
            return _refuse(400, str(error))
        except LimitExceeded as error:
            return _refuse(503, str(error))
        finally:
            self._under_way -= 1

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        asked = self._guard.admit(request.method, request.raw_path, request.headers, self._clock())
        found = request.match_info
        key = (parse_digest(found["layer"]), parse_digest(found["ztoc"]))
        run = range(int(found["first"]), int(found["last"]) + 1) if "first" in found else None
        if (run is not None and not run) or not asked.ztoc_size.isdecimal():
            raise InvalidInput("no run of spans, or of no zTOC with a size")
        try:
            async with asyncio.timeout(COMING_SECONDS) as patience:
                await self._owned.prepare(asked.image, key, int(asked.ztoc_size))
        except TimeoutError:
            if not patience.expired():
                raise
            return _refuse(202, "its zTOC is coming")
        except SociError as error:
            return _failed(error)
        try:
            async with self._owned.opened(key, KEPT_SECONDS) as layer:
                return await (self._run(request, asked, key, layer, run) if run else _ztoc(request, layer))
        except SociError as error:
            return _failed(error)

    async def _run(
        self, request: web.Request, asked: Asked, key: Key, layer: OpenLayer, run: range
    ) -> web.StreamResponse:
        size = _size(layer, run)
        waits = self._owned.start(asked.image, key, layer, run, asked.why)
        if waits:
            _, coming = await asyncio.wait(waits, timeout=COMING_SECONDS)
            if coming:
                return _refuse(202, "coming")
            for one in waits:
                one.result()
        if layer.compressed.missing(run):
            return _refuse(202, "dropped meanwhile")
        start = layer.compressed.spans.compressed(run.start)[0]
        return await _send(request, _Part(layer.compressed.fileno(), start, size))


async def _ztoc(request: web.Request, layer: OpenLayer) -> web.StreamResponse:
    if layer.ztoc_size > REQUEST_BYTES:
        raise LimitExceeded(f"a zTOC of {layer.ztoc_size} bytes; at most {REQUEST_BYTES} are given to others")
    with (layer.reader.directory / "ztoc").open("rb") as file:
        return await _send(request, _Part(file.fileno(), 0, layer.ztoc_size))


def _size(layer: OpenLayer, run: range) -> int:
    spans = layer.compressed.spans
    if run.stop > spans.count:
        raise InvalidInput(f"the layer has {spans.count} spans")
    size = spans.compressed(run[-1])[1] - spans.compressed(run.start)[0]
    if size > REQUEST_BYTES:
        raise LimitExceeded(f"{size} bytes at once; at most {REQUEST_BYTES} are allowed")
    return size


def _refuse(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=text[:1000] + "\n")


def _failed(error: SociError) -> web.Response:
    return _refuse(424 if isinstance(error, _ELSEWHERE) else 502, f"{error.code}: {error}")


async def _send(request: web.Request, part: _Part) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
    response.content_length = part.size
    end = part.start + part.size
    try:
        async with asyncio.timeout(SEND_SECONDS + part.size / SLOWEST_SEND):
            await response.prepare(request)
            transport = request.transport
            if transport is None:
                raise ConnectionResetError
            if transport.get_extra_info("ssl_object") is None:
                await _sendfile(transport, part)
            else:
                for at in range(part.start, end, TLS_PIECE):
                    await response.write(os.pread(part.file, min(TLS_PIECE, end - at), at))
            await response.write_eof()
    except OSError as error:  # TimeoutError is one
        # The head is out: only a cut tells that the rest does not come.
        log.info("a peer was cut off", peer=request.remote, error=type(error).__name__)
        if request.transport is not None:
            request.transport.abort()
    return response


async def _sendfile(transport: asyncio.WriteTransport, part: _Part) -> None:
    """As `loop.sendfile`, which uvloop has not: by a descriptor of our own for the same socket."""
    while transport.get_write_buffer_size():  # noqa: ASYNC110  the head goes first, and nothing tells when it went
        await asyncio.sleep(0.001)
    loop = asyncio.get_running_loop()
    out = os.dup(transport.get_extra_info("socket").fileno())
    start, size = part.start, part.size
    try:
        while size:
            try:
                sent = os.sendfile(out, part.file, start, min(size, PIECE))
            except BlockingIOError:
                await _writable(loop, out)
                continue
            if not sent:
                raise OSError("the file is cut short")
            start, size = start + sent, size - sent
            await asyncio.sleep(0)  # others have their turn
    finally:
        os.close(out)


async def _writable(loop: asyncio.AbstractEventLoop, descriptor: int) -> None:
    ready = loop.create_future()
    loop.add_writer(descriptor, _set, ready)
    try:
        await ready
    finally:
        loop.remove_writer(descriptor)


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def server_tls(cert: str, key: str, ca: str) -> ssl.SSLContext | None:
    """The server's side of TLS; None where no certificate is configured. With ``ca`` peers must show one of it."""
    if not cert:
        return None
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca or None)
        context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise InvalidConfig(f"peer_tls_cert, peer_tls_key or peer_tls_ca cannot be used: {error}") from error
    if ca:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


class _Gate:
    """Makes what speaks HTTP on each new connection: so many at a time, and only with who soon makes a request."""

    def __init__(self, server: web.Server, strangers: set[asyncio.BaseProtocol]) -> None:
        self._server = server
        self._strangers = strangers

    def __call__(self) -> asyncio.BaseProtocol:
        if len(self._server.connections) >= CONNECTIONS_MAX:
            return _Closed()
        protocol = self._server()
        self._strangers.add(protocol)
        asyncio.get_running_loop().call_later(REQUEST_SECONDS, self._look, protocol)
        return protocol

    def _look(self, protocol: web.RequestHandler) -> None:
        if protocol in self._strangers:
            self._strangers.discard(protocol)
            protocol.force_close()


class _Closed(asyncio.Protocol):
    """A connection that is one too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


@asynccontextmanager
async def listening(door: Door, host: str, port: int, tls: ssl.SSLContext | None) -> AsyncIterator[int]:
    """Listen while the block runs; yields the port: the configured one, or one of the next where other fetchers of
    this node have it. `Unavailable` where none can be had.
    """
    application = web.Application(client_max_size=HEADER_BYTES)
    application.router.add_get(SPANS_PATH, door.answer)
    application.router.add_get(ZTOC_PATH, door.answer)
    runner = web.AppRunner(
        application,
        access_log=None,
        shutdown_timeout=CLOSE_SECONDS,
        keepalive_timeout=KEEP_ALIVE_SECONDS,
        max_line_size=HEADER_BYTES,
        max_field_size=HEADER_BYTES,
        handler_cancellation=True,
    )
    await runner.setup()
    try:
        if runner.server is None:
            raise RuntimeError("no server")
        bound = _bound(host, port)
        gate = _Gate(runner.server, door.strangers)
        handshake = REQUEST_SECONDS if tls else None
        server = await asyncio.get_running_loop().create_server(
            gate, sock=bound, ssl=tls, ssl_handshake_timeout=handshake
        )
        try:
            yield int(bound.getsockname()[1])
        finally:
            server.close()
    finally:
        await runner.cleanup()


def _bound(host: str, port: int) -> socket.socket:
    last = min(port + PORTS, PORT_LAST + 1) if port else 1
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    problem: OSError | None = None
    for tried in range(port, last):
        try:
            return socket.create_server((host, tried), family=family, dualstack_ipv6=host == "::")
        except OSError as error:
            problem = error
    why = problem.strerror if problem else "no such port"
    raise Unavailable(f"peer_listen {host}:{port} and the next ports: {why}") from problem
