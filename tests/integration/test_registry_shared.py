# SPDX-License-Identifier: Apache-2.0
"""Three processes and one registry: a server sees no more requests at a time than the node's budget, and is left alone
when it asks for that."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web

from soci.digest import sha256_digest
from soci.errors import DeadlineExceeded
from soci.oci import OCI_CONFIG, OCI_LAYER_GZIP, OCI_MANIFEST, Descriptor, Manifest, encode_manifest
from soci_bus.asks import FetchLayer, ReadImageConfig
from soci_bus.nats import connect
from soci_dev.stack import Stack
from soci_registry import NoCredentials, Registry, RegistrySettings
from soci_registry.budget import Budget
from soci_registry.slots import SlotBook
from soci_registry.urls import Origin
from support.registry import front

BLOB = bytes(range(256)) * 64
DIGEST = sha256_digest(BLOB)
TOTAL = 4

CLIENT = """
import asyncio, sys
from dataclasses import replace
from pathlib import Path
from soci_registry import NoCredentials, Registry, RegistrySettings

async def main(address, folder, name, kind, count):
    settings = RegistrySettings(connections_per_host=TOTAL, min_wait=0.01, use_environment_proxies=False)
    async with Registry(settings=settings, credentials=NoCredentials(), budget=Path(folder)) as client:
        repository = client.repository(f"{address}/{name}")
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        async def read(at):
            got = await repository.blob_range("DIGEST", at, at + 10, urgent=kind == "miss")
            assert got == bytes(range(at, at + 10))
        await asyncio.gather(*(read(at) for at in range(int(count))))
    print("done")

asyncio.run(main(*sys.argv[1:]))
""".replace("TOTAL", str(TOTAL)).replace("DIGEST", DIGEST)


@dataclass
class Server:
    """A registry that counts who is in it; ``let`` says who may leave."""

    address: str = ""
    now: int = 0
    peak: int = 0
    served: list[str] = field(default_factory=list)
    began: list[tuple[float, str]] = field(default_factory=list)
    refuse: int = 0
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set: requests of ``bulk`` leave."""

    async def manners(self, request: web.Request) -> web.Response:
        name = request.path.split("/")[2]
        self.began.append((asyncio.get_running_loop().time(), name))
        if self.refuse:
            self.refuse -= 1
            return web.Response(status=429, headers={"Retry-After": "2"})
        self.now += 1
        self.peak = max(self.peak, self.now)
        try:
            await asyncio.sleep(0.005)
            if name == "bulk":
                await self.closed.wait()
        finally:
            self.now -= 1
        self.served.append(name)
        start, end = (int(part) for part in request.headers["Range"][6:].split("-"))
        headers = {"Content-Range": f"bytes {start}-{end}/{len(BLOB)}"}
        return web.Response(status=206, headers=headers, body=BLOB[start : end + 1])


@asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    server = Server()
    async with front("", server.manners) as it:
        server.address = it.address
        yield server


@asynccontextmanager
async def clients(server: Server, folder: Path, *words: tuple[str, str, int]) -> AsyncIterator[list[Process]]:
    """A process for each (name, kind, how many ranges); each begins with `go`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    found = []
    try:
        for name, kind, count in words:
            arguments = [server.address, str(folder), name, kind, str(count)]
            found.append(
                await asyncio.create_subprocess_exec(
                    sys.executable, "-c", CLIENT, *arguments, stdin=PIPE, stdout=PIPE, env=environment
                )
            )
        for process in found:
            assert process.stdout is not None
            assert await process.stdout.readline() == b"ready\n"
        yield found
    finally:
        for process in found:
            if process.returncode is None:
                process.kill()
            await process.communicate()


def go(process: Process) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")


async def done(process: Process) -> bool:
    assert process.stdout is not None
    return (await process.stdout.read()) == b"done\n" and await process.wait() == 0


async def until(server: Server, requests: int) -> None:
    while len(server.began) < requests:
        await asyncio.sleep(0.01)


async def test_three_processes_share_one_budget(tmp_path: Path) -> None:
    """The server never sees more requests at a time than the budget, sees that many, and every process is served."""
    async with serving() as server, clients(server, tmp_path, *((name, "miss", 60) for name in "abc")) as processes:
        for process in processes:
            go(process)
        assert all([await done(process) for process in processes])
    assert server.peak == TOTAL
    assert sorted(server.served) == sorted("abc" * 60)
    half = server.served[: len(server.served) // 2]
    assert all(half.count(name) >= 10 for name in "abc")  # nobody had to wait for the others' end


async def test_bulk_does_not_starve_a_miss(tmp_path: Path) -> None:
    """Two processes full of requests for bytes that nobody reads leave a slot for the miss of a third."""
    words = [("bulk", "fill", 40), ("bulk", "fill", 40), ("c", "miss", 5)]
    async with serving() as server, clients(server, tmp_path, *words) as processes:
        go(processes[0])
        go(processes[1])
        await until(server, TOTAL - 1)
        go(processes[2])
        assert await done(processes[2])
        assert server.served == ["c"] * 5  # and all others are still there
        assert server.now == TOTAL - 1
        server.closed.set()
        assert all([await done(process) for process in processes[:2]])
    assert server.peak == TOTAL


async def test_a_killed_process_holds_no_slot(tmp_path: Path) -> None:
    """When a process is killed with all slots in its hands, the others have them at once."""
    async with serving() as server, clients(server, tmp_path, ("bulk", "miss", 10), ("b", "miss", 20)) as processes:
        go(processes[0])
        await until(server, TOTAL)
        processes[0].kill()
        await processes[0].wait()
        go(processes[1])
        assert await done(processes[1])
    assert server.served == ["b"] * 20


async def test_a_pause_holds_for_all_processes(tmp_path: Path) -> None:
    """A Retry-After that one process meets is kept by all of them."""
    async with serving() as server, clients(server, tmp_path, ("a", "miss", 1), ("b", "miss", 9)) as processes:
        server.refuse = 1
        go(processes[0])
        await until(server, 1)
        await asyncio.sleep(0.2)  # the 429 is there
        go(processes[1])
        assert all([await done(process) for process in processes])
    times = [at for at, _ in server.began]
    assert len(times) == 11
    assert min(times[1:]) - times[0] >= 2.0


async def test_waiting_for_a_slot_ends_with_the_deadline(tmp_path: Path) -> None:
    """A range that gets no slot within its deadline fails then, and asks nothing of the registry."""
    async with serving() as server:
        settings = RegistrySettings(connections_per_host=TOTAL, use_environment_proxies=False)
        async with Registry(settings=settings, credentials=NoCredentials(), budget=tmp_path) as client:
            host, port = server.address.split(":")
            other = SlotBook(Budget(TOTAL), tmp_path, pause_max=60).of(Origin("http", host, int(port)))
            taken = [other.take(urgent=True) for _ in range(TOTAL)]
            repository = client.repository(f"{server.address}/c")
            with pytest.raises(DeadlineExceeded):
                await repository.blob_range(DIGEST, 0, 10, deadline=0.2)
            assert server.began == []
            other.give(taken[0] or 0)
            assert await repository.blob_range(DIGEST, 0, 10, deadline=20) == BLOB[:10]
            other.close()


async def test_fetchers_share_one_budget(make_stack: Callable[..., Stack]) -> None:
    """However many fetchers a node has, a registry sees no more requests at a time than the setting allows, and all
    that was asked for comes."""
    stack = make_stack(
        registries=1,
        fetchers=3,
        services=("fetcher",),
        containerd=False,
        settings=f"[sociable]\nregistry_concurrency = {TOTAL}\n",
    )
    server = Server()

    async def counted(request: web.Request) -> None:
        server.now += 1
        server.peak = max(server.peak, server.now)
        await asyncio.sleep(0.03)
        server.now -= 1

    names = [f"team/n{number}" for number in range(20)]
    layers = [f"layer {name}".encode() for name in names]
    images = []
    async with Registry(settings=RegistrySettings(), credentials=NoCredentials()) as client:
        for name, layer in zip(names, layers, strict=True):
            repository = client.repository(f"{stack.registries[0]}/{name}")
            config = json.dumps({"rootfs": {"type": "layers", "diff_ids": ["sha256:" + "1" * 64]}}).encode()
            about = [
                Descriptor(kind, sha256_digest(one), len(one))
                for kind, one in ((OCI_CONFIG, config), (OCI_LAYER_GZIP, layer))
            ]
            await repository.push_blob(config)
            await repository.push_blob(layer)
            content = encode_manifest(Manifest(OCI_MANIFEST, about[0], (about[1],)))
            images.append((await repository.push_manifest(content, OCI_MANIFEST)).digest)
    async with (
        front(stack.registries[0], counted) as it,
        connect(stack.nats_url, node=stack.node, name="test") as bus,
    ):
        where = [f"{it.address}/{name}:1" for name in names]
        asks = [
            bus.ask(ReadImageConfig(image, digest), timeout=30) for image, digest in zip(where, images, strict=True)
        ]
        whole = [
            bus.ask(FetchLayer(image, sha256_digest(layer), len(layer)), timeout=30)
            for image, layer in zip(where, layers, strict=True)
        ]
        configs, fetched = await asyncio.gather(asyncio.gather(*asks), asyncio.gather(*whole))
    assert [one.layers for one in configs] == [(sha256_digest(layer),) for layer in layers]
    assert [Path(one.path).read_bytes() for one in fetched] == layers
    assert server.peak == TOTAL
    assert len(list(stack.root.glob("cache/registries/*/*"))) == 1
