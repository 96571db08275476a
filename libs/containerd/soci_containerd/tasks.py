# SPDX-License-Identifier: Apache-2.0
"""Containers and their tasks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from google.protobuf.any_pb2 import Any as AnyMessage

from soci_containerd.calls import CALL_SECONDS, TASK_SECONDS, Wire
from soci_containerd.values import SPEC_TYPE_URL, Container, Mount, TaskState, mount_messages
from soci_proto.containerd.services.containers.v1 import containers_pb2, containers_pb2_grpc
from soci_proto.containerd.services.tasks.v1 import tasks_pb2, tasks_pb2_grpc
from soci_proto.containerd.types.task import task_pb2


@dataclass(frozen=True, slots=True)
class Containers:
    """Records that tasks are started from; while one exists, its snapshot is kept."""

    wire: Wire

    def _stub(self) -> containers_pb2_grpc.ContainersStub:
        return containers_pb2_grpc.ContainersStub(self.wire.channel)

    async def create(self, container: Container) -> None:
        """Raises `AlreadyExists`."""
        message = containers_pb2.Container(
            id=container.id,
            image=container.image,
            labels=dict(container.labels),
            runtime=containers_pb2.Container.Runtime(name=container.runtime),
            spec=AnyMessage(type_url=SPEC_TYPE_URL, value=container.spec),
            snapshotter=container.snapshotter,
            snapshot_key=container.snapshot_key,
        )
        asked = containers_pb2.CreateContainerRequest(container=message)
        answer = self._stub().Create(asked, timeout=CALL_SECONDS, metadata=self.wire.metadata)
        await self.wire.call(f"create container {container.id}", answer)

    async def get(self, container: str) -> Container:
        """Raises `NotFound`."""
        asked = containers_pb2.GetContainerRequest(id=container)
        answer = self._stub().Get(asked, timeout=CALL_SECONDS, metadata=self.wire.metadata)
        found = (await self.wire.call(f"look up container {container}", answer)).container
        return Container(
            id=found.id,
            image=found.image,
            spec=found.spec.value,
            snapshotter=found.snapshotter,
            snapshot_key=found.snapshot_key,
            labels=dict(found.labels),
            runtime=found.runtime.name,
        )

    async def delete(self, container: str) -> None:
        """Raises `NotFound`."""
        asked = containers_pb2.DeleteContainerRequest(id=container)
        answer = self._stub().Delete(asked, timeout=CALL_SECONDS, metadata=self.wire.metadata)
        await self.wire.call(f"delete container {container}", answer)


@dataclass(frozen=True, slots=True)
class Tasks:
    """The running half of containers, named by the container."""

    wire: Wire

    def _stub(self) -> tasks_pb2_grpc.TasksStub:
        return tasks_pb2_grpc.TasksStub(self.wire.channel)

    async def create(
        self, container: str, rootfs: Iterable[Mount], *, stdin: str = "", stdout: str = "", stderr: str = ""
    ) -> int:
        """Make the container ready to start; the answer is its pid. The streams are paths of fifos, "" is null."""
        asked = tasks_pb2.CreateTaskRequest(
            container_id=container, rootfs=mount_messages(rootfs), stdin=stdin, stdout=stdout, stderr=stderr
        )
        answer = self._stub().Create(asked, timeout=TASK_SECONDS, metadata=self.wire.metadata)
        return (await self.wire.call(f"create task {container}", answer)).pid

    async def start(self, container: str) -> None:
        """Start the created task."""
        asked = tasks_pb2.StartRequest(container_id=container)
        answer = self._stub().Start(asked, timeout=TASK_SECONDS, metadata=self.wire.metadata)
        await self.wire.call(f"start task {container}", answer)

    async def wait(self, container: str) -> int:
        """The exit status, once it ends: 128 + n for one that a signal n ended. Has no deadline."""
        asked = tasks_pb2.WaitRequest(container_id=container)
        answer = self._stub().Wait(asked, metadata=self.wire.metadata)
        return (await self.wire.call(f"wait for task {container}", answer)).exit_status

    async def get(self, container: str) -> TaskState:
        """Raises `NotFound`."""
        asked = tasks_pb2.GetRequest(container_id=container)
        answer = self._stub().Get(asked, timeout=CALL_SECONDS, metadata=self.wire.metadata)
        found = (await self.wire.call(f"look up task {container}", answer)).process
        known = found.status in task_pb2.Status.values()
        return TaskState(
            found.pid, task_pb2.Status.Name(found.status).lower() if known else "unknown", found.exit_status
        )

    async def kill(self, container: str, signal: int, *, everything: bool = False) -> None:
        """Send a signal to the first process, or to all. Raises `NotFound` where it has ended."""
        asked = tasks_pb2.KillRequest(container_id=container, signal=signal, all=everything)
        answer = self._stub().Kill(asked, timeout=CALL_SECONDS, metadata=self.wire.metadata)
        await self.wire.call(f"signal task {container}", answer)

    async def delete(self, container: str) -> int:
        """Take an ended task away; the answer is its exit status. `FailedPrecondition` while it runs."""
        asked = tasks_pb2.DeleteTaskRequest(container_id=container)
        answer = self._stub().Delete(asked, timeout=TASK_SECONDS, metadata=self.wire.metadata)
        return (await self.wire.call(f"delete task {container}", answer)).exit_status
