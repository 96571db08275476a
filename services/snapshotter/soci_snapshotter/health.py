# SPDX-License-Identifier: Apache-2.0
"""gRPC's health protocol on containerd's socket: SERVING once calls are answered, NOT_SERVING while we stop."""

# ruff: noqa: N802, D102 -- methods are named, and described, by the protocol
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc

from soci_proto.grpc.health.v1 import health_pb2 as pb
from soci_proto.grpc.health.v1 import health_pb2_grpc as rpc

MOST_WATCHERS = 32
"""Watch streams at a time: each holds one of the calls that the server answers at a time."""
NAME_SHOWN = 100
"""Characters of an unknown service's name that are told."""


class Health(rpc.HealthServicer):
    """The state of all services of a socket, which are ready together. ``""`` names the whole, as the protocol says."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset({"", *services})
        self._serving = False
        self._ended = False
        self._changed = asyncio.Condition()
        self._watchers = 0

    async def serving(self) -> None:
        """Say from now on that calls are answered."""
        await self._change(serving=True, ended=False)

    async def ending(self) -> None:
        """Say that they soon are not, and let those who watch go."""
        await self._change(serving=False, ended=True)

    async def Check(self, request: pb.HealthCheckRequest, context: Any) -> pb.HealthCheckResponse:
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service[:NAME_SHOWN]!r} here")
        return self._state(request.service)

    async def Watch(self, request: pb.HealthCheckRequest, context: Any) -> AsyncIterator[pb.HealthCheckResponse]:
        if self._watchers >= MOST_WATCHERS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MOST_WATCHERS} watch already")
        self._watchers += 1
        try:
            told = None
            while (state := self._state(request.service)) != told:
                yield state
                told = state
                await self._until_other(request.service, state)
        finally:
            self._watchers -= 1

    async def _until_other(self, service: str, told: pb.HealthCheckResponse) -> None:
        """Wait for a state that was not told, or for the end."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._ended or self._state(service) != told)

    async def _change(self, *, serving: bool, ended: bool) -> None:
        async with self._changed:
            self._serving, self._ended = serving, ended
            self._changed.notify_all()

    def _state(self, service: str) -> pb.HealthCheckResponse:
        if service not in self._services:
            return pb.HealthCheckResponse(status=pb.HealthCheckResponse.SERVICE_UNKNOWN)
        status = pb.HealthCheckResponse.SERVING if self._serving else pb.HealthCheckResponse.NOT_SERVING
        return pb.HealthCheckResponse(status=status)
