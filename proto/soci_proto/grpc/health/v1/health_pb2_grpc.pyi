# SPDX-License-Identifier: Apache-2.0
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Sequence
from typing import Any

import grpc.aio
import soci_proto.grpc.health.v1.health_pb2

class HealthStub:
    def __init__(self, channel: grpc.aio.Channel) -> None: ...
    def Check(
        self, request: soci_proto.grpc.health.v1.health_pb2.HealthCheckRequest, /, *, timeout: float | None = None,
        metadata: Sequence[tuple[str, str]] | None = None, wait_for_ready: bool | None = None,
    ) -> Awaitable[soci_proto.grpc.health.v1.health_pb2.HealthCheckResponse]: ...
    def Watch(
        self, request: soci_proto.grpc.health.v1.health_pb2.HealthCheckRequest, /, *, timeout: float | None = None,
        metadata: Sequence[tuple[str, str]] | None = None, wait_for_ready: bool | None = None,
    ) -> AsyncIterable[soci_proto.grpc.health.v1.health_pb2.HealthCheckResponse]: ...

class HealthServicer:
    async def Check(self, request: soci_proto.grpc.health.v1.health_pb2.HealthCheckRequest, context: Any) -> soci_proto.grpc.health.v1.health_pb2.HealthCheckResponse: ...
    def Watch(self, request: soci_proto.grpc.health.v1.health_pb2.HealthCheckRequest, context: Any) -> AsyncIterator[soci_proto.grpc.health.v1.health_pb2.HealthCheckResponse]: ...

def add_HealthServicer_to_server(servicer: HealthServicer, server: Any) -> None: ...
