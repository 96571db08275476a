# SPDX-License-Identifier: Apache-2.0
"""The mounter as a service: one FUSE mount, and five asks of the bus about what it shows."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from soci.errors import FailedPrecondition, Unavailable
from soci.launch import TraceParent
from soci_bus import events
from soci_bus.asks import (
    AttachLaunch,
    CheckMounts,
    Done,
    FetchSpans,
    LayerMounted,
    LayersShown,
    MountLayer,
    MountsShown,
    PrepareLayer,
    ShownLayers,
    UnmountLayer,
)
from soci_bus.face import Bus, Context
from soci_bus.nats import connect
from soci_cache import LayerStore
from soci_mounter.filesystem import FileSystem
from soci_mounter.fuse import Connection
from soci_mounter.mounts import Mounts, News, Place, Showed
from soci_mounter.native import Native, abandon, choose, look_at
from soci_mounter.reader import Miss, Seams
from soci_mounter.records import Records
from soci_mounter.said import failed_read
from soci_runtime.config import Config
from soci_runtime.flights import in_thread
from soci_runtime.logs import log
from soci_runtime.serve import Process, trouble
from soci_runtime.tracing import step

NAME = "soci-mounter"
SWITCH_INTERVAL = 0.0005
"""Seconds after which a thread that reads a table of contents gives way to the loop that answers reads; Python's
default of 5 ms would be added to every read of that time."""


class Mounter:
    """What the bus may ask, joined to the registry of mounts."""

    def __init__(self, config: Config, bus: Bus) -> None:
        self._config = config
        self._bus = bus
        self.filesystem = FileSystem(config.cache)
        state = config.root / "mounter"
        way, why = choose(look_at(config.mount_mode, state))
        log.info("how layers are shown", way=way, why=why)
        self.native = Native(state, config.mounts, self._report) if way == "erofs" else None
        if self.native is None:
            abandon(state, config.mounts)
        fuse = state / "fuse" if self.native else config.mounts
        self.connection = Connection(self.filesystem, fuse, state, self._report)
        place = Place(
            config.mounts,
            LayerStore(config.cache),
            Records(state),
            verify_headers=not config.disable_verification,
            fuse=fuse if self.native else None,
            native=self.native,
            why=why,
        )
        self.mounts = Mounts(
            self.filesystem,
            place,
            self._ask_spans,
            Seams(config.read_deadline, self._missed, trouble),
            News(self._shown, self.connection.hidden),
        )

    async def listen(self) -> None:
        """Answer asks from now on."""
        await self._bus.serve(MountLayer, self._mount)
        await self._bus.serve(UnmountLayer, self._unmount)
        await self._bus.serve(CheckMounts, self._check)
        await self._bus.serve(AttachLaunch, self._attach)
        await self._bus.serve(ShownLayers, self._list)

    async def _mount(self, ask: MountLayer, context: Context) -> LayerMounted:
        if not self.connection.alive:
            raise Unavailable("the FUSE mount is not there")
        with step("mount", context.trace, mount=ask.mount, layer=ask.layer):
            return await self.mounts.mount(ask, context.trace)

    async def _unmount(self, ask: UnmountLayer, _context: Context) -> Done:
        await self.mounts.unmount(ask.mount)
        return Done()

    async def _check(self, ask: CheckMounts, _context: Context) -> MountsShown:
        return MountsShown(self.mounts.check(ask.mounts) if self.connection.alive else ())

    async def _list(self, ask: ShownLayers, _context: Context) -> LayersShown:
        return await self.mounts.shown(ask.after)

    async def _attach(self, ask: AttachLaunch, context: Context) -> Done:
        self.mounts.attach(ask.mounts, ask.launch, context.trace)
        return Done()

    async def _ask_spans(self, ask: FetchSpans | PrepareLayer, seconds: float, trace: TraceParent | None) -> None:
        if isinstance(ask, PrepareLayer):
            await self._bus.ask(ask, timeout=seconds, trace=trace)
            return
        with step(ask.why, trace, layer=ask.layer, first=ask.first, last=ask.last) as place:
            await self._bus.ask(ask, timeout=seconds, trace=place)

    def _missed(self, miss: Miss) -> None:
        reader = self.mounts.reader(miss.mount) if miss.failed else None
        if reader and miss.failed:
            self.mounts.failed(miss.mount, miss.failed)
            log.error("FUSE read failed", **failed_read(miss, reader.spans, reader.present))
        self._bus.publish(
            events.Missed(
                id=miss.trace.launch if miss.trace else events.NO_LAUNCH,
                mount=miss.mount,
                layer=miss.layer,
                path=miss.path.decode(errors="replace"),
                first=miss.first,
                last=miss.last,
                seconds=miss.seconds,
                failed=str(miss.failed) if miss.failed else "",
            )
        )

    def _shown(self, ask: MountLayer, showed: Showed, seconds: float, trace: TraceParent | None) -> None:
        self._bus.publish(
            events.LayerShown(
                id=trace.launch if trace else events.NO_LAUNCH,
                mount=ask.mount,
                layer=ask.layer,
                entries=len(showed.tree),
                spans=showed.reader.spans.count,
                present=showed.reader.present_count(),
                seconds=seconds,
                way=showed.way,
                why=showed.why,
            )
        )
        facts = {"mount": ask.mount, "layer": ask.layer, "image": ask.image, "way": showed.way}
        log.info("layer shown", **facts, seconds=round(seconds, 3))

    @staticmethod
    def _report(operation: str, error: BaseException) -> None:
        log.error("FUSE operation failed", operation=operation, error=error)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock for the life of the process; `FailedPrecondition` where another mounter has it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FailedPrecondition(f"another mounter serves {folder.parent}") from error
        yield
    finally:
        os.close(descriptor)


async def run(config: Config, process: Process) -> None:
    """The service: show what was shown, serve until told to stop, detach the mount.

    Whatever the signal: the kernel aborts a connection whose server ends and that nobody holds, so a FUSE mount that
    stays is a dead one; mounts by EROFS stay. The records do too, and the successor shows the same layers at the same
    paths.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    with alone(config.root / "mounter"):
        async with connect(config.nats_url, node=config.node, name=NAME, trouble=trouble) as bus:
            await serve(config, process, bus)


async def serve(config: Config, process: Process, bus: Bus) -> None:
    """Serve on this bus until ``process`` is told to stop."""
    config.cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    mounter = await in_thread(Mounter, config, bus)
    native = mounter.native
    async with asyncio.TaskGroup() as tasks:
        serving: list[asyncio.Task[None]] = []
        graduating: asyncio.Task[None] | None = None
        try:
            if native:
                await in_thread(native.open)
                serving.append(tasks.create_task(native.serve()))
            await mounter.mounts.restore()
            if native:
                graduating = tasks.create_task(mounter.mounts.look_after())
            raised = mounter.connection.mount()
            if not all(raised.values()):
                log.info("the kernel's limits of this FUSE mount could not all be raised", **raised)
            serving.append(tasks.create_task(mounter.connection.serve()))
            await mounter.listen()
            process.ready(mounts=str(config.mounts))
            stopping = tasks.create_task(process.stopping.wait())
            await asyncio.wait([*serving, stopping], return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
        finally:
            mounter.connection.stop()
            if native:
                native.stop()
            if graduating:
                graduating.cancel()
                await asyncio.wait([graduating])
            await mounter.mounts.close()
