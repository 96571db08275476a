# SPDX-License-Identifier: Apache-2.0
"""A reverse proxy in front of a registry: counts what passes, and spoils it on demand.

It runs in a thread with its own event loop and streams: no body is ever held whole. The ``Host`` header is passed on
as it came, so that the registry's ``Location`` headers lead back through the proxy.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import threading
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from soci.errors import DeadlineExceeded
from soci_dev.faults import (
    Corrupt,
    Delay,
    Drop,
    Endless,
    Fault,
    Hook,
    IgnoreRange,
    Raw,
    Seen,
    ShiftRange,
    Short,
    Slow,
    Stall,
    Status,
)

CHUNK: Final = 256 * 1024
"""Bytes moved at a time; also the read buffer of a connection."""

MAX_CONNECTIONS: Final = 256
START_LIMIT_S: Final = 10.0
UPSTREAM_LIMIT_S: Final = 600.0
_SLOW_STEPS: Final = 20
"""Pieces of a slow body in each second."""
_RAW_POLL_S: Final = 0.005
_HOP_BY_HOP: Final = frozenset(
    {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade"}
)  # RFC 9110 §7.6.1


@dataclass(frozen=True, slots=True)
class PathCount:
    """Of one path: requests, and body bytes sent to clients."""

    requests: int = 0
    body_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Counts:
    """What passed since the last reset. ``body_bytes`` went to clients, ``uploaded_bytes`` to the registry."""

    get: int = 0
    head: int = 0
    other: int = 0
    body_bytes: int = 0
    uploaded_bytes: int = 0
    peak: int = 0
    paths: Mapping[str, PathCount] = field(default_factory=dict)

    @property
    def requests(self) -> int:
        """Of every method."""
        return self.get + self.head + self.other

    @property
    def blob_bytes(self) -> int:
        """Body bytes of blobs alone."""
        return sum(count.body_bytes for path, count in self.paths.items() if "/blobs/" in path)


class _Tally:
    """The counters, guarded: the loop's thread writes, others read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = 0
        self.reset()

    def reset(self) -> None:
        with self._lock:
            self._methods: dict[str, int] = {}
            self._paths: dict[str, list[int]] = {}
            self._sent = self._uploaded = self._number = 0
            self._peak = self._now

    def begin(self, method: str, path: str) -> int:
        with self._lock:
            self._number += 1
            self._now += 1
            self._peak = max(self._peak, self._now)
            self._methods[method] = self._methods.get(method, 0) + 1
            self._paths.setdefault(path, [0, 0])[0] += 1
            return self._number

    def end(self) -> None:
        with self._lock:
            self._now -= 1

    def sent(self, path: str, count: int) -> None:
        with self._lock:
            self._sent += count
            self._paths.setdefault(path, [0, 0])[1] += count

    def uploaded(self, count: int) -> None:
        with self._lock:
            self._uploaded += count

    def counts(self) -> Counts:
        with self._lock:
            get, head = self._methods.get("GET", 0), self._methods.get("HEAD", 0)
            paths = {path: PathCount(*pair) for path, pair in self._paths.items()}
            other = sum(self._methods.values()) - get - head
            return Counts(get, head, other, self._sent, self._uploaded, self._peak, paths)


class Proxy:
    """A counting proxy on a port of 127.0.0.1; a context manager.

    Args:
        upstream: ``host:port`` of a registry that speaks plain HTTP.
        rtt_s: seconds to wait before each answer's head.
        bandwidth: bytes a second that all answers share; None is no limit.
        hook: chooses a fault a request; also settable later as ``proxy.hook``.
    """

    def __init__(
        self, upstream: str, *, rtt_s: float = 0.0, bandwidth: int | None = None, hook: Hook | None = None
    ) -> None:
        self.upstream = upstream
        self.rtt_s = rtt_s
        self.bandwidth = bandwidth
        self.hook = hook
        self.address = ""
        self._tally = _Tally()
        self._next_free = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._ready = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(START_LIMIT_S):
            raise DeadlineExceeded("the proxy did not start")
        if self._failed:
            raise self._failed
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if self._loop and self._stop:
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_LIMIT_S)

    @property
    def counts(self) -> Counts:
        """A snapshot of the counters."""
        return self._tally.counts()

    def reset(self) -> None:
        """Set the counters to zero."""
        self._tally.reset()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001  (handed to the thread that waits for us)
            self._failed = error
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        application = web.Application(client_max_size=1 << 40)
        connector = aiohttp.TCPConnector(limit=MAX_CONNECTIONS)
        timeout = aiohttp.ClientTimeout(total=None, connect=UPSTREAM_LIMIT_S, sock_read=UPSTREAM_LIMIT_S)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, auto_decompress=False, read_bufsize=CHUNK
        ) as client:

            async def answer(request: web.Request) -> web.StreamResponse:
                return await self._handle(request, client)

            application.router.add_route("*", "/{path:.*}", answer)
            runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.5)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.address = f"127.0.0.1:{runner.addresses[0][1]}"
            self._ready.set()
            try:
                await self._stop.wait()
            finally:
                await runner.cleanup()

    async def _handle(self, request: web.Request, client: aiohttp.ClientSession) -> web.StreamResponse:
        path = request.rel_url.raw_path
        number = self._tally.begin(request.method, path)
        try:
            headers = {name.lower(): value for name, value in request.headers.items()}
            seen = Seen(number, request.method, path, headers, request.rel_url.raw_query_string)
            fault = self.hook(seen) if self.hook else None
            await asyncio.sleep(self.rtt_s + (fault.seconds if isinstance(fault, Delay) else 0.0))
            if isinstance(fault, Drop):
                return _cut(request)
            if isinstance(fault, Raw):
                return await _send_raw(request, fault)
            if isinstance(fault, Status):
                self._tally.sent(path, len(fault.body))
                return web.Response(status=fault.code, headers=fault.headers, body=fault.body)
            return await self._forward(request, client, path, fault)
        finally:
            self._tally.end()

    async def _forward(
        self, request: web.Request, client: aiohttp.ClientSession, path: str, fault: Fault | None
    ) -> web.StreamResponse:
        skip = _HOP_BY_HOP | ({"range"} if isinstance(fault, IgnoreRange) else set())
        headers = CIMultiDict((name, value) for name, value in request.headers.items() if name.lower() not in skip)
        headers.setdefault("Accept-Encoding", "identity")
        if isinstance(fault, ShiftRange) and "Range" in headers:
            headers["Range"] = re.sub(r"\d+", lambda number: str(int(number[0]) + fault.by), headers["Range"])
        url = f"http://{self.upstream}{request.rel_url.raw_path_qs}"
        body = self._upload(request) if request.can_read_body else None
        try:
            async with client.request(
                request.method, URL(url, encoded=True), headers=headers, data=body, allow_redirects=False
            ) as upstream:
                return await self._relay(request, upstream, path, fault)
        except (TimeoutError, aiohttp.ClientConnectionError) as error:
            if request.transport is None or request.transport.is_closing():
                return _cut(request)
            return web.Response(status=502, text=f"{self.upstream}: {error}")

    async def _relay(
        self, request: web.Request, upstream: aiohttp.ClientResponse, path: str, fault: Fault | None
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=upstream.status, reason=upstream.reason)
        skip = _HOP_BY_HOP | ({"content-length"} if isinstance(fault, Endless) else set())
        for name, value in upstream.headers.items():
            if name.lower() not in skip:
                response.headers.add(name, value)
        await response.prepare(request)
        if isinstance(fault, Endless):
            await self._send_for_ever(response, await upstream.content.read(CHUNK), path)
        size = max(1, fault.rate // _SLOW_STEPS) if isinstance(fault, Slow) else CHUNK
        offset = 0
        async for chunk in upstream.content.iter_chunked(size):
            if isinstance(fault, Slow):
                await asyncio.sleep(1 / _SLOW_STEPS)
            piece, ended = _spoil(chunk, offset, fault)
            await self._wait_for_turn(len(piece))
            await response.write(piece)
            offset += len(chunk)
            self._tally.sent(path, len(piece))
            if ended:
                if isinstance(fault, Stall):
                    await asyncio.sleep(fault.seconds)
                return _cut(request)
        await response.write_eof()
        return response

    async def _send_for_ever(self, response: web.StreamResponse, body: bytes, path: str) -> None:
        """Ends with the connection, whose client has to have enough of it."""
        while True:
            await response.write(body)
            self._tally.sent(path, len(body))
            await asyncio.sleep(0)

    async def _upload(self, request: web.Request) -> AsyncIterator[bytes]:
        async for chunk in request.content.iter_chunked(CHUNK):
            self._tally.uploaded(len(chunk))
            yield chunk

    async def _wait_for_turn(self, count: int) -> None:
        """Let all answers together move no more than ``bandwidth`` bytes a second."""
        if not self.bandwidth:
            return
        now = asyncio.get_running_loop().time()
        self._next_free = max(now, self._next_free) + count / self.bandwidth
        await asyncio.sleep(self._next_free - now)


def _spoil(chunk: bytes, offset: int, fault: Fault | None) -> tuple[bytes, bool]:
    """The bytes to send for ``chunk``, which begins at ``offset`` of the body, and whether the body ends there."""
    if isinstance(fault, Short | Stall) and offset + len(chunk) >= fault.keep:
        return chunk[: max(0, fault.keep - offset)], True
    if isinstance(fault, Corrupt) and offset <= fault.at < offset + len(chunk):
        spoiled = bytearray(chunk)
        spoiled[fault.at - offset] ^= 0xFF
        return bytes(spoiled), False
    return chunk, False


def _cut(request: web.Request) -> web.StreamResponse:
    """Close the client's connection at once; the returned answer goes nowhere."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=500)


async def _send_raw(request: web.Request, fault: Raw) -> web.StreamResponse:
    """Write past the server what is no answer, or half of one."""
    transport = request.transport
    if transport is None:
        return _cut(request)
    transport.write(fault.content)
    while transport.get_write_buffer_size() and not transport.is_closing():
        await asyncio.sleep(_RAW_POLL_S)
    if fault.reset:  # to linger for no time is to reset (socket(7))
        link = transport.get_extra_info("socket")
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return _cut(request)
