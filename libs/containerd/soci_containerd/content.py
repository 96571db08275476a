# SPDX-License-Identifier: Apache-2.0
"""The content store of containerd, and what is unpacked from it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.field_mask_pb2 import FieldMask
from grpc.aio import EOF

from soci.digest import Digest, parse_digest
from soci.errors import AlreadyExists, InvalidDigest, LimitExceeded, Mismatch, NotFound, SociError
from soci.oci import Descriptor
from soci_containerd.calls import APPLY_SECONDS, CALL_SECONDS, STREAM_STALL_SECONDS, Wire, border
from soci_containerd.values import ContentInfo, Mount, descriptor_message, descriptor_value, mount_messages
from soci_proto.containerd.services.content.v1 import content_pb2, content_pb2_grpc
from soci_proto.containerd.services.diff.v1 import diff_pb2, diff_pb2_grpc

CHUNK_BYTES: Final = 1 << 20
"""Content travels in messages of at most this size, far below `MESSAGE_LIMIT`."""
LIST_SECONDS: Final = 300.0
"""Deadline of listing all content."""
READ_LIMIT: Final = 8 << 20
"""The largest blob that `Content.read` takes into memory, unless its caller says otherwise."""


@dataclass(frozen=True, slots=True)
class Content:
    """Blobs by digest."""

    wire: Wire

    def _stub(self) -> content_pb2_grpc.ContentStub:
        return content_pb2_grpc.ContentStub(self.wire.channel)

    async def info(self, digest: Digest) -> ContentInfo:
        """Raises `NotFound`."""
        asked = content_pb2.InfoRequest(digest=digest)
        answer = self._stub().Info(asked, timeout=CALL_SECONDS, metadata=self.wire.metadata)
        found = (await self.wire.call(f"look up content {digest}", answer)).info
        return ContentInfo(parse_digest(found.digest), found.size, dict(found.labels))

    async def exists(self, digest: Digest) -> bool:
        """Is the whole blob here?"""
        try:
            await self.info(digest)
        except NotFound:
            return False
        return True

    async def read(self, digest: Digest, limit: int = READ_LIMIT) -> bytes:
        """A small blob. Raises `NotFound`, and `LimitExceeded` beyond ``limit`` bytes."""
        content = bytearray()
        async with aclosing(self.stream(digest)) as chunks:
            async for chunk in chunks:
                content += chunk
                if len(content) > limit:
                    raise LimitExceeded(f"containerd: read content {digest}: more than {limit} bytes")
        return bytes(content)

    async def stream(self, digest: Digest, offset: int = 0, size: int = 0) -> AsyncGenerator[bytes, None]:
        """A blob's bytes from ``offset``, ``size`` of them or (0) all, as they come. Raises `NotFound`."""
        asked = content_pb2.ReadContentRequest(digest=digest, offset=offset, size=size)
        answers = self._stub().Read(asked, timeout=APPLY_SECONDS, metadata=self.wire.metadata)
        async with aclosing(self.wire.stream(f"read content {digest}", answers)) as messages:
            async for message in messages:
                yield message.data

    async def all(self) -> AsyncGenerator[tuple[Digest, int], None]:
        """Digest and size of every blob; those with a digest that we cannot check are left out."""
        answers = self._stub().List(content_pb2.ListContentRequest(), timeout=LIST_SECONDS, metadata=self.wire.metadata)
        async with aclosing(self.wire.stream("list content", answers)) as messages:
            async for message in messages:
                for info in message.info:
                    with suppress(InvalidDigest):
                        yield parse_digest(info.digest), info.size

    async def update_labels(self, digest: Digest, labels: Mapping[str, str]) -> None:
        """Set these labels and leave all others. An empty value takes the label away. Raises `NotFound`."""
        if not labels:
            return
        asked = content_pb2.UpdateRequest(
            info=content_pb2.Info(digest=digest, labels=dict(labels)),
            update_mask=FieldMask(paths=[f"labels.{name}" for name in sorted(labels)]),
        )
        answer = self._stub().Update(asked, timeout=CALL_SECONDS, metadata=self.wire.metadata)
        await self.wire.call(f"label content {digest}", answer)

    async def write(
        self, descriptor: Descriptor, chunks: AsyncIterable[bytes] | bytes, labels: Mapping[str, str]
    ) -> bool:
        """Store a blob that must have the descriptor's digest and size; False where it was here already.

        A blob that is here joins the lease of this client, if any, and gets ``labels`` added; ``chunks`` is then
        never begun. Raises `Mismatch` where the bytes are others than promised: nothing is kept of them.
        """
        ref = f"soci-{descriptor.digest}-{secrets.token_hex(4)}"  # of its own: two pulls must not share one ingest
        call: Any = self._stub().Write(metadata=self.wire.metadata)
        try:
            session = _Write(call, ref, descriptor)
            await session.send(content_pb2.STAT)
            offset = 0
            async with aclosing(_pieces(chunks)) as pieces:
                async for piece in pieces:
                    if offset + len(piece) > descriptor.size:
                        raise Mismatch(f"{descriptor.digest} is longer than its {descriptor.size} bytes")
                    await session.send(content_pb2.WRITE, offset, piece)
                    offset += len(piece)
            if offset != descriptor.size:
                raise Mismatch(f"{descriptor.digest} ends after {offset} of {descriptor.size} bytes")
            await session.send(content_pb2.COMMIT, offset, labels=labels)
        except AlreadyExists:
            await self.update_labels(descriptor.digest, labels)
            return False
        except BaseException:
            call.cancel()
            await asyncio.shield(self._abort(ref))
            raise
        else:
            await call.done_writing()
            return True

    async def _abort(self, ref: str) -> None:
        """Take a broken ingest away, if it ever began; what fails here is left to containerd's collector."""
        asked = content_pb2.AbortRequest(ref=ref)
        try:
            answer = self._stub().Abort(asked, timeout=CALL_SECONDS, metadata=self.wire.metadata)
            await self.wire.call(f"abort {ref}", answer)
        except SociError:
            return

    async def delete(self, digest: Digest) -> None:
        """Delete a blob. Raises `NotFound`."""
        asked = content_pb2.DeleteContentRequest(digest=digest)
        answer = self._stub().Delete(asked, timeout=CALL_SECONDS, metadata=self.wire.metadata)
        await self.wire.call(f"delete content {digest}", answer)


@dataclass(frozen=True, slots=True)
class _Write:
    """One write stream: each message is answered before the next is sent, which is what bounds memory."""

    call: Any
    ref: str
    descriptor: Descriptor

    async def send(
        self,
        action: content_pb2.WriteAction,
        offset: int = 0,
        data: bytes = b"",
        labels: Mapping[str, str] | None = None,
    ) -> None:
        digest = self.descriptor.digest
        asked = content_pb2.WriteContentRequest(
            action=action,
            ref=self.ref,
            total=self.descriptor.size,
            expected=digest,
            offset=offset,
            data=data,
            labels=dict(labels or {}),
        )
        with border(f"write content {digest}"):
            async with asyncio.timeout(STREAM_STALL_SECONDS):
                with suppress(asyncio.InvalidStateError):  # the stream ended; reading tells why
                    await self.call.write(asked)
                answer = await self.call.read()
            if answer is EOF:
                raise SociError(f"containerd: write content {digest}: the stream ended without an answer")


async def _pieces(chunks: AsyncIterable[bytes] | bytes) -> AsyncGenerator[bytes, None]:
    """The content in pieces of at most `CHUNK_BYTES`."""
    if isinstance(chunks, bytes):
        for start in range(0, len(chunks), CHUNK_BYTES):
            yield chunks[start : start + CHUNK_BYTES]
        return
    async for chunk in chunks:
        for start in range(0, len(chunk), CHUNK_BYTES):
            yield chunk[start : start + CHUNK_BYTES]


@dataclass(frozen=True, slots=True)
class Diff:
    """Layers unpacked by containerd."""

    wire: Wire

    async def apply(self, layer: Descriptor, mounts: Iterable[Mount]) -> Descriptor:
        """Unpack a layer blob of the content store onto ``mounts``; the answer has the uncompressed digest."""
        asked = diff_pb2.ApplyRequest(diff=descriptor_message(layer), mounts=mount_messages(mounts))
        stub = diff_pb2_grpc.DiffStub(self.wire.channel)
        answer = stub.Apply(asked, timeout=APPLY_SECONDS, metadata=self.wire.metadata)
        return descriptor_value((await self.wire.call(f"unpack layer {layer.digest}", answer)).applied)
