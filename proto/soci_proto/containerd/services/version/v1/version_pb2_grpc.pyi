# SPDX-License-Identifier: Apache-2.0
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Sequence
from typing import Any

import google.protobuf.empty_pb2
import grpc.aio
import soci_proto.containerd.services.version.v1.version_pb2

class VersionStub:
    def __init__(self, channel: grpc.aio.Channel) -> None: ...
    def Version(
        self, request: google.protobuf.empty_pb2.Empty, /, *, timeout: float | None = None,
        metadata: Sequence[tuple[str, str]] | None = None, wait_for_ready: bool | None = None,
    ) -> Awaitable[soci_proto.containerd.services.version.v1.version_pb2.VersionResponse]: ...

class VersionServicer:
    async def Version(self, request: google.protobuf.empty_pb2.Empty, context: Any) -> soci_proto.containerd.services.version.v1.version_pb2.VersionResponse: ...

def add_VersionServicer_to_server(servicer: VersionServicer, server: Any) -> None: ...
