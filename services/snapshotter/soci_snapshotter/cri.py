# SPDX-License-Identifier: Apache-2.0
"""CRI's image service on our socket, passed on to the one behind it: so we learn the logins that the kubelet brings.

Requests and answers are passed on as the bytes that came, so nothing of a newer protocol is lost; only copies of two
requests are read. What the protocol has beyond these five calls is UNIMPLEMENTED.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from soci.errors import NotFound
from soci_bus.asks import FindLogin, LoginFound
from soci_bus.face import Bus, Context
from soci_proto.cri.runtime.v1 import api_pb2 as pb
from soci_runtime.logs import log
from soci_snapshotter.logins import Auth, Logins

SERVICE = "runtime.v1.ImageService"
_PASSED_ON = ("ListImages", "ImageStatus", "ImageFsInfo")
MESSAGE_LIMIT = 16 << 20
"""Bytes of a message each way, as containerd has it."""
MOST_CALLS = 64
"""Calls passed on at a time: each pull needs further calls of the same socket, which must not be refused for it."""
RECONNECT_MS = (100, 3_000)
"""The first and the longest wait between tries to reach the image service."""
_OURS = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED})
"""What a call may end with though nobody answered it."""
_TRACE = frozenset({"traceparent", "tracestate"})
_DETAILS = "grpc-status-details-bin"

_Send = Callable[..., Any]
_Call = Callable[[bytes, Any], Awaitable[bytes]]


class ImageProxy:
    """The five calls, and what is learned from them."""

    def __init__(self, backend: str, channel: Any, logins: Logins) -> None:
        self._backend = backend
        self._send: dict[str, _Send] = {
            name: channel.unary_unary(f"/{SERVICE}/{name}") for name in (*_PASSED_ON, "PullImage", "RemoveImage")
        }
        self._logins = logins
        self._reached = False
        self._calls = 0

    def handler(self) -> Any:
        """What a gRPC server registers. Without serializers, messages are bytes."""
        calls: dict[str, _Call] = {name: self._passed_on(name) for name in _PASSED_ON}
        calls |= {"PullImage": self._pull, "RemoveImage": self._remove}
        return grpc.method_handlers_generic_handler(
            SERVICE, {name: grpc.unary_unary_rpc_method_handler(call) for name, call in calls.items()}
        )

    async def find(self, ask: FindLogin, _context: Context) -> LoginFound:
        """Answer the bus. Raises `NotFound`, which says nothing of other repositories' logins."""
        login = self._logins.find(ask.registry, ask.repository)
        if login is None:
            raise NotFound(f"no pull brought a login for {ask.registry}/{ask.repository}")
        return LoginFound(login.username, login.secret)

    def _passed_on(self, name: str) -> _Call:
        async def call(request: bytes, context: Any) -> bytes:
            return await self._forward(name, request, context)

        return call

    async def _pull(self, request: bytes, context: Any) -> bytes:
        asked = await _read(pb.PullImageRequest, request, context)
        auth = asked.auth
        pull = self._logins.begin(
            asked.image.image,
            Auth(auth.username, auth.password, auth.auth, auth.server_address, auth.identity_token),
        )
        try:
            answer = await self._forward("PullImage", request, context)
        except BaseException:
            if pull is not None:
                pull.failed()
            raise
        if pull is not None:
            pull.succeeded(_image_id(answer))
        return answer

    async def _remove(self, request: bytes, context: Any) -> bytes:
        asked = await _read(pb.RemoveImageRequest, request, context)
        answer = await self._forward("RemoveImage", request, context)
        self._logins.forget(asked.image.image)
        return answer

    async def _forward(self, name: str, request: bytes, context: Any) -> bytes:
        """The image service's answer, or its status as it came."""
        if self._calls >= MOST_CALLS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MOST_CALLS} calls wait for {self._backend}")
        self._calls += 1
        try:
            trace = tuple((key, value) for key, value in context.invocation_metadata() or () if key in _TRACE)
            answer = await self._send[name](request, timeout=context.time_remaining(), metadata=trace)
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.UNAVAILABLE and not self._reached:
                log.warning("the image service is not reached", call=name, address=self._backend)
                text = f"server is not initialized yet: nobody answers on {self._backend}"
                await context.abort(grpc.StatusCode.UNAVAILABLE, text)
            self._reached = self._reached or error.code() not in _OURS
            details = tuple((key, value) for key, value in error.trailing_metadata() or () if key == _DETAILS)
            await context.abort(error.code(), error.details() or "", details)
        finally:
            self._calls -= 1
        self._reached = True
        return bytes(answer)


@asynccontextmanager
async def keychain(backend: str, bus: Bus) -> AsyncIterator[ImageProxy]:
    """A proxy to the image service on the socket ``backend``, there yet or not. The bus may ask for logins."""
    options = [
        ("grpc.max_receive_message_length", MESSAGE_LIMIT),
        ("grpc.max_send_message_length", MESSAGE_LIMIT),
        ("grpc.initial_reconnect_backoff_ms", RECONNECT_MS[0]),
        ("grpc.min_reconnect_backoff_ms", RECONNECT_MS[0]),
        ("grpc.max_reconnect_backoff_ms", RECONNECT_MS[1]),
        ("grpc.use_local_subchannel_pool", 1),  # or other channels of the process to that socket set the pace
    ]
    async with grpc.aio.insecure_channel(f"unix:{backend}", options=options) as channel:
        proxy = ImageProxy(backend, channel, Logins())
        await bus.serve(FindLogin, proxy.find)
        yield proxy


async def _read(kind: Any, request: bytes, context: Any) -> Any:
    try:
        return kind.FromString(request)
    except DecodeError:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no {kind.DESCRIPTOR.name}")


def _image_id(answer: bytes) -> str:
    try:
        return str(pb.PullImageResponse.FromString(answer).image_ref)
    except DecodeError:
        return ""
