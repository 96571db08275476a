# SPDX-License-Identifier: Apache-2.0
"""containerd's content store behind the face of `soci_indexing.stores`, and what else its images are asked."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Final

from google.protobuf.field_mask_pb2 import FieldMask

from soci.digest import Digest, new_hash, parse_digest
from soci.errors import InvalidDigest, Mismatch, NotFound
from soci.oci import Descriptor
from soci_containerd import Client, Image
from soci_containerd.calls import APPLY_SECONDS, CALL_SECONDS
from soci_containerd.values import image_value
from soci_indexing.stores import NO_LABELS
from soci_proto.containerd.services.content.v1 import content_pb2, content_pb2_grpc
from soci_proto.containerd.services.images.v1 import images_pb2, images_pb2_grpc

LIST_SECONDS: Final = 300.0
"""Deadline of listing all content."""


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
        async with aclosing(self._chunks(digest, 0, 0)) as chunks:
            async for chunk in chunks:
                state.update(chunk)
                yield chunk
        _proved(digest, state.hexdigest())

    async def read_range(self, digest: Digest, start: int, end: int) -> bytes:
        """Bytes [start, end) of a blob, exactly as many; what they hold is the caller's to check."""
        if start == end:
            return b""
        content = bytearray()
        async with aclosing(self._chunks(digest, start, end - start)) as chunks:
            async for chunk in chunks:
                content += chunk
                if len(content) > end - start:
                    break
        if len(content) != end - start:
            raise Mismatch(f"content {digest}: {len(content)} bytes at {start}, not {end - start}")
        return bytes(content)

    async def _chunks(self, digest: Digest, offset: int, size: int) -> AsyncGenerator[bytes, None]:
        wire = self.client.wire
        asked = content_pb2.ReadContentRequest(digest=digest, offset=offset, size=size)
        stub = content_pb2_grpc.ContentStub(wire.channel)
        answers = stub.Read(asked, timeout=APPLY_SECONDS, metadata=wire.metadata)
        async with aclosing(wire.stream(f"read content {digest}", answers)) as messages:
            async for message in messages:
                yield message.data

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
        wire = self.client.wire
        stub = content_pb2_grpc.ContentStub(wire.channel)
        answers = stub.List(content_pb2.ListContentRequest(), timeout=LIST_SECONDS, metadata=wire.metadata)
        async with aclosing(wire.stream("list content", answers)) as messages:
            async for message in messages:
                for info in message.info:
                    with suppress(InvalidDigest):  # of an algorithm that we cannot check
                        yield parse_digest(info.digest), info.size


def _proved(digest: Digest, found: str) -> None:
    if found != digest.partition(":")[2]:
        raise Mismatch(f"containerd's content {digest} holds other bytes than its name says")


async def list_images(client: Client) -> list[Image]:
    """Every image of the namespace; those whose target has a digest that we cannot check are left out."""
    wire = client.wire
    stub = images_pb2_grpc.ImagesStub(wire.channel)
    answer = stub.List(images_pb2.ListImagesRequest(), timeout=CALL_SECONDS, metadata=wire.metadata)
    images = []
    for message in (await wire.call("list images", answer)).images:
        with suppress(InvalidDigest):
            images.append(image_value(message))
    return images


async def label_image(client: Client, name: str, labels: Mapping[str, str]) -> None:
    """Set these labels of an image and leave all else of it. An empty value takes the label away."""
    if not labels:
        return
    wire = client.wire
    asked = images_pb2.UpdateImageRequest(
        image=images_pb2.Image(name=name, labels=dict(labels)),
        update_mask=FieldMask(paths=[f"labels.{key}" for key in sorted(labels)]),
    )
    stub = images_pb2_grpc.ImagesStub(wire.channel)
    answer = stub.Update(asked, timeout=CALL_SECONDS, metadata=wire.metadata)
    await wire.call(f"label image {name}", answer)
