# SPDX-License-Identifier: Apache-2.0
"""gRPC's health protocol on containerd's socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from soci_bus.memory import MemoryBus
from soci_proto.grpc.health.v1 import health_pb2 as pb
from soci_proto.grpc.health.v1 import health_pb2_grpc as rpc
from soci_snapshotter import cri, grpc_door
from soci_snapshotter.health import MOST_WATCHERS
from support.snapshotter import Process

LIMIT = 30.0
SERVING, NOT_SERVING = pb.HealthCheckResponse.SERVING, pb.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def process(stack_folder: Callable[[], Path]) -> Iterator[Process]:
    """A snapshotter on a folder of its own."""
    it = Process(stack_folder())
    try:
        it.start()
        yield it
    finally:
        it.close()


def test_the_process_is_serving_until_it_stops(process: Process) -> None:
    """Whoever watches hears SERVING, then NOT_SERVING once it is told to stop, then the end; its end is not held up."""
    with grpc.insecure_channel(f"unix:{process.socket}") as channel, ThreadPoolExecutor(1) as thread:
        stub: Any = rpc.HealthStub(cast("Any", channel))
        for name in ("", grpc_door.SERVICE):
            assert stub.Check(pb.HealthCheckRequest(service=name), timeout=LIMIT).status == SERVING
        watching = stub.Watch(pb.HealthCheckRequest(), timeout=LIMIT)
        assert next(watching).status == SERVING
        stopped = thread.submit(process.stop)
        assert [answer.status for answer in watching] == [NOT_SERVING]
        assert stopped.result(LIMIT) == 0


@asynccontextmanager
async def door(folder: Path, *, images: bool = False) -> AsyncIterator[rpc.HealthStub]:
    """Our socket, with or without the image service, and a client."""
    address = f"{folder}/s.sock"
    async with cri.keychain(f"{folder}/none", MemoryBus()) as proxy:
        listening = grpc_door.listening(address, cast("Any", None), proxy=proxy if images else None)
        async with listening, grpc.aio.insecure_channel(f"unix:{address}") as channel:
            yield rpc.HealthStub(channel)


@pytest.mark.parametrize("images", [False, True])
async def test_the_image_service_is_one_of_ours_where_it_is_on(tmp_path: Path, *, images: bool) -> None:
    """Its name is answered then, and unknown otherwise, as any other is."""
    async with door(tmp_path, images=images) as stub:
        told = {name: await _told(stub, name) for name in (grpc_door.SERVICE, cri.SERVICE, "other")}
    assert told == {grpc_door.SERVICE: "OK", cri.SERVICE: "OK" if images else "NOT_FOUND", "other": "NOT_FOUND"}


async def _told(stub: rpc.HealthStub, name: str) -> str:
    try:
        answer = await stub.Check(pb.HealthCheckRequest(service=name), timeout=LIMIT)
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return "OK" if answer.status == SERVING else str(answer.status)


async def test_watching_an_unknown_service(tmp_path: Path) -> None:
    """The protocol wants a state and no error: the service may come."""
    async with door(tmp_path) as stub:
        async for answer in stub.Watch(pb.HealthCheckRequest(service="other"), timeout=LIMIT):
            assert answer.status == pb.HealthCheckResponse.SERVICE_UNKNOWN
            break


async def test_so_many_watch_at_a_time(tmp_path: Path) -> None:
    """One more is refused, until one goes; Check is answered all the while."""
    async with door(tmp_path) as stub:
        watching: list[Any] = [stub.Watch(pb.HealthCheckRequest(), timeout=LIMIT) for _ in range(MOST_WATCHERS)]
        for one in watching:
            assert (await one.read()).status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as told:
            async for _ in stub.Watch(pb.HealthCheckRequest(), timeout=LIMIT):
                pass
        assert told.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await stub.Check(pb.HealthCheckRequest(), timeout=LIMIT)).status == SERVING
        watching.pop().cancel()
        async with asyncio.timeout(LIMIT):
            while True:
                again: Any = stub.Watch(pb.HealthCheckRequest(), timeout=LIMIT)
                try:
                    assert (await again.read()).status == SERVING
                    break
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.01)
