# SPDX-License-Identifier: Apache-2.0
"""The containerd client over a real gRPC socket: headers, errors, values. containerd itself is in the integration tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from soci.errors import AlreadyExists, FailedPrecondition, InvalidConfig, NotFound, SociError, Unavailable
from soci_containerd import Mount, connect
from soci_containerd.calls import translate
from soci_proto.containerd.services.snapshots.v1 import snapshots_pb2, snapshots_pb2_grpc
from soci_proto.containerd.types import mount_pb2


class Snapshotter(snapshots_pb2_grpc.SnapshotsServicer):
    """Answers what the test says, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.headers: list[dict[str, str]] = []

    async def Prepare(self, request: snapshots_pb2.PrepareSnapshotRequest, context: Any) -> Any:  # noqa: N802
        self.asked.append(request)
        self.headers.append(dict(context.invocation_metadata()))
        if request.key == "there":
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, 'target snapshot "x"')
        mount = mount_pb2.Mount(type="overlay", source="overlay", options=["lowerdir=a"])
        return snapshots_pb2.PrepareSnapshotResponse(mounts=[mount])

    async def List(self, request: snapshots_pb2.ListSnapshotsRequest, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        del context
        self.asked.append(request)
        for name in ("a", "b"):
            info = snapshots_pb2.Info(name=name, kind=snapshots_pb2.COMMITTED, labels={"l": name})
            yield snapshots_pb2.ListSnapshotsResponse(info=[info])
        future = snapshots_pb2.Info(name="c")
        future.kind = 9  # type: ignore[assignment]
        yield snapshots_pb2.ListSnapshotsResponse(info=[future])


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[tuple[str, Snapshotter]]:
    address = str(tmp_path / "s.sock")
    servicer, running = Snapshotter(), grpc.aio.server()
    snapshots_pb2_grpc.add_SnapshotsServicer_to_server(servicer, running)
    running.add_insecure_port(f"unix:{address}")
    await running.start()
    yield address, servicer
    await running.stop(0)


async def test_a_call_carries_namespace_and_values(server: tuple[str, Snapshotter]) -> None:
    """The namespace is a header of every call, and requests and answers are plain values on our side."""
    address, servicer = server
    async with connect(f"unix://{address}", "ns1") as client:
        mounts = await client.snapshots("sociable").prepare("k", "p", {"a": "b"})
    assert mounts == (Mount("overlay", "overlay", ("lowerdir=a",)),)
    asked = servicer.asked[0]
    assert (asked.snapshotter, asked.key, asked.parent, dict(asked.labels)) == ("sociable", "k", "p", {"a": "b"})
    assert servicer.headers[0]["containerd-namespace"] == "ns1"
    assert "containerd-lease" not in servicer.headers[0]


async def test_a_status_becomes_our_error(server: tuple[str, Snapshotter]) -> None:
    """ALREADY_EXISTS, on which the pull turns, is `AlreadyExists`, and a call that nobody serves is a `SociError`."""
    async with connect(server[0], "ns1") as client:
        with pytest.raises(AlreadyExists, match="prepare snapshot there"):
            await client.snapshots("sociable").prepare("there", "", {})
        with pytest.raises(SociError):
            await client.images.get("x")


async def test_lists_are_streams_of_values(server: tuple[str, Snapshotter]) -> None:
    """All messages of a stream are read; a kind that we do not know is ``unknown``, not a crash."""
    async with connect(server[0], "ns1") as client:
        found = [snapshot async for snapshot in client.snapshots("s").list("kind==committed")]
    assert [(s.name, s.kind) for s in found] == [("a", "committed"), ("b", "committed"), ("c", "unknown")]
    assert list(server[1].asked[0].filters) == ["kind==committed"]


async def test_nobody_there(tmp_path: Path) -> None:
    """No socket, a file that is none and a socket without a server are all `Unavailable`, at once."""
    (tmp_path / "file").write_text("")
    for name in ("none", "file"):
        with pytest.raises(Unavailable, match="--address"):
            async with connect(str(tmp_path / name), "ns1"):
                pass
    running = grpc.aio.server()
    running.add_insecure_port(f"unix:{tmp_path}/dead")
    await running.start()
    async with connect(str(tmp_path / "dead"), "ns1") as client:
        await running.stop(0)
        with pytest.raises(SociError):
            await client.version()


@pytest.mark.parametrize("namespace", ["", "a\nb", "é"])
async def test_a_namespace_must_fit_a_header(namespace: str, tmp_path: Path) -> None:
    """What would break the header is refused before anything is sent."""
    with pytest.raises(InvalidConfig):
        async with connect(str(tmp_path), namespace):
            pass


@pytest.mark.parametrize(
    ("code", "details", "cls", "words"),
    [
        (grpc.StatusCode.NOT_FOUND, "gone", NotFound, "do it: gone"),
        (grpc.StatusCode.UNAVAILABLE, "", Unavailable, "do it: unavailable"),
        (grpc.StatusCode.UNKNOWN, "odd", SociError, "do it: odd"),
        (grpc.StatusCode.DATA_LOSS, "", SociError, "data_loss"),
        (
            grpc.StatusCode.INVALID_ARGUMENT,
            "snapshotter not loaded: sociable: invalid argument",
            FailedPrecondition,
            "add [proxy_plugins.sociable]",
        ),
    ],
)
def test_translation(code: grpc.StatusCode, details: str, cls: type[SociError], words: str) -> None:
    """Each status has one class of ours, and the message says what was tried."""
    error = translate(code, details, "do it")
    assert type(error) is cls
    assert words in str(error)
