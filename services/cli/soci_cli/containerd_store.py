# SPDX-License-Identifier: Apache-2.0
"""containerd's content store behind the face of `soci_indexing.stores`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass

from soci.digest import Digest, new_hash
from soci.errors import Mismatch, NotFound
from soci.oci import Descriptor
from soci_containerd import Client
from soci_indexing.stores import NO_LABELS


@dataclass(frozen=True, slots=True)
class ContainerdStore:
    """`soci_indexing.stores.Blobs` over containerd, in its client's namespace and lease."""

    client: Client

    async def info(self, digest: Digest) -> int | None:
        """As `Content.info`."""
        try:
            return (await self.client.content.info(digest)).size
        except NotFound:
            return None

    async def read(self, digest: Digest, *, limit: int) -> bytes:
        """As `Content.read`."""
        content = await self.client.content.read(digest, limit)
        state = new_hash(digest)
        state.update(content)
        _proved(digest, state.hexdigest())
        return content

    async def stream(self, digest: Digest) -> AsyncGenerator[bytes, None]:
        """As `Content.stream`."""
        state = new_hash(digest)
        async with aclosing(self.client.content.stream(digest)) as chunks:
            async for chunk in chunks:
                state.update(chunk)
                yield chunk
        _proved(digest, state.hexdigest())

    async def read_range(self, digest: Digest, start: int, end: int) -> bytes:
        """Bytes [start, end) of a blob, exactly as many; what they hold is the caller's to check."""
        if start == end:
            return b""
        content = bytearray()
        async with aclosing(self.client.content.stream(digest, start, end - start)) as chunks:
            async for chunk in chunks:
                content += chunk
                if len(content) > end - start:
                    break
        if len(content) != end - start:
            raise Mismatch(f"content {digest}: {len(content)} bytes at {start}, not {end - start}")
        return bytes(content)

    async def push(self, descriptor: Descriptor, content: bytes, labels: Mapping[str, str] = NO_LABELS) -> bool:
        """As `Content.push`."""
        return await self.client.content.write(descriptor, content, labels)

    async def label(self, digest: Digest, labels: Mapping[str, str]) -> None:
        """As `Content.label`."""
        await self.client.content.update_labels(digest, labels)

    async def delete(self, digest: Digest) -> None:
        """As `Content.delete`."""
        with suppress(NotFound):
            await self.client.content.delete(digest)

    async def digests(self) -> AsyncGenerator[tuple[Digest, int], None]:
        """As `Blobs.digests`."""
        async with aclosing(self.client.content.all()) as found:
            async for one in found:
                yield one


def _proved(digest: Digest, found: str) -> None:
    if found != digest.partition(":")[2]:
        raise Mismatch(f"containerd's content {digest} holds other bytes than its name says")
