# SPDX-License-Identifier: Apache-2.0
"""How a call to containerd is made: headers, deadlines, and the one border where gRPC's errors become ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, TypeVar

import grpc
import grpc.aio

from soci.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidInput,
    LimitExceeded,
    NotFound,
    SociError,
    Unauthorized,
    Unavailable,
    Unsupported,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")

CALL_SECONDS: Final = 60.0
"""Deadline of a call that only touches containerd's metadata."""
PREPARE_SECONDS: Final = 180.0
"""Deadline of Prepare: a remote snapshotter looks for an index and mounts, or unpacks a small layer, meanwhile."""
APPLY_SECONDS: Final = 1800.0
"""Deadline of unpacking one layer."""
TASK_SECONDS: Final = 120.0
"""Deadline of creating, starting or deleting a task: a shim starts and mounts meanwhile."""
STREAM_STALL_SECONDS: Final = 60.0
"""The longest silence of one message in a stream of content."""
MESSAGE_LIMIT: Final = 16 << 20
"""Bytes of the largest message either way: containerd's own limit."""

NAMESPACE_HEADER: Final = "containerd-namespace"
LEASE_HEADER: Final = "containerd-lease"

_ERRORS: Final[dict[grpc.StatusCode, type[SociError]]] = {
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInput,
    grpc.StatusCode.OUT_OF_RANGE: InvalidInput,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.ABORTED: FailedPrecondition,
    grpc.StatusCode.UNIMPLEMENTED: Unsupported,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAUTHENTICATED: Unauthorized,
    grpc.StatusCode.PERMISSION_DENIED: Unauthorized,
    grpc.StatusCode.RESOURCE_EXHAUSTED: LimitExceeded,
}


_NO_SNAPSHOTTER: Final = "snapshotter not loaded:"
"""containerd's words for a snapshotter that it has no plugin for; its code (invalid argument) says too little."""


def translate(code: grpc.StatusCode, details: str, doing: str) -> SociError:
    """Our error for a gRPC status. ``doing`` says what was tried, e.g. ``prepare snapshot sha256:…``."""
    plugin = details.partition(_NO_SNAPSHOTTER)[2].partition(":")[0].strip()
    if plugin:
        way_out = f"add [proxy_plugins.{plugin}] to its configuration, or name another with --snapshotter"
        return FailedPrecondition(f"containerd has no snapshotter {plugin}: {way_out}")
    return _ERRORS.get(code, SociError)(f"containerd: {doing}: {details or code.name.lower()}")


@contextmanager
def border(doing: str) -> Iterator[None]:
    """Let no gRPC exception out: each leaves as one of `soci.errors`."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise translate(error.code(), error.details() or "", doing) from error
    except TimeoutError as error:
        raise DeadlineExceeded(f"containerd: {doing}: no answer for {STREAM_STALL_SECONDS:.0f} s") from error


@dataclass(frozen=True, slots=True)
class Wire:
    """A channel with the headers that every call on it carries."""

    channel: grpc.aio.Channel
    address: str
    metadata: tuple[tuple[str, str], ...]

    @property
    def namespace(self) -> str:
        """The containerd namespace that all calls are made in."""
        return dict(self.metadata)[NAMESPACE_HEADER]

    def with_lease(self, lease: str) -> Wire:
        """The same channel, where everything that is created or found belongs to ``lease``."""
        kept = tuple(item for item in self.metadata if item[0] != LEASE_HEADER)
        return replace(self, metadata=(*kept, (LEASE_HEADER, lease)))

    async def call(self, doing: str, answer: Awaitable[T]) -> T:
        """Await one unary call that was made with our metadata and a deadline."""
        with border(doing):
            return await answer

    async def stream(self, doing: str, answers: AsyncIterable[T]) -> AsyncGenerator[T, None]:
        """The answers of a streaming call; silence longer than `STREAM_STALL_SECONDS` is `DeadlineExceeded`."""
        iterator = aiter(answers)
        while True:
            with border(doing):
                try:
                    async with asyncio.timeout(STREAM_STALL_SECONDS):
                        answer = await anext(iterator)
                except StopAsyncIteration:
                    return
            yield answer
