# SPDX-License-Identifier: Apache-2.0
"""containerd's snapshots service over gRPC: requests to calls of `Snapshots`, answers and errors back.

Nothing is decided here. Clients branch on the status code alone, so each class of `soci.errors` has one.
"""

# ruff: noqa: N802, D102 -- methods are named, and described, by the protocol
from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp

from soci import errors
from soci.errors import FailedPrecondition, InvalidConfig, SociError
from soci_proto.containerd.services.snapshots.v1 import snapshots_pb2 as pb
from soci_proto.containerd.services.snapshots.v1 import snapshots_pb2_grpc as rpc
from soci_proto.containerd.types.mount_pb2 import Mount as MountMessage
from soci_proto.grpc.health.v1 import health_pb2_grpc as health_rpc
from soci_runtime.activation import activated
from soci_runtime.config import ACTIVATED, DEFAULT_ADDRESS
from soci_runtime.kinds import SOCKET_PATH
from soci_runtime.logs import log
from soci_snapshotter import cri
from soci_snapshotter.cri import ImageProxy
from soci_snapshotter.health import Health
from soci_snapshotter.mounts import Mount
from soci_snapshotter.relay import relaying
from soci_snapshotter.snapshots import Snapshots
from soci_snapshotter.state import Snapshot

SERVICE = "containerd.services.snapshots.v1.Snapshots"
MESSAGE_LIMIT = 16 << 20
"""Bytes of a message each way, as containerd has it."""
LIST_BATCH = 100
"""Snapshots in one message of List's stream."""
LIST_BYTES = MESSAGE_LIMIT // 4
"""Bytes of such a message, before its last snapshot; one snapshot has less than as much again."""
ERROR_TEXT = 1000
"""Bytes of an error's text: the protocol writes most of those beyond ASCII as three, and limits the whole to 8 KiB."""
CONNECT_TIMEOUT = 2.0
"""Seconds in which somebody who listens on the socket already takes a connection."""
CONCURRENT_CALLS = 256
"""Calls answered at a time; gRPC refuses more with RESOURCE_EXHAUSTED."""
STOP_GRACE = 5.0
"""Seconds that calls under way get when the service stops."""

_STATUS: tuple[tuple[type[SociError], grpc.StatusCode], ...] = (
    (errors.AlreadyExists, grpc.StatusCode.ALREADY_EXISTS),
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.InvalidInput, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.FailedPrecondition, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
    (errors.Unsupported, grpc.StatusCode.UNIMPLEMENTED),
)
_KINDS = {"view": pb.VIEW, "active": pb.ACTIVE, "committed": pb.COMMITTED}

Request = TypeVar("Request")
Reply = TypeVar("Reply")
Call = Callable[["SnapshotsDoor", Request, Any], Coroutine[Any, Any, Reply]]


def status_of(error: BaseException) -> grpc.StatusCode:
    """The status by which containerd's clients know this error."""
    return next((status for cls, status in _STATUS if isinstance(error, cls)), grpc.StatusCode.UNKNOWN)


def answered(call: Call[Request, Reply]) -> Call[Request, Reply]:
    """Every exception of a call becomes a status; a bug is logged with its traceback, too."""

    @wraps(call)
    async def border(door: SnapshotsDoor, request: Request, context: Any) -> Reply:
        try:
            return await call(door, request, context)
        except SociError as error:
            if status_of(error) in {grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE}:
                log.warning("call failed", call=call.__name__, error=error)
            await context.abort(status_of(error), _text(error))
        except Exception as error:  # noqa: BLE001  a bug must reach the client as a status, not as a dropped call
            log.exception("call failed", call=call.__name__, error=error)
            await context.abort(grpc.StatusCode.UNKNOWN, f"{call.__name__}: internal error {type(error).__name__}")
        raise AssertionError  # abort raises

    return border


class SnapshotsDoor(rpc.SnapshotsServicer):
    """The adapter. Method names are the service's."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots

    @answered
    async def Prepare(self, request: pb.PrepareSnapshotRequest, context: Any) -> pb.PrepareSnapshotResponse:
        made = await self._snapshots.prepare(request.key, request.parent, dict(request.labels), _namespace(context))
        return pb.PrepareSnapshotResponse(mounts=_mounts(made))

    @answered
    async def View(self, request: pb.ViewSnapshotRequest, context: Any) -> pb.ViewSnapshotResponse:  # noqa: ARG002
        made = await self._snapshots.view(request.key, request.parent, dict(request.labels))
        return pb.ViewSnapshotResponse(mounts=_mounts(made))

    @answered
    async def Mounts(self, request: pb.MountsRequest, context: Any) -> pb.MountsResponse:  # noqa: ARG002
        return pb.MountsResponse(mounts=_mounts(await self._snapshots.mounts(request.key)))

    @answered
    async def Commit(self, request: pb.CommitSnapshotRequest, context: Any) -> Empty:  # noqa: ARG002
        await self._snapshots.commit(request.name, request.key, dict(request.labels), request.parent)
        return Empty()

    @answered
    async def Remove(self, request: pb.RemoveSnapshotRequest, context: Any) -> Empty:  # noqa: ARG002
        await self._snapshots.remove(request.key)
        return Empty()

    @answered
    async def Stat(self, request: pb.StatSnapshotRequest, context: Any) -> pb.StatSnapshotResponse:  # noqa: ARG002
        return pb.StatSnapshotResponse(info=_info(await self._snapshots.stat(request.key)))

    @answered
    async def Update(self, request: pb.UpdateSnapshotRequest, context: Any) -> pb.UpdateSnapshotResponse:  # noqa: ARG002
        paths = list(request.update_mask.paths)
        changed = await self._snapshots.update(request.info.name, dict(request.info.labels), paths)
        return pb.UpdateSnapshotResponse(info=_info(changed))

    async def List(self, request: pb.ListSnapshotsRequest, context: Any) -> AsyncIterator[pb.ListSnapshotsResponse]:
        found = await self._list(request, context)
        batch: list[pb.Info] = []
        size = 0
        for snapshot in found:
            batch.append(_info(snapshot))
            size += batch[-1].ByteSize()
            if len(batch) >= LIST_BATCH or size >= LIST_BYTES:
                yield pb.ListSnapshotsResponse(info=batch)
                batch, size = [], 0
        if batch:
            yield pb.ListSnapshotsResponse(info=batch)

    @answered
    async def _list(self, request: pb.ListSnapshotsRequest, context: Any) -> Sequence[Snapshot]:  # noqa: ARG002
        return await self._snapshots.list(list(request.filters))

    @answered
    async def Usage(self, request: pb.UsageRequest, context: Any) -> pb.UsageResponse:  # noqa: ARG002
        size, inodes = await self._snapshots.usage(request.key)
        return pb.UsageResponse(size=size, inodes=inodes)

    @answered
    async def Cleanup(self, request: pb.CleanupRequest, context: Any) -> Empty:  # noqa: ARG002
        await self._snapshots.cleanup()
        return Empty()


def _text(error: BaseException) -> str:
    return str(error).encode(errors="replace")[:ERROR_TEXT].decode(errors="ignore") or type(error).__name__


def _namespace(context: Any) -> str:
    metadata = dict(context.invocation_metadata() or ())
    return str(metadata.get("containerd-namespace", ""))


def _mounts(mounts: Sequence[Mount]) -> list[MountMessage]:
    return [MountMessage(type=one.type, source=one.source, options=one.options) for one in mounts]


def _info(snapshot: Snapshot) -> pb.Info:
    return pb.Info(
        name=snapshot.name,
        parent=snapshot.parent,
        kind=_KINDS[snapshot.kind],
        created_at=_time(snapshot.created_ns),
        updated_at=_time(snapshot.updated_ns),
        labels=dict(snapshot.labels),
    )


def _time(at_ns: int) -> Timestamp:
    return Timestamp(seconds=at_ns // 1_000_000_000, nanos=at_ns % 1_000_000_000)


async def claim_socket(address: str) -> None:
    """Make room for a socket at ``address``: one left over by a killed predecessor is taken away.

    Raises `FailedPrecondition` where somebody listens on it, `InvalidConfig` where no socket can be.
    """
    path = Path(address)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.is_socket():
            if await _somebody_listens(address):
                raise FailedPrecondition(f"another process listens on {address} already")
            path.unlink()
        elif path.exists():
            raise InvalidConfig(f"cannot listen on {address}: it is there and no socket")
    except OSError as error:
        raise InvalidConfig(f"cannot listen on {address}: {error.strerror}") from error


def place_of(address: str, folder: Path) -> tuple[str, socket.socket | None]:
    """Where we listen, and systemd's socket that is joined to it, for the setting ``address``.

    For `ACTIVATED` we listen in ``folder``, which is root's alone. Raises `InvalidConfig`.
    """
    if address != ACTIVATED:
        return address, None
    outside = activated()
    if outside is None:
        log.warning("systemd passes no socket", address=DEFAULT_ADDRESS)
        return DEFAULT_ADDRESS, None
    inside = str(folder / "door.sock")
    if len(os.fsencode(inside)) > SOCKET_PATH:
        outside.close()
        raise InvalidConfig(f"{inside} is too long for a socket's path ({SOCKET_PATH} bytes): choose a shorter root")
    return inside, outside


@asynccontextmanager
async def listening(
    address: str, snapshots: Snapshots, *, proxy: ImageProxy | None = None, outside: socket.socket | None = None
) -> AsyncIterator[None]:
    """Serve on the unix socket ``address``, which `claim_socket` made room for, and on systemd's ``outside``."""
    path = Path(address)
    health = Health([SERVICE, *([cri.SERVICE] if proxy else [])])
    try:
        options = [
            ("grpc.max_receive_message_length", MESSAGE_LIMIT),
            ("grpc.max_send_message_length", MESSAGE_LIMIT),
        ]
        server = grpc.aio.server(options=options, maximum_concurrent_rpcs=CONCURRENT_CALLS)
        rpc.add_SnapshotsServicer_to_server(SnapshotsDoor(snapshots), server)
        health_rpc.add_HealthServicer_to_server(health, server)
        if proxy is not None:
            server.add_generic_rpc_handlers((proxy.handler(),))
        server.add_insecure_port(f"unix:{address}")
        await server.start()
        path.chmod(0o660)
    except (OSError, RuntimeError) as error:
        raise InvalidConfig(f"cannot listen on {address}: {error}") from error
    async with AsyncExitStack() as stack:
        stop_accepting = None
        if outside is not None:
            stack.callback(outside.close)
            stop_accepting = await stack.enter_async_context(relaying(outside, address))
        await health.serving()
        try:
            yield
        finally:
            if stop_accepting:
                stop_accepting()
            await health.ending()
            await server.stop(STOP_GRACE)
            path.unlink(missing_ok=True)


async def _somebody_listens(address: str) -> bool:
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            _, writer = await asyncio.open_unix_connection(address)
    except TimeoutError:  # its queue is full
        return True
    except OSError:
        return False
    writer.close()
    return True
