# SPDX-License-Identifier: Apache-2.0
"""Connections of a socket that systemd holds, passed on to the one that gRPC listens on.

gRPC's server opens its own socket and cannot be given one that listens already. So with ``--address fd://`` it
listens on a socket in our own folder, and each connection that comes in through systemd's is joined to it. Nothing of
this runs with an address that is a path.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from soci_runtime.logs import log

MOST_CONNECTIONS = 128
"""Joined at a time; more wait in the queue of systemd's socket. containerd holds one or two."""
PIECE = 1 << 16
"""Bytes passed on at a time, and buffered where the other side is slow."""
ACCEPT_PAUSE = 1.0
"""Seconds without accepting after it failed: too many open files, mostly."""
END_SECONDS = 2.0
"""Seconds in which joined connections end by themselves once gRPC has closed its side."""


@asynccontextmanager
async def relaying(outside: socket.socket, inside: str) -> AsyncIterator[Callable[[], None]]:
    """Join what connects to ``outside`` to the socket at the path ``inside`` while the block runs.

    Yields what stops it from accepting; connections that are joined go on until gRPC closes them. ``outside`` is not
    closed: it is systemd's, and clients may wait on it for our successor.
    """
    joined: set[asyncio.Task[None]] = set()
    async with asyncio.TaskGroup() as tasks:
        accepting = tasks.create_task(_accept(outside, inside, tasks, joined))

        def stop() -> None:
            accepting.cancel()

        try:
            yield stop
        finally:
            accepting.cancel()
            if joined:
                await asyncio.wait(joined, timeout=END_SECONDS)
            for one in joined:
                one.cancel()


async def _accept(
    outside: socket.socket, inside: str, tasks: asyncio.TaskGroup, joined: set[asyncio.Task[None]]
) -> None:
    loop = asyncio.get_running_loop()
    room = asyncio.Semaphore(MOST_CONNECTIONS)

    def ended(one: asyncio.Task[None]) -> None:
        joined.discard(one)
        room.release()

    while True:
        await room.acquire()
        try:
            client, _ = await loop.sock_accept(outside)
        except OSError as error:
            room.release()
            log.warning("a connection was not accepted", error=error)
            await asyncio.sleep(ACCEPT_PAUSE)
            continue
        one = tasks.create_task(_joined(client, inside))
        joined.add(one)
        one.add_done_callback(ended)


async def _joined(client: socket.socket, inside: str) -> None:
    """No connection ends another one, nor the service, whatever becomes of it."""
    try:
        await _join(client, inside)
    except Exception as error:  # noqa: BLE001  the border of a connection
        log.error("a connection failed", error=error, exc_info=error)


async def _join(client: socket.socket, inside: str) -> None:
    """Pass bytes both ways until gRPC closes its side, which it does when the client's ends."""
    with contextlib.ExitStack() as open_now:
        open_now.callback(client.close)
        try:
            from_grpc, to_grpc = await asyncio.open_unix_connection(inside, limit=PIECE)
            open_now.callback(to_grpc.close)
            from_client, to_client = await asyncio.open_connection(sock=client, limit=PIECE)
            open_now.callback(to_client.close)
        except OSError as error:
            log.warning("a connection was not passed on", error=error)
            return
        async with asyncio.TaskGroup() as ways:
            there = ways.create_task(_pass_on(from_client, to_grpc))
            await _pass_on(from_grpc, to_client)
            there.cancel()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """All that ``reader`` gives, then its end; a side that is gone is an end, too."""
    with contextlib.suppress(OSError):
        while piece := await reader.read(PIECE):
            if writer.is_closing():  # uvloop would raise a RuntimeError
                return
            writer.write(piece)
            await writer.drain()
    if not writer.is_closing():
        with contextlib.suppress(OSError):
            writer.write_eof()
