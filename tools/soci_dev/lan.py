# SPDX-License-Identifier: Apache-2.0
"""Machines that are none: network namespaces on one bridge, each with an address of its own. Needs root.

Names begin with ``soci-<pid>-``, so that what a crashed owner left behind is known and cleared away by the next one.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from soci.errors import DeadlineExceeded, Unavailable

PREFIX: Final = "soci-"
OURS: Final = 1
"""Our own host number on the network."""
START_LIMIT_S: Final = 10.0
_IP_LIMIT_S: Final = 20.0


def run_ip(*words: str) -> str:
    """Run the program; what it prints. Raises `Unavailable` with its complaint."""
    done = subprocess.run(["ip", *words], check=False, capture_output=True, text=True, timeout=_IP_LIMIT_S)
    if done.returncode:
        raise Unavailable(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def sweep() -> None:
    """Clear away the namespaces of owners that are gone, and what runs in them."""
    for one in json.loads(run_ip("-json", "netns", "list") or "[]"):
        owner = one["name"].removeprefix(PREFIX).partition("-")[0]
        if one["name"].startswith(PREFIX) and owner.isdecimal() and not Path(f"/proc/{owner}").exists():
            _remove(one["name"])


def _remove(name: str) -> None:
    for pid in run_ip("netns", "pids", name).split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    run_ip("netns", "delete", name)


class Lan:
    """A bridge, hosts on it, and us at `OURS`; a context manager."""

    def __init__(self) -> None:
        number = os.getpid() % (50 * 250)
        self._net = f"10.{200 + number // 250}.{number % 250}"
        self._mark = f"{PREFIX}{os.getpid()}-"
        self._hub = f"{self._mark}lan"
        self._link = f"soci{os.getpid()}"
        self._hosts: list[str] = []
        self._relays: list[Relay] = []

    def address(self, number: int) -> str:
        """The address of host ``number``, 1 to 254."""
        return f"{self._net}.{number}"

    def __enter__(self) -> Self:
        sweep()
        try:
            run_ip("netns", "add", self._hub)
            run_ip("-n", self._hub, "link", "add", "lan", "type", "bridge")
            run_ip("-n", self._hub, "link", "set", "lan", "up")
            run_ip("link", "add", self._link, "type", "veth", "peer", "name", "ours", "netns", self._hub)
            run_ip("-n", self._hub, "link", "set", "ours", "master", "lan", "up")
            run_ip("address", "add", f"{self.address(OURS)}/24", "dev", self._link)
            run_ip("link", "set", self._link, "up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Take all away, and end what still runs there."""
        for relay in self._relays:
            relay.close()
        for name in [*self._hosts, self._hub]:
            with suppress(Unavailable):
                _remove(name)
        with suppress(Unavailable):
            run_ip("link", "delete", self._link)

    def host(self, number: int) -> list[str]:
        """A new host at `address` (number); the words to put before a command that is to run on it."""
        name = f"{self._mark}{number}"
        run_ip("netns", "add", name)
        self._hosts.append(name)
        run_ip("-n", self._hub, "link", "add", f"h{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
        run_ip("-n", self._hub, "link", "set", f"h{number}", "master", "lan", "up")
        run_ip("-n", name, "address", "add", f"{self.address(number)}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            run_ip("-n", name, "link", "set", link, "up")
        return self.on(number)

    def on(self, number: int) -> list[str]:
        """The words to put before a command that is to run on a host."""
        # Not `ip netns exec`, which makes a mount namespace too: mounts would be seen there alone.
        return ["nsenter", f"--net=/run/netns/{self._mark}{number}", "--"]

    def cut(self, number: int, *, off: bool = True) -> None:
        """Pull a host's cable, or put it in again: what it sends is lost, and nobody is told."""
        run_ip("-n", self._hub, "link", "set", f"h{number}", "down" if off else "up")

    def relay(self, upstream: str) -> str:
        """``host:port`` on the network where what listens at ``upstream`` on this machine's loopback is reached."""
        relay = Relay(self.address(OURS), upstream)
        self._relays.append(relay)
        return relay.address


class Relay:
    """Passes TCP connections on, in a thread of its own."""

    def __init__(self, host: str, upstream: str) -> None:
        self.address = ""
        self._host = host
        self._upstream = upstream.rpartition(":")
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="relay", daemon=True)
        self._thread.start()
        if not self._ready.wait(START_LIMIT_S):
            raise DeadlineExceeded("the relay did not start")

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, self._host, 0)
        self.address = f"{self._host}:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._stop.wait()
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, out = await asyncio.open_connection(self._upstream[0], int(self._upstream[2]))
        except OSError:
            writer.close()
            return
        try:
            with suppress(asyncio.CancelledError):  # the loop's end cuts it off: no news
                async with asyncio.TaskGroup() as group:
                    group.create_task(_pump(reader, out))
                    group.create_task(_pump(there, writer))
        finally:
            writer.close()
            out.close()

    def close(self) -> None:
        """End it."""
        if self._loop and self._stop:
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_LIMIT_S)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while chunk := await reader.read(1 << 18):
            writer.write(chunk)
            await writer.drain()
        writer.write_eof()
