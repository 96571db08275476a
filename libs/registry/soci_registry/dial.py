# SPDX-License-Identifier: Apache-2.0
"""From a host's name to a connected socket, never to a link-local address that a name stands for."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import Any

from soci_registry.failure import Kind, TryError
from soci_registry.urls import Origin, is_link_local

STAGGER_SECONDS = 0.25
"""After so long the next address is tried beside the one that has not answered (RFC 8305, "Happy Eyeballs")."""

ADDRESSES_MAX = 8
"""Addresses of a name that are tried."""

Address = tuple[socket.AddressFamily, Any]
"""A family, and what its sockets connect to."""


async def addresses_of(origin: Origin) -> list[Address]:
    """Where to connect; OSError where the name does not resolve, `TryError` where all of it is link-local."""
    try:
        literal = ipaddress.ip_address(origin.host)
    except ValueError:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
    else:  # of a redirect to one, `urls` has judged already
        family = socket.AF_INET if literal.version == 4 else socket.AF_INET6
        return [(family, (origin.host, origin.port))]
    kept: list[Address] = [(one[0], one[4]) for one in found if not is_link_local(str(one[4][0]))]
    if not kept:
        raise TryError(Kind.REDIRECT, "the host's name stands for a link-local address: refused")
    return kept[:ADDRESSES_MAX]


async def dial(addresses: list[Address]) -> socket.socket:
    """A socket connected to the first address that answers; the error of the last one that did not."""
    if len(addresses) == 1:
        return await _connect(addresses[0])
    tasks: set[asyncio.Task[socket.socket]] = set()
    left = list(addresses)
    error: BaseException = OSError("no address")
    try:
        while left or tasks:
            if left:
                tasks.add(asyncio.create_task(_connect(left.pop(0))))
            done, _ = await asyncio.wait(
                tasks, timeout=STAGGER_SECONDS if left else None, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                tasks.discard(task)
                if (failed := task.exception()) is None:
                    return task.result()
                error = failed
        raise error
    finally:
        for task in tasks:
            task.cancel()
        for late in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(late, socket.socket):
                late.close()


async def _connect(address: Address) -> socket.socket:
    family, where = address
    made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(made, where)
    except BaseException:
        made.close()
        raise
    return made
