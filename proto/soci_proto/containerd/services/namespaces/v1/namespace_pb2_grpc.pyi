# SPDX-License-Identifier: Apache-2.0
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Sequence
from typing import Any

import google.protobuf.empty_pb2
import grpc.aio
import soci_proto.containerd.services.namespaces.v1.namespace_pb2

class NamespacesStub:
    def __init__(self, channel: grpc.aio.Channel) -> None: ...
    def Get(
        self, request: soci_proto.containerd.services.namespaces.v1.namespace_pb2.GetNamespaceRequest, /, *, timeout: float | None = None,
        metadata: Sequence[tuple[str, str]] | None = None, wait_for_ready: bool | None = None,
    ) -> Awaitable[soci_proto.containerd.services.namespaces.v1.namespace_pb2.GetNamespaceResponse]: ...
    def List(
        self, request: soci_proto.containerd.services.namespaces.v1.namespace_pb2.ListNamespacesRequest, /, *, timeout: float | None = None,
        metadata: Sequence[tuple[str, str]] | None = None, wait_for_ready: bool | None = None,
    ) -> Awaitable[soci_proto.containerd.services.namespaces.v1.namespace_pb2.ListNamespacesResponse]: ...
    def Create(
        self, request: soci_proto.containerd.services.namespaces.v1.namespace_pb2.CreateNamespaceRequest, /, *, timeout: float | None = None,
        metadata: Sequence[tuple[str, str]] | None = None, wait_for_ready: bool | None = None,
    ) -> Awaitable[soci_proto.containerd.services.namespaces.v1.namespace_pb2.CreateNamespaceResponse]: ...
    def Delete(
        self, request: soci_proto.containerd.services.namespaces.v1.namespace_pb2.DeleteNamespaceRequest, /, *, timeout: float | None = None,
        metadata: Sequence[tuple[str, str]] | None = None, wait_for_ready: bool | None = None,
    ) -> Awaitable[google.protobuf.empty_pb2.Empty]: ...

class NamespacesServicer:
    async def Get(self, request: soci_proto.containerd.services.namespaces.v1.namespace_pb2.GetNamespaceRequest, context: Any) -> soci_proto.containerd.services.namespaces.v1.namespace_pb2.GetNamespaceResponse: ...
    async def List(self, request: soci_proto.containerd.services.namespaces.v1.namespace_pb2.ListNamespacesRequest, context: Any) -> soci_proto.containerd.services.namespaces.v1.namespace_pb2.ListNamespacesResponse: ...
    async def Create(self, request: soci_proto.containerd.services.namespaces.v1.namespace_pb2.CreateNamespaceRequest, context: Any) -> soci_proto.containerd.services.namespaces.v1.namespace_pb2.CreateNamespaceResponse: ...
    async def Delete(self, request: soci_proto.containerd.services.namespaces.v1.namespace_pb2.DeleteNamespaceRequest, context: Any) -> google.protobuf.empty_pb2.Empty: ...

def add_NamespacesServicer_to_server(servicer: NamespacesServicer, server: Any) -> None: ...
