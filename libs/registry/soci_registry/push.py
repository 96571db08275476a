# SPDX-License-Identifier: Apache-2.0
"""Uploads of blobs (OCI distribution specification, "Pushing a blob monolithically": POST, then PUT)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from soci.digest import Digest
from soci.errors import Mismatch, NotFound
from soci_registry.failure import Kind, TryError
from soci_registry.fetch import blob_size, matches
from soci_registry.transport import Transport
from soci_registry.urls import Place, redirect_target
from soci_registry.wire import Answer, Body, Request

FILE_CHUNK_BYTES = 1024 * 1024


async def push_bytes(transport: Transport, place: Place, content: bytes, digest: Digest) -> bool:
    """Upload ``content`` unless the registry has it; True where it was uploaded."""
    if not matches(content, digest):
        raise Mismatch(f"upload: the content is not {digest}")
    return await _push(transport, place, Body(content, len(content)), digest)


async def push_file(transport: Transport, place: Place, path: Path, digest: Digest) -> bool:
    """Upload the file unless the registry has it; True where it was uploaded. The registry checks the digest."""
    size = (await asyncio.to_thread(path.stat)).st_size

    async def source() -> AsyncIterator[bytes]:
        file: BinaryIO = await asyncio.to_thread(path.open, "rb")
        try:
            while chunk := await asyncio.to_thread(file.read, FILE_CHUNK_BYTES):
                yield chunk
        finally:
            file.close()

    return await _push(transport, place, Body(source, size), digest)


async def _push(transport: Transport, place: Place, body: Body, digest: Digest) -> bool:
    with suppress(NotFound):
        await blob_size(transport, place, digest)
        return False

    async def read_location(answer: Answer) -> str:
        location = answer.header("location")
        if not location:
            raise TryError(Kind.BAD_ANSWER, "an upload without a Location")
        return redirect_target(place.url("blobs", "uploads/"), location)

    tried = 0
    while True:
        tried += 1
        location = await transport.call(_begin(place), read_location)
        separator = "&" if "?" in location else "?"
        request = Request(
            "PUT",
            f"{location}{separator}digest={digest.replace(':', '%3A')}",
            place.access("pull,push"),
            {"Content-Type": "application/octet-stream"},
            body,
            frozenset({201, 202, 204}),
            bulk=True,
            endless=True,
            urgent=False,
        )
        try:
            async with transport.open(request):
                return True
        except TryError as error:
            # An upload that broke cannot be sent to the same session again: it begins anew.
            await transport.wait(request, error, tried, transport.settings.retry)


def _begin(place: Place) -> Request:
    return Request(
        "POST",
        place.url("blobs", "uploads/"),
        place.access("pull,push"),
        body=Body(b"", 0),
        expect=frozenset({202}),
    )
