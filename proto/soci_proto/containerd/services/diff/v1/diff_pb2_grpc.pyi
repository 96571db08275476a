# SPDX-License-Identifier: Apache-2.0
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Sequence
from typing import Any

import grpc.aio
import soci_proto.containerd.services.diff.v1.diff_pb2

class DiffStub:
    def __init__(self, channel: grpc.aio.Channel) -> None: ...
    def Apply(
        self, request: soci_proto.containerd.services.diff.v1.diff_pb2.ApplyRequest, /, *, timeout: float | None = None,
        metadata: Sequence[tuple[str, str]] | None = None, wait_for_ready: bool | None = None,
    ) -> Awaitable[soci_proto.containerd.services.diff.v1.diff_pb2.ApplyResponse]: ...

class DiffServicer:
    async def Apply(self, request: soci_proto.containerd.services.diff.v1.diff_pb2.ApplyRequest, context: Any) -> soci_proto.containerd.services.diff.v1.diff_pb2.ApplyResponse: ...

def add_DiffServicer_to_server(servicer: DiffServicer, server: Any) -> None: ...
