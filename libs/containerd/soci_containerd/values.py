# SPDX-License-Identifier: Apache-2.0
"""What containerd tells and is told, as plain frozen values, and their protobuf messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from soci.digest import Digest, parse_digest
from soci.oci import Descriptor
from soci_proto.containerd.services.images.v1 import images_pb2
from soci_proto.containerd.services.snapshots.v1 import snapshots_pb2
from soci_proto.containerd.types import descriptor_pb2, mount_pb2

SPEC_TYPE_URL: Final = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
"""The type under which containerd 1.x and 2.x know the JSON of an OCI runtime specification."""
RUNC_RUNTIME: Final = "io.containerd.runc.v2"


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount(2) to make; ``options`` as in fstab."""

    type: str
    source: str
    options: tuple[str, ...] = ()
    target: str = ""


@dataclass(frozen=True, slots=True)
class ContentInfo:
    """A blob of the content store; ``size`` in bytes."""

    digest: Digest
    size: int
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Image:
    """A name and the content that it stands for."""

    name: str
    target: Descriptor
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot; ``kind`` is ``view``, ``active``, ``committed`` or ``unknown``."""

    name: str
    parent: str
    kind: str
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Container:
    """What a task is started from. ``spec`` is the JSON of an OCI runtime specification."""

    id: str
    image: str
    spec: bytes
    snapshotter: str
    snapshot_key: str
    labels: Mapping[str, str] = field(default_factory=dict)
    runtime: str = RUNC_RUNTIME


@dataclass(frozen=True, slots=True)
class TaskState:
    """The first process of a container; ``status`` is ``created``, ``running``, ``stopped``, ``paused``, …"""

    pid: int
    status: str
    exit_status: int


def descriptor_message(descriptor: Descriptor) -> descriptor_pb2.Descriptor:
    """A descriptor as containerd reads it. The platform is not part of that message."""
    return descriptor_pb2.Descriptor(
        media_type=descriptor.media_type,
        digest=descriptor.digest,
        size=descriptor.size,
        annotations=dict(descriptor.annotations),
    )


def descriptor_value(message: descriptor_pb2.Descriptor) -> Descriptor:
    """Raises `InvalidDigest` where the digest is none that we can check."""
    return Descriptor(message.media_type, parse_digest(message.digest), message.size, dict(message.annotations))


def mount_messages(mounts: Iterable[Mount]) -> list[mount_pb2.Mount]:
    """Mounts as containerd reads them."""
    return [mount_pb2.Mount(type=m.type, source=m.source, target=m.target, options=m.options) for m in mounts]


def mount_values(messages: Iterable[mount_pb2.Mount]) -> tuple[Mount, ...]:
    """Mounts that containerd sent, in order."""
    return tuple(Mount(m.type, m.source, tuple(m.options), m.target) for m in messages)


def image_message(image: Image) -> images_pb2.Image:
    """An image record as containerd reads it."""
    return images_pb2.Image(name=image.name, labels=dict(image.labels), target=descriptor_message(image.target))


def image_value(message: images_pb2.Image) -> Image:
    """An image record that containerd sent."""
    return Image(message.name, descriptor_value(message.target), dict(message.labels))


def snapshot_value(info: snapshots_pb2.Info) -> Snapshot:
    """A snapshot record that containerd sent; kinds of the future are ``unknown``."""
    kind = snapshots_pb2.Kind.Name(info.kind).lower() if info.kind in snapshots_pb2.Kind.values() else "unknown"
    return Snapshot(info.name, info.parent, kind, dict(info.labels))
