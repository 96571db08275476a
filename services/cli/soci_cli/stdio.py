# SPDX-License-Identifier: Apache-2.0
"""A container's output: fifos that its shim writes to, pumped to our own stdout and stderr."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

PUMP_BYTES: Final = 1 << 16
"""Bytes moved at a time; as many again may wait in each fifo and reader."""
SILENCE_SECONDS: Final = 5.0
"""How long after the container's end we wait for a fifo that stays silent and open: a child may have kept it."""


@dataclass(frozen=True, slots=True)
class Output:
    """The fifos' paths, and the tasks that empty them."""

    stdout: str
    stderr: str
    ended: asyncio.Event
    pumps: tuple[asyncio.Task[None], ...]

    async def drained(self) -> None:
        """Call at the container's end: returns when all it wrote has been written on, however slowly that is read."""
        self.ended.set()
        await asyncio.wait(self.pumps)

    def give_up(self) -> None:
        """Drop what has not been written on."""
        for pump in self.pumps:
            pump.cancel()


@asynccontextmanager
async def forwarded_output() -> AsyncIterator[Output]:
    """Two fifos whose content goes to our stdout and stderr until the block ends."""
    folder = Path(tempfile.mkdtemp(prefix="soci-run-"))
    try:
        paths = (folder / "stdout", folder / "stderr")
        for path in paths:
            os.mkfifo(path, 0o600)
        ended = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            # Opened before the shim opens its end: without blocking, and at no end of file before a writer came.
            readers = [await _open(path) for path in paths]
            pumps = tuple(
                group.create_task(_pump(reader, to, ended)) for (reader, _), to in zip(readers, (1, 2), strict=True)
            )
            output = Output(str(paths[0]), str(paths[1]), ended, pumps)
            try:
                yield output
            finally:
                output.give_up()
                for _, transport in readers:
                    transport.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _open(path: Path) -> tuple[asyncio.StreamReader, asyncio.ReadTransport]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=PUMP_BYTES)
    pipe = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    return reader, transport


async def _pump(reader: asyncio.StreamReader, to: int, ended: asyncio.Event) -> None:
    """Copy until the end. Writes happen in a thread: a slow reader of ours slows the container, not our signals."""
    wanted = True
    ending = asyncio.ensure_future(ended.wait())
    try:
        while chunk := await _read(reader, ending):
            if wanted:
                wanted = await asyncio.to_thread(_write_all, to, chunk)
    finally:
        ending.cancel()


async def _read(reader: asyncio.StreamReader, ending: asyncio.Future[Any]) -> bytes:
    """The next bytes; none at the end of file, and none of a fifo that is silent after the container's end."""
    coming: asyncio.Future[Any] = asyncio.ensure_future(reader.read(PUMP_BYTES))
    try:
        await asyncio.wait([coming, ending], return_when=asyncio.FIRST_COMPLETED)
        if not coming.done():
            await asyncio.wait([coming], timeout=SILENCE_SECONDS)
        return bytes(coming.result()) if coming.done() else b""
    finally:
        coming.cancel()


def _write_all(to: int, chunk: bytes) -> bool:
    """False where nobody reads ``to`` any more; the container's output is then thrown away."""
    view = memoryview(chunk)
    try:
        while view:
            view = view[os.write(to, view) :]
    except BrokenPipeError:
        return False
    return True
