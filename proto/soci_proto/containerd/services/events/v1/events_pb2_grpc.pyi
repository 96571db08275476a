# SPDX-License-Identifier: Apache-2.0
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Sequence
from typing import Any

import grpc.aio
import soci_proto.containerd.services.events.v1.events_pb2

class EventsStub:
    def __init__(self, channel: grpc.aio.Channel) -> None: ...
    def Subscribe(
        self, request: soci_proto.containerd.services.events.v1.events_pb2.SubscribeRequest, /, *, timeout: float | None = None,
        metadata: Sequence[tuple[str, str]] | None = None, wait_for_ready: bool | None = None,
    ) -> AsyncIterable[soci_proto.containerd.services.events.v1.events_pb2.Envelope]: ...

class EventsServicer:
    def Subscribe(self, request: soci_proto.containerd.services.events.v1.events_pb2.SubscribeRequest, context: Any) -> AsyncIterator[soci_proto.containerd.services.events.v1.events_pb2.Envelope]: ...

def add_EventsServicer_to_server(servicer: EventsServicer, server: Any) -> None: ...
