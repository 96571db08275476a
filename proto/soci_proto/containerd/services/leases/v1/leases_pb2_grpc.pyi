# SPDX-License-Identifier: Apache-2.0
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Sequence
from typing import Any

import google.protobuf.empty_pb2
import grpc.aio
import soci_proto.containerd.services.leases.v1.leases_pb2

class LeasesStub:
    def __init__(self, channel: grpc.aio.Channel) -> None: ...
    def Create(
        self, request: soci_proto.containerd.services.leases.v1.leases_pb2.CreateRequest, /, *, timeout: float | None = None,
        metadata: Sequence[tuple[str, str]] | None = None, wait_for_ready: bool | None = None,
    ) -> Awaitable[soci_proto.containerd.services.leases.v1.leases_pb2.CreateResponse]: ...
    def Delete(
        self, request: soci_proto.containerd.services.leases.v1.leases_pb2.DeleteRequest, /, *, timeout: float | None = None,
        metadata: Sequence[tuple[str, str]] | None = None, wait_for_ready: bool | None = None,
    ) -> Awaitable[google.protobuf.empty_pb2.Empty]: ...
    def List(
        self, request: soci_proto.containerd.services.leases.v1.leases_pb2.ListRequest, /, *, timeout: float | None = None,
        metadata: Sequence[tuple[str, str]] | None = None, wait_for_ready: bool | None = None,
    ) -> Awaitable[soci_proto.containerd.services.leases.v1.leases_pb2.ListResponse]: ...

class LeasesServicer:
    async def Create(self, request: soci_proto.containerd.services.leases.v1.leases_pb2.CreateRequest, context: Any) -> soci_proto.containerd.services.leases.v1.leases_pb2.CreateResponse: ...
    async def Delete(self, request: soci_proto.containerd.services.leases.v1.leases_pb2.DeleteRequest, context: Any) -> google.protobuf.empty_pb2.Empty: ...
    async def List(self, request: soci_proto.containerd.services.leases.v1.leases_pb2.ListRequest, context: Any) -> soci_proto.containerd.services.leases.v1.leases_pb2.ListResponse: ...

def add_LeasesServicer_to_server(servicer: LeasesServicer, server: Any) -> None: ...
