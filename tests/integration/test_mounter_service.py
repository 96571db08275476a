# SPDX-License-Identifier: Apache-2.0
"""The mounter as the process that is shipped, asked over NATS."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from asyncio import sleep, timeout, to_thread
from collections.abc import Iterator
from pathlib import Path

import pytest

from soci.errors import BusUnavailable
from soci_bus import asks
from soci_bus.events import LayerShown
from soci_bus.face import Bus, Context
from soci_bus.nats import connect
from soci_mounter import kernel
from support.mounter_layers import item, make, noise

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root and /dev/fuse"),
]

NODE = "mounter-test"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    program = Path(sys.executable).with_name("nats-server")
    port = free_port()
    with (tmp_path / "nats.log").open("w") as log:
        server = subprocess.Popen(
            [program, "-js", "-a", "127.0.0.1", "-p", str(port), "-sd", tmp_path / "nats"], stdout=log, stderr=log
        )
    yield f"nats://127.0.0.1:{port}", server
    server.kill()
    server.wait(20)


@pytest.fixture
def mounter(tmp_path: Path, nats: tuple[str, object]) -> Iterator[subprocess.Popen[bytes]]:
    root = tmp_path / "root"
    with (tmp_path / "mounter.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "soci_mounter", "--root", root, "--nats-url", nats[0], "--node", NODE],
            stdout=log,
            stderr=log,
        )
    yield process
    if process.poll() is None:
        process.kill()
    process.wait(20)
    kernel.clear(root / "mounts")


async def mount(bus: Bus, ask: asks.MountLayer) -> Path:
    """Ask until the service serves."""
    async with timeout(30):
        while True:
            try:
                return Path((await bus.ask(ask, timeout=10)).path)
            except BusUnavailable:
                await sleep(0.05)


async def test_the_service_mounts_reads_and_ends(
    tmp_path: Path, nats: tuple[str, subprocess.Popen[bytes]], mounter: subprocess.Popen[bytes]
) -> None:
    """Over NATS: mount, read through a fetcher, go on with NATS away, and end with status 0 and no mount left."""
    made = make([item("file", b"content"), item("other", noise(400_000))])
    cache = tmp_path / "root/cache"
    made.put(cache)

    async def fetch(ask: asks.FetchSpans, _context: Context) -> asks.SpansFetched:
        await to_thread(made.fill, cache, range(ask.first, ask.last + 1))
        return asks.SpansFetched(1, 1)

    async with connect(nats[0], node=NODE, name="test", wait=20) as bus:
        await bus.serve(asks.FetchSpans, fetch, queue="fetchers")
        path = await mount(bus, asks.MountLayer("m1", "registry/image", made.layer, made.ztoc_digest))
        assert await to_thread((path / "file").read_bytes) == b"content"
        assert (await bus.ask(asks.CheckMounts(("m1", "m2")), timeout=10)).alive == ("m1",)
        words = [sys.executable, "-m", "soci_cli", "--nats-url", nats[0], "--node", NODE, "layers", "ls", "--json"]
        listed = json.loads((await to_thread(subprocess.run, words, check=True, capture_output=True)).stdout)
        assert [(one["mount"], one["way"], one["image"]) for one in listed] == [("m1", "fuse", "registry/image")]
        shown = [kept.event async for kept in bus.history("mount")]
        assert [event.mount for event in shown if isinstance(event, LayerShown)] == ["m1"]
    nats[1].kill()
    assert await to_thread((path / "file").read_bytes) == b"content"
    assert sorted(await to_thread(os.listdir, path)) == ["file", "other"]
    mounter.send_signal(signal.SIGTERM)
    assert await to_thread(mounter.wait, 20) == 0, (tmp_path / "mounter.log").read_text()
    assert kernel.mounted_at(path.parent) == []
