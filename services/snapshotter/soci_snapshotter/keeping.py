# SPDX-License-Identifier: Apache-2.0
"""Blobs of whole layers in containerd's content store, so that an image which we brought can be pushed and exported.

A blob is kept for as long as its image's manifest: a label of the manifest refers to it, as those of containerd's own
pull do. Until that is set a lease keeps it. Our own store keeps no blobs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import BinaryIO, Final

from soci.digest import hex_of
from soci.errors import FailedPrecondition, NotFound, SociError
from soci.oci import Descriptor
from soci_containerd import connect
from soci_snapshotter.whole import Arrived

REFERS: Final = "containerd.io/gc.ref.content.soci."
"""The label of a manifest, with a part of the blob's digest behind it: containerd follows all that begin so."""
READ_BYTES: Final = 1 << 20


class ContentKeeper:
    """Puts blobs into the content store of the containerd at ``address``, in the namespace of the pull."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def keep(self, arrived: Arrived) -> None:
        """Store a blob that is whole. Raises `SociError` where containerd does not take it."""
        if not arrived.namespace:
            raise FailedPrecondition(f"{arrived.wanted.layer}: nobody said which containerd namespace it is for")
        wanted = arrived.wanted
        blob = Descriptor(wanted.media_type, wanted.layer, arrived.size)
        label = REFERS + hex_of(wanted.layer)[:16]
        try:
            file = await asyncio.to_thread(arrived.path.open, "rb")
        except OSError as error:
            raise SociError(f"{arrived.path}: {error.strerror}") from error
        with file:
            async with connect(self._address, arrived.namespace) as client, client.lease("soci-layer") as leased:
                await leased.content.write(blob, _pieces(file), {})
                with suppress(NotFound):  # a client that keeps no manifest wants no blob either
                    await leased.content.update_labels(arrived.manifest, {label: wanted.layer})


async def _pieces(file: BinaryIO) -> AsyncIterator[bytes]:
    while piece := await asyncio.to_thread(file.read, READ_BYTES):
        yield piece
