# SPDX-License-Identifier: Apache-2.0
"""Snapshots of one snapshotter, as a client of containerd sees them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass

from soci_containerd.calls import CALL_SECONDS, PREPARE_SECONDS, Wire
from soci_containerd.values import Mount, Snapshot, mount_values, snapshot_value
from soci_proto.containerd.services.snapshots.v1 import snapshots_pb2, snapshots_pb2_grpc


@dataclass(frozen=True, slots=True)
class Snapshots:
    """Calls to the snapshotter called ``snapshotter``."""

    wire: Wire
    snapshotter: str

    def _stub(self) -> snapshots_pb2_grpc.SnapshotsStub:
        return snapshots_pb2_grpc.SnapshotsStub(self.wire.channel)

    async def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> tuple[Mount, ...]:
        """Begin an active snapshot over ``parent`` ("" for none); the mounts show it.

        Raises `AlreadyExists` for a ``key`` in use, and where the snapshot that the label
        ``containerd.io/snapshot.ref`` asks for is there: then nothing needs to be downloaded.
        """
        asked = snapshots_pb2.PrepareSnapshotRequest(
            snapshotter=self.snapshotter, key=key, parent=parent, labels=dict(labels)
        )
        answer = self._stub().Prepare(asked, timeout=PREPARE_SECONDS, metadata=self.wire.metadata)
        return mount_values((await self.wire.call(f"prepare snapshot {key}", answer)).mounts)

    async def view(self, key: str, parent: str, labels: Mapping[str, str]) -> tuple[Mount, ...]:
        """A read-only look at ``parent``. Raises `AlreadyExists`, `NotFound`."""
        asked = snapshots_pb2.ViewSnapshotRequest(
            snapshotter=self.snapshotter, key=key, parent=parent, labels=dict(labels)
        )
        answer = self._stub().View(asked, timeout=PREPARE_SECONDS, metadata=self.wire.metadata)
        return mount_values((await self.wire.call(f"view snapshot {parent}", answer)).mounts)

    async def mounts(self, key: str) -> tuple[Mount, ...]:
        """The mounts of an active snapshot or a view."""
        asked = snapshots_pb2.MountsRequest(snapshotter=self.snapshotter, key=key)
        answer = self._stub().Mounts(asked, timeout=CALL_SECONDS, metadata=self.wire.metadata)
        return mount_values((await self.wire.call(f"mounts of snapshot {key}", answer)).mounts)

    async def commit(self, name: str, key: str, labels: Mapping[str, str]) -> None:
        """Turn the active snapshot ``key`` into the committed ``name``. Raises `AlreadyExists`."""
        asked = snapshots_pb2.CommitSnapshotRequest(
            snapshotter=self.snapshotter, name=name, key=key, labels=dict(labels)
        )
        answer = self._stub().Commit(asked, timeout=PREPARE_SECONDS, metadata=self.wire.metadata)
        await self.wire.call(f"commit snapshot {name}", answer)

    async def stat(self, key: str) -> Snapshot:
        """Raises `NotFound`."""
        asked = snapshots_pb2.StatSnapshotRequest(snapshotter=self.snapshotter, key=key)
        answer = self._stub().Stat(asked, timeout=CALL_SECONDS, metadata=self.wire.metadata)
        return snapshot_value((await self.wire.call(f"look up snapshot {key}", answer)).info)

    async def remove(self, key: str) -> None:
        """Raises `NotFound`, and `FailedPrecondition` where others are built on it."""
        asked = snapshots_pb2.RemoveSnapshotRequest(snapshotter=self.snapshotter, key=key)
        answer = self._stub().Remove(asked, timeout=CALL_SECONDS, metadata=self.wire.metadata)
        await self.wire.call(f"remove snapshot {key}", answer)

    async def list(self, *filters: str) -> AsyncIterator[Snapshot]:
        """All snapshots that match any filter (containerd's filter syntax); without filters, all."""
        asked = snapshots_pb2.ListSnapshotsRequest(snapshotter=self.snapshotter, filters=filters)
        answers = self._stub().List(asked, timeout=CALL_SECONDS, metadata=self.wire.metadata)
        async with aclosing(self.wire.stream("list snapshots", answers)) as messages:
            async for message in messages:
                for info in message.info:
                    yield snapshot_value(info)
