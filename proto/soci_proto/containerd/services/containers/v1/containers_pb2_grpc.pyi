# SPDX-License-Identifier: Apache-2.0
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Sequence
from typing import Any

import google.protobuf.empty_pb2
import grpc.aio
import soci_proto.containerd.services.containers.v1.containers_pb2

class ContainersStub:
    def __init__(self, channel: grpc.aio.Channel) -> None: ...
    def Get(
        self, request: soci_proto.containerd.services.containers.v1.containers_pb2.GetContainerRequest, /, *, timeout: float | None = None,
        metadata: Sequence[tuple[str, str]] | None = None, wait_for_ready: bool | None = None,
    ) -> Awaitable[soci_proto.containerd.services.containers.v1.containers_pb2.GetContainerResponse]: ...
    def List(
        self, request: soci_proto.containerd.services.containers.v1.containers_pb2.ListContainersRequest, /, *, timeout: float | None = None,
        metadata: Sequence[tuple[str, str]] | None = None, wait_for_ready: bool | None = None,
    ) -> Awaitable[soci_proto.containerd.services.containers.v1.containers_pb2.ListContainersResponse]: ...
    def Create(
        self, request: soci_proto.containerd.services.containers.v1.containers_pb2.CreateContainerRequest, /, *, timeout: float | None = None,
        metadata: Sequence[tuple[str, str]] | None = None, wait_for_ready: bool | None = None,
    ) -> Awaitable[soci_proto.containerd.services.containers.v1.containers_pb2.CreateContainerResponse]: ...
    def Delete(
        self, request: soci_proto.containerd.services.containers.v1.containers_pb2.DeleteContainerRequest, /, *, timeout: float | None = None,
        metadata: Sequence[tuple[str, str]] | None = None, wait_for_ready: bool | None = None,
    ) -> Awaitable[google.protobuf.empty_pb2.Empty]: ...

class ContainersServicer:
    async def Get(self, request: soci_proto.containerd.services.containers.v1.containers_pb2.GetContainerRequest, context: Any) -> soci_proto.containerd.services.containers.v1.containers_pb2.GetContainerResponse: ...
    async def List(self, request: soci_proto.containerd.services.containers.v1.containers_pb2.ListContainersRequest, context: Any) -> soci_proto.containerd.services.containers.v1.containers_pb2.ListContainersResponse: ...
    async def Create(self, request: soci_proto.containerd.services.containers.v1.containers_pb2.CreateContainerRequest, context: Any) -> soci_proto.containerd.services.containers.v1.containers_pb2.CreateContainerResponse: ...
    async def Delete(self, request: soci_proto.containerd.services.containers.v1.containers_pb2.DeleteContainerRequest, context: Any) -> google.protobuf.empty_pb2.Empty: ...

def add_ContainersServicer_to_server(servicer: ContainersServicer, server: Any) -> None: ...
