# SPDX-License-Identifier: Apache-2.0
"""The mounter's service in a process of its own, with a bus in memory and a fetcher that reads blobs from a folder.

A FUSE server and its reader in one interpreter would wait for each other. Commands go in as JSON lines on stdin,
answers come out on a pipe of their own, the first of them when the service is ready; the log goes to a file. The
process ends with its stdin, and by SIGALRM in any case, so that no reader hangs for ever on a server that does.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from soci import errors
from soci.digest import hex_of
from soci.inflate import inflate_span
from soci.launch import TraceParent
from soci_bus import asks
from soci_bus.face import Context
from soci_bus.memory import MemoryBus
from soci_cache import LayerStore
from soci_mounter import device, holder, mounts, service, table
from soci_mounter.filesystem import FileSystem
from soci_runtime.config import Config
from soci_runtime.logs import configure_logs
from soci_runtime.serve import Process

LIFE = 50  # seconds
ASKS: dict[str, type[asks.Ask[Any]]] = {
    "mount": asks.MountLayer,
    "unmount": asks.UnmountLayer,
    "check": asks.CheckMounts,
    "attach": asks.AttachLaunch,
    "list": asks.ShownLayers,
}


class Fetcher:
    """Fills spans from ``<blobs>/<hex>``; told to fail, it fails."""

    def __init__(self, store: LayerStore, blobs: Path) -> None:
        self.store = store
        self.blobs = blobs
        self.fails: str = ""
        self.fetched: list[tuple[int, int, str, str]] = []
        self.traces: list[str] = []

    async def fetch(self, ask: asks.FetchSpans, context: Context) -> asks.SpansFetched:
        self.fetched.append((ask.first, ask.last, ask.why, ask.image))
        self.traces.append(context.trace.launch if context.trace else "")
        if self.fails == "hang":
            await asyncio.sleep(context.timeout * 2)
        if self.fails:
            raise errors.from_code(self.fails, "told to fail")
        blob = (self.blobs / hex_of(ask.layer)).read_bytes()
        with self.store.write(ask.layer, ask.ztoc) as writer:
            last = min(ask.last + ask.ahead, writer.spans.count - 1)
            # Some of what comes along may be here: it is not fetched.
            along = writer.missing(range(ask.last + 1, last + 1))
            self.fetched += [(span, span, "read-ahead", ask.image) for span in along]
            for span in writer.missing(range(ask.first, last + 1)):
                start, end = writer.spans.compressed(span)
                writer.fill(span, inflate_span(writer.ztoc, writer.spans, span, blob[start:end]))
        return asks.SpansFetched(1, 1)


TABLES: list[table.Table] = []
READS: list[str] = []
"""The mounts whose devices were read, read by read."""


def count_reads() -> None:
    read = device.Device.read

    async def counted(self: device.Device, offset: int, length: int) -> bytes:
        READS.append(self.mount)
        return await read(self, offset, length)

    device.Device.read = counted  # type: ignore[method-assign]


def note_tables(keep: float) -> None:
    module: Any = table
    make = table.Table
    module.KEEP_SECONDS = keep

    def made(*values: Any, **more: Any) -> table.Table:
        TABLES.append(make(*values, **more))
        return TABLES[-1]

    module.Table = made


def break_operation(name: str) -> None:
    def broken(*_args: object) -> None:
        raise ZeroDivisionError(name)

    setattr(FileSystem, name, broken)


async def command(line: dict[str, Any], bus: MemoryBus, fetcher: Fetcher) -> Any:
    verb, values = line["verb"], line.get("values", {})
    if verb in ASKS:
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        trace = TraceParent(values["launch"], "1" * 16) if verb == "attach" else None
        answer: Any = await bus.ask(ASKS[verb](**values), timeout=20, trace=trace)
        if verb == "list":
            return [asdict(one) for one in answer.layers]
        return answer.path if verb == "mount" else getattr(answer, "alive", None)
    if verb == "fail":
        fetcher.fails = values["how"]
    elif verb == "break":
        break_operation(values["operation"])
    elif verb == "forgotten":
        return [one._held is None for one in TABLES]
    elif verb == "reads":
        return READS
    elif verb == "fetched":
        return [fetcher.fetched, fetcher.traces]
    elif verb == "events":
        return [[type(kept.event).__name__, kept.event.id, getattr(kept.event, "failed", None)] for kept in bus.events]
    return None


class Answering(Process):
    """The process as its service sees it, which tells the test that it is ready."""

    def __init__(self, pipe: int) -> None:
        super().__init__()
        self.pipe = os.fdopen(pipe, "w")

    def ready(self, **facts: Any) -> None:
        super().ready(**facts)
        self.answer({"answer": "ready"})

    def answer(self, answer: dict[str, Any]) -> None:
        self.pipe.write(json.dumps(answer) + "\n")
        self.pipe.flush()


async def commands(bus: MemoryBus, fetcher: Fetcher, process: Answering) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while text := await reader.readline():
        try:
            answer: dict[str, Any] = {"answer": await command(json.loads(text), bus, fetcher)}
        except errors.SociError as error:
            answer = {"error": error.code, "text": str(error)}
        process.answer(answer)
    process.stop(signal.SIGTERM)


async def serve(root: Path, blobs: Path, deadline: float, *, verify: bool, mode: str, pipe: int, keep: float) -> None:
    configure_logs("info", "mounter")
    count_reads()
    note_tables(keep)
    mounts.LOOK_SECONDS = 0.05
    bus, process = MemoryBus(), Answering(pipe)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, process.stop, signal.SIGTERM)
    config = Config(root=root, read_deadline=deadline, disable_verification=not verify, mount_mode=mode)
    fetcher = Fetcher(LayerStore(config.cache), blobs)
    await bus.serve(asks.FetchSpans, fetcher.fetch)
    with service.alone(root / "mounter"):
        async with asyncio.TaskGroup() as tasks:
            talking = tasks.create_task(commands(bus, fetcher, process))
            await service.serve(config, process, bus)
            talking.cancel()


class Server:
    """The process, seen from the test."""

    def __init__(
        self,
        root: Path,
        blobs: Path,
        *,
        deadline: float = 10.0,
        verify: bool = True,
        mode: str = "fuse",
        keep: float = 20.0,
    ) -> None:
        self.log = root.parent / "server.log"
        answers, theirs = os.pipe()
        settings = [str(deadline), str(int(verify)), mode, str(theirs), str(keep)]
        path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "support.mounter_process", root, blobs, *settings],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                env=os.environ | {"PYTHONPATH": path},
                pass_fds=[theirs],
            )
        os.close(theirs)
        self.answers = os.fdopen(answers)
        self._answer()

    def ask(self, verb: str, **values: object) -> Any:
        """The answer of a command; an error comes as `SociError` of its class."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"verb": verb, "values": values}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self.answers.readline()
        if not line:
            status = self.process.wait(20)
            self.end()
            raise AssertionError(f"the server ended with {status}; see {self.log}")
        answer = json.loads(line)
        if "error" in answer:
            raise errors.from_code(answer["error"], answer["text"])
        return answer["answer"]

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, wait, and give the exit status; a server that has ended only has its pipes closed."""
        self.process.send_signal(number)
        try:
            return self.process.wait(20)
        finally:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.answers.close()


class Holder:
    """``soci-holder`` on a root folder, ready when this returns."""

    def __init__(self, root: Path) -> None:
        self.log = root.parent / "holder.log"
        self.path = root / "mounter" / holder.SOCKET
        with self.log.open("a") as log:
            command = [sys.executable, "-m", "soci_mounter.holder", "--root", str(root)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        for _ in range(1000):
            with suppress(errors.Unavailable):
                holder.get(self.path, "nothing")
                return
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.01)
        raise AssertionError(f"no holder; see {self.log}")

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, wait, and give the exit status."""
        self.process.send_signal(number)
        return self.process.wait(20)


if __name__ == "__main__":
    signal.alarm(LIFE)
    import uvloop

    uvloop.run(
        serve(
            Path(sys.argv[1]),
            Path(sys.argv[2]),
            float(sys.argv[3]),
            verify=sys.argv[4] == "1",
            mode=sys.argv[5],
            pipe=int(sys.argv[6]),
            keep=float(sys.argv[7]),
        )
    )
