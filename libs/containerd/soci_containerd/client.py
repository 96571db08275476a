# SPDX-License-Identifier: Apache-2.0
"""The client: one channel to containerd's socket, its services as values."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import grpc.aio
from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask

from soci.errors import AlreadyExists, InvalidConfig, InvalidDigest, SociError, Unavailable
from soci_containerd.calls import CALL_SECONDS, MESSAGE_LIMIT, NAMESPACE_HEADER, Wire
from soci_containerd.content import Content, Diff
from soci_containerd.snapshots import Snapshots
from soci_containerd.tasks import Containers, Tasks
from soci_containerd.values import Image, image_message, image_value
from soci_proto.containerd.services.images.v1 import images_pb2, images_pb2_grpc
from soci_proto.containerd.services.leases.v1 import leases_pb2, leases_pb2_grpc
from soci_proto.containerd.services.namespaces.v1 import namespace_pb2, namespace_pb2_grpc
from soci_proto.containerd.services.version.v1 import version_pb2_grpc

LEASE_HOURS: Final = 24
"""A lease whose owner died is collected after this time."""
EXPIRE_LABEL: Final = "containerd.io/gc.expire"
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MESSAGE_LIMIT),
    ("grpc.max_send_message_length", MESSAGE_LIMIT),
    ("grpc.use_local_subchannel_pool", 1),  # a connection of our own, closed with the channel
)


@dataclass(frozen=True, slots=True)
class Images:
    """Image records by name."""

    wire: Wire

    def _stub(self) -> images_pb2_grpc.ImagesStub:
        return images_pb2_grpc.ImagesStub(self.wire.channel)

    async def get(self, name: str) -> Image:
        """Raises `NotFound`."""
        asked = images_pb2.GetImageRequest(name=name)
        answer = self._stub().Get(asked, timeout=CALL_SECONDS, metadata=self.wire.metadata)
        return image_value((await self.wire.call(f"look up image {name}", answer)).image)

    async def all(self) -> list[Image]:
        """Every image of the namespace; those whose target has a digest that we cannot check are left out."""
        answer = self._stub().List(images_pb2.ListImagesRequest(), timeout=CALL_SECONDS, metadata=self.wire.metadata)
        images = []
        for message in (await self.wire.call("list images", answer)).images:
            with suppress(InvalidDigest):
                images.append(image_value(message))
        return images

    async def create(self, image: Image) -> None:
        """Raises `AlreadyExists`."""
        asked = images_pb2.CreateImageRequest(image=image_message(image))
        answer = self._stub().Create(asked, timeout=CALL_SECONDS, metadata=self.wire.metadata)
        await self.wire.call(f"create image {image.name}", answer)

    async def update(self, image: Image) -> None:
        """Point an existing name elsewhere. Raises `NotFound`."""
        asked = images_pb2.UpdateImageRequest(image=image_message(image))
        answer = self._stub().Update(asked, timeout=CALL_SECONDS, metadata=self.wire.metadata)
        await self.wire.call(f"update image {image.name}", answer)

    async def update_labels(self, name: str, labels: Mapping[str, str]) -> None:
        """Set these labels and leave all else. An empty value takes the label away. Raises `NotFound`."""
        if not labels:
            return
        asked = images_pb2.UpdateImageRequest(
            image=images_pb2.Image(name=name, labels=dict(labels)),
            update_mask=FieldMask(paths=[f"labels.{key}" for key in sorted(labels)]),
        )
        answer = self._stub().Update(asked, timeout=CALL_SECONDS, metadata=self.wire.metadata)
        await self.wire.call(f"label image {name}", answer)

    async def put(self, image: Image) -> None:
        """Create or update, whichever is right."""
        try:
            await self.create(image)
        except AlreadyExists:
            await self.update(image)

    async def delete(self, name: str, *, sync: bool = False) -> None:
        """Forget a name; with ``sync``, return only after garbage collection. Raises `NotFound`."""
        asked = images_pb2.DeleteImageRequest(name=name, sync=sync)
        answer = self._stub().Delete(asked, timeout=CALL_SECONDS, metadata=self.wire.metadata)
        await self.wire.call(f"delete image {name}", answer)


@dataclass(frozen=True, slots=True)
class Client:
    """containerd in one namespace, perhaps under one lease."""

    wire: Wire

    @property
    def namespace(self) -> str:
        """The containerd namespace that all calls are made in."""
        return self.wire.namespace

    @property
    def content(self) -> Content:
        """The content store."""
        return Content(self.wire)

    @property
    def diff(self) -> Diff:
        """The unpacker."""
        return Diff(self.wire)

    @property
    def images(self) -> Images:
        """The image records."""
        return Images(self.wire)

    @property
    def containers(self) -> Containers:
        """The container records."""
        return Containers(self.wire)

    @property
    def tasks(self) -> Tasks:
        """The tasks."""
        return Tasks(self.wire)

    def snapshots(self, snapshotter: str) -> Snapshots:
        """The snapshots of one snapshotter, by its plugin's name."""
        return Snapshots(self.wire, snapshotter)

    async def version(self) -> str:
        """The version of containerd, e.g. ``1.6.20~ds1``. The cheapest call there is: shows that containerd answers."""
        stub = version_pb2_grpc.VersionStub(self.wire.channel)
        answer = stub.Version(Empty(), timeout=CALL_SECONDS, metadata=self.wire.metadata)
        return (await self.wire.call(f"version of {self.wire.address}", answer)).version

    async def ensure_namespace(self) -> None:
        """Create the namespace where it does not exist: containerd refuses leases and images without one."""
        stub = namespace_pb2_grpc.NamespacesStub(self.wire.channel)
        asked = namespace_pb2.CreateNamespaceRequest(namespace=namespace_pb2.Namespace(name=self.namespace))
        answer = stub.Create(asked, timeout=CALL_SECONDS, metadata=self.wire.metadata)
        try:
            await self.wire.call(f"create namespace {self.namespace}", answer)
        except AlreadyExists:
            return

    @asynccontextmanager
    async def lease(self, purpose: str = "soci") -> AsyncIterator[Client]:
        """A client whose every find and creation is safe from garbage collection until the block ends.

        The lease expires by itself after `LEASE_HOURS`, should this process die.
        """
        stub = leases_pb2_grpc.LeasesStub(self.wire.channel)
        expires = datetime.now(UTC) + timedelta(hours=LEASE_HOURS)
        lease = f"{purpose}-{secrets.token_hex(8)}"
        asked = leases_pb2.CreateRequest(id=lease, labels={EXPIRE_LABEL: expires.strftime("%Y-%m-%dT%H:%M:%SZ")})
        answer = stub.Create(asked, timeout=CALL_SECONDS, metadata=self.wire.metadata)
        await self.wire.call(f"create lease {lease}", answer)
        try:
            yield Client(self.wire.with_lease(lease))
        finally:
            await asyncio.shield(self._release(lease))

    async def _release(self, lease: str) -> None:
        stub = leases_pb2_grpc.LeasesStub(self.wire.channel)
        asked = leases_pb2.DeleteRequest(id=lease)
        try:
            answer = stub.Delete(asked, timeout=CALL_SECONDS, metadata=self.wire.metadata)
            await self.wire.call(f"delete lease {lease}", answer)
        except SociError:
            return  # it expires by itself


@asynccontextmanager
async def connect(address: str, namespace: str) -> AsyncIterator[Client]:
    """Connect to containerd's unix socket ``address`` (a path, with or without ``unix://``).

    Raises `Unavailable`, with the way out, where nobody answers there, and `InvalidConfig` for a namespace that
    cannot be one.
    """
    path = address.removeprefix("unix://")
    if not namespace or not namespace.isascii() or not namespace.isprintable():
        raise InvalidConfig(f"not a containerd namespace: {namespace!r}")
    _need_socket(path)
    async with grpc.aio.insecure_channel(f"unix:{path}", options=_OPTIONS) as channel:
        yield Client(Wire(channel, path, ((NAMESPACE_HEADER, namespace),)))


def _need_socket(path: str) -> None:
    if not Path(path).is_socket():
        raise Unavailable(f"no containerd at {path}: is it running? name its socket with --address")
