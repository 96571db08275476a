# SPDX-License-Identifier: Apache-2.0
"""Measure the ways to bring a range over HTTP, all against one local server, in turns within one process.

The server is a process of its own that answers ranges with sendfile(2), so that the clients are what is measured. Each
figure is the median of several rounds in a drawn order; wall time and the CPU time of this process are given as ratios
to those of aiohttp's wire in the same round. See bench/README.md.
"""

from __future__ import annotations

import asyncio
import importlib
import io
import os
import random
import re
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import click
import uvloop

from soci_registry.ranges import skip_for
from soci_registry.room import Room
from soci_registry.settings import RegistrySettings
from soci_registry.urls import Access, origin_of
from soci_registry.wire import Request, Wire, heads_of, read_into, tls_context
from soci_registry.wire_aiohttp import AiohttpWire
from soci_registry.wire_httpx import HttpxWire
from soci_registry.wire_raw import RawWire

BLOB_BYTES = 64 << 20
SIZES = {"64 KiB": 64 << 10, "4 MiB": 4 << 20, "16 MiB": 16 << 20}
ROUND_BYTES = 128 << 20
REQUESTS_MAX = 400
"""A round brings so many bytes, or makes so many requests."""

Arm = Callable[[list[int], int], Awaitable[None]]
"""Brings the ranges of one size that begin at these bytes, as many at a time as its lanes."""


# --- the server


def serve(path: str) -> None:
    """Answer ranges of the file at ``path`` until killed; the port is the first line of the output."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_answer, args=(connection, path), daemon=True).start()


def _answer(connection: socket.socket, path: str) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    waiting = b""
    with connection, Path(path).open("rb") as file, suppress(OSError):
        while True:
            while b"\r\n\r\n" not in waiting:
                got = connection.recv(65536)
                if not got:
                    return
                waiting += got
            head, _, waiting = waiting.partition(b"\r\n\r\n")
            found = re.search(rb"(?i)\r\nrange: bytes=([0-9]+)-([0-9]+)", head)
            if not found:
                return
            start, end = int(found[1]), int(found[2]) + 1
            lines = (
                "HTTP/1.1 206 Partial Content",
                f"Content-Length: {end - start}",
                f"Content-Range: bytes {start}-{end - 1}/{BLOB_BYTES}",
                "Content-Type: application/octet-stream",
                "Docker-Distribution-Api-Version: registry/2.0",
                "",
                "",
            )
            connection.send("\r\n".join(lines).encode(), socket.MSG_MORE)
            while start < end:
                start += os.sendfile(connection.fileno(), file.fileno(), start, end - start)


# --- the arms


async def _lanes(starts: list[int], lanes: int, one: Callable[[int], Awaitable[None]]) -> None:
    todo = iter(starts)

    async def lane() -> None:
        for start in todo:
            await one(start)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(lanes):
            tasks.create_task(lane())


def of_wire(wire: Wire, url: str, size: int) -> Arm:
    """One of our wires, as `soci_registry.fetch` uses it."""
    access = Access("bench", origin_of(url), "")

    async def one(start: int) -> None:
        headers = {"Range": f"bytes={start}-{start + size - 1}"}
        request = Request("GET", url, access, headers, expect=frozenset({206}), bulk=True)
        with Room(size) as room:
            async with wire.send(request, url, None) as answer:
                skip = skip_for(heads_of(answer), start, start + size, 0)
                await read_into(room, answer, skip)
            _check(room.content(), start)

    return lambda starts, lanes: _lanes(starts, lanes, one)


def of_threads(pool: ThreadPoolExecutor, make: Callable[[], Callable[[int], Any]]) -> Arm:
    """A blocking client in as many threads as there are lanes; ``make`` is called in each."""

    def lane(todo: list[int]) -> None:
        one = make()
        for start in todo:
            _check(one(start), start)

    async def run(starts: list[int], lanes: int) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(pool, lane, starts[number::lanes]) for number in range(lanes)))

    return run


def by_socket(port: int, size: int) -> Callable[[int], Any]:
    """The floor: a blocking socket and recv_into, and no more understanding of HTTP than finding the empty line."""
    connection = socket.create_connection(("127.0.0.1", port))
    head = bytearray(4096)

    def one(start: int) -> bytes:
        asked = f"GET /blob HTTP/1.1\r\nHost: x\r\nRange: bytes={start}-{start + size - 1}\r\n\r\n"
        connection.sendall(asked.encode())
        file = io.BytesIO(bytes(size))
        view = file.getbuffer()
        filled = 0
        while (end := head.find(b"\r\n\r\n", 0, filled)) < 0:
            filled += connection.recv_into(memoryview(head)[filled:])
        at = filled - end - 4
        view[:at] = head[end + 4 : filled]
        while at < size:
            at += connection.recv_into(view[at:])
        view.release()
        return file.getvalue()

    return one


def by_pycurl(url: str, size: int) -> Callable[[int], Any]:
    """libcurl, each range into a buffer."""
    pycurl = importlib.import_module("pycurl")  # measured where it is there

    handle = pycurl.Curl()
    handle.setopt(pycurl.URL, url)
    handle.setopt(pycurl.BUFFERSIZE, 512 << 10)

    def one(start: int) -> bytes:
        buffer = io.BytesIO()
        handle.setopt(pycurl.RANGE, f"{start}-{start + size - 1}")
        handle.setopt(pycurl.WRITEDATA, buffer)
        handle.perform()
        return buffer.getvalue()

    return one


def _check(content: Any, start: int) -> None:
    if content[:8] != start.to_bytes(8, "big"):
        raise RuntimeError("wrong bytes")


# --- the measurement


async def measure(arm: Arm, starts: list[int], lanes: int) -> tuple[float, float]:
    """Seconds, and CPU seconds of this process."""
    begun, before = time.perf_counter(), _cpu()
    await arm(starts, lanes)
    return time.perf_counter() - begun, _cpu() - before


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def compare(port: int, rounds: int, names: tuple[str, ...]) -> None:
    """Print a line for each size, number of lanes and arm."""
    settings = RegistrySettings(use_environment_proxies=False)
    tls = tls_context(settings)
    url = f"http://127.0.0.1:{port}/blob"
    rng = random.Random(7)
    async with AsyncExitStack() as stack:
        wires: dict[str, Wire] = {
            "aiohttp": await stack.enter_async_context(AiohttpWire(settings, tls)),
            "raw": await stack.enter_async_context(RawWire(settings, tls)),
            "httpx": await stack.enter_async_context(HttpxWire(settings, tls)),
        }
        pool = stack.enter_context(ThreadPoolExecutor(8))
        for lanes in (1, 8):
            for label, size in SIZES.items():
                arms = {name: of_wire(wire, url, size) for name, wire in wires.items()}
                arms["socket"] = of_threads(pool, partial(by_socket, port, size))
                arms["pycurl"] = of_threads(pool, partial(by_pycurl, url, size))
                chosen = {name: arms[name] for name in names}
                count = max(lanes, min(REQUESTS_MAX, ROUND_BYTES // size))
                starts = [rng.randrange(BLOB_BYTES // size) * size for _ in range(count)]
                for arm in chosen.values():
                    await measure(arm, starts[: 2 * lanes], lanes)
                found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
                for _ in range(rounds):
                    for name in rng.sample(names, len(names)):
                        found[name].append(await measure(chosen[name], starts, lanes))
                for name in names:
                    _say(f"{label:>7} x {lanes}", name, found, size * count, count)


def _say(what: str, name: str, found: dict[str, list[tuple[float, float]]], size: int, count: int) -> None:
    wall, cpu = (
        statistics.median(ours[at] / theirs[at] for ours, theirs in zip(found[name], found["aiohttp"], strict=True))
        for at in (0, 1)
    )
    seconds = statistics.median(one[0] for one in found[name])
    click.echo(
        f"{what}  {name:8} {wall:5.2f} x aiohttp's time, {cpu:5.2f} x its CPU"
        f"   ({size / seconds / 1e6:6.0f} MB/s, {seconds / count * 1e3:6.2f} ms a range)"
    )


@click.command()
@click.option("--rounds", default=9, show_default=True, help="Rounds of a figure.")
@click.option("--serve", "path", hidden=True, type=click.Path())
def main(*, rounds: int, path: str | None) -> None:
    """Bring ranges from a local server by each client."""
    if path is not None:
        serve(path)
        return
    names = ["aiohttp", "raw", "httpx", "socket"]
    with suppress(ImportError):
        importlib.import_module("pycurl")
        names.append("pycurl")
    with tempfile.TemporaryDirectory(prefix="soci-bench-") as folder:
        blob = Path(folder) / "blob"
        step = min(SIZES.values())
        with blob.open("wb") as file:
            for start in range(0, BLOB_BYTES, step):
                file.write(start.to_bytes(8, "big") + os.urandom(step - 8))
        server = subprocess.Popen([sys.executable, __file__, "--serve", str(blob)], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(compare(port, rounds, tuple(names)))
        finally:
            server.kill()
            server.wait()


if __name__ == "__main__":
    main()
