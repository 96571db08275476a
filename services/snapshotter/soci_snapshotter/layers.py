# SPDX-License-Identifier: Apache-2.0
"""How a layer is brought, once `soci_snapshotter.mode` has said which way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from soci.digest import Digest, parse_digest
from soci.errors import DeadlineExceeded, FailedPrecondition, InvalidManifest, NoIndex, NotFound, SociError, Unavailable
from soci.launch import TraceParent
from soci_bus.asks import (
    CheckMounts,
    FetchLayer,
    FindIndex,
    IndexFound,
    MountLayer,
    PrepareLayer,
    ReadImageConfig,
    UnmountLayer,
)
from soci_bus.face import Bus
from soci_runtime.tracing import step
from soci_snapshotter.directories import mark_shown, remake_upper
from soci_snapshotter.labels import ZTOC, ZTOC_SIZE, RemoteLabels, read_remote_labels
from soci_snapshotter.mode import Facts, Lazy, Mode, Whole, choose
from soci_snapshotter.mounts import Places, is_lazy
from soci_snapshotter.state import Snapshot
from soci_snapshotter.unpack import unpack
from soci_snapshotter.usage import disk_usage

Result = TypeVar("Result")

WHOLE_TIMEOUT = 290.0
"""Seconds for the download of a whole layer."""
CHECK_TIMEOUT = 5.0
"""Seconds within which the mounter says which mounts are alive."""
UNMOUNT_TIMEOUT = 10.0


@dataclass(frozen=True, slots=True)
class Brought:
    """How the layer came: the mode that worked; for `Defer` nothing was done."""

    mode: Mode
    size: int = 0  # bytes and inodes that a whole layer takes
    inodes: int = 0


class Layers:
    """Brings layers for snapshots. Holds nothing but its ways out."""

    def __init__(self, bus: Bus, places: Places, *, min_layer_size: int, mount_timeout: float) -> None:
        self._bus = bus
        self._places = places
        self._min_layer_size = min_layer_size
        self._timeout = mount_timeout

    def deadline(self) -> float:
        """When a layer that Prepare was called for now is to be shown, at the latest (loop time)."""
        return asyncio.get_running_loop().time() + self._timeout

    async def find_index(self, labels: RemoteLabels, trace: TraceParent, ends: float) -> IndexFound:
        """The image's SOCI index; every failure is a `NoIndex` with its reason."""
        ask = FindIndex(labels.image, labels.manifest, labels.explicit_index)
        try:
            return await self._bus.ask(ask, timeout=_left(ends), trace=trace)
        except NoIndex:
            raise
        except SociError as error:
            raise NoIndex(f"no index could be looked for: {error}") from error

    async def bring(  # noqa: PLR0913  what is known of the call
        self,
        snapshot: Snapshot,
        parents: Sequence[Snapshot],
        labels: RemoteLabels,
        facts: Facts,
        trace: TraceParent,
        *,
        ends: float,
    ) -> Brought:
        """Try the chosen mode; where it fails, choose again with that failure among the facts.

        A lazy attempt is over at ``ends``. Raises only where the snapshot's directory cannot be had empty again.
        """
        facts = replace(facts, min_layer_size=self._min_layer_size)
        while True:
            mode = choose(facts)
            try:
                match mode:
                    case Lazy():
                        await self._show(snapshot, parents, labels, mode, trace, ends=ends)
                        return Brought(mode)
                    case Whole():
                        return await self._unpack(snapshot, parents, labels, mode, trace)
                    case _:
                        return Brought(mode)
            except SociError as error:
                if isinstance(mode, Lazy):
                    facts = replace(facts, lazy_failed=str(error))
                else:
                    # containerd is to unpack into it now; half a layer below would show through
                    await asyncio.to_thread(remake_upper, self._places.upper(snapshot.id))
                    facts = replace(facts, whole_failed=str(error))

    async def _show(  # noqa: PLR0913
        self,
        snapshot: Snapshot,
        parents: Sequence[Snapshot],
        labels: RemoteLabels,
        mode: Lazy,
        trace: TraceParent,
        *,
        ends: float,
    ) -> None:
        with step("mount", trace, layer=labels.layer) as here:
            prepare = PrepareLayer(labels.image, labels.layer, labels.size, mode.ztoc.ztoc, mode.ztoc.ztoc_size)
            await self._bus.ask(prepare, timeout=_left(ends), trace=here)
            await self._mount(snapshot, parents, labels, mode.ztoc.ztoc, here, ends=ends)

    async def _mount(  # noqa: PLR0913
        self,
        snapshot: Snapshot,
        parents: Sequence[Snapshot],
        labels: RemoteLabels,
        ztoc: Digest,
        trace: TraceParent | None,
        *,
        ends: float,
    ) -> None:
        lower = tuple(str(self._places.contents(parent)) for parent in parents)
        ask = MountLayer(str(snapshot.id), labels.image, labels.layer, ztoc, lower)
        await asyncio.to_thread(mark_shown, self._places.snapshots / str(snapshot.id))
        shown = await self._bus.ask(ask, timeout=_left(ends), trace=trace)
        expected = self._places.mounts / str(snapshot.id)
        if Path(shown.path) != expected:
            raise FailedPrecondition(
                f"the mounter shows {shown.path}, not {expected}: snapshotter and mounter need the same --root"
            )

    async def _unpack(
        self, snapshot: Snapshot, parents: Sequence[Snapshot], labels: RemoteLabels, mode: Whole, trace: TraceParent
    ) -> Brought:
        with step("unpack", trace, layer=labels.layer) as here:
            ask = ReadImageConfig(labels.image, labels.manifest)
            config = await self._bus.ask(ask, timeout=self._timeout, trace=here)
            if labels.layer not in config.layers:
                raise NotFound(f"{labels.layer} is not a layer of {labels.manifest}")
            place = config.layers.index(labels.layer)
            if place >= min(len(config.media_types), len(config.diff_ids)):
                raise InvalidManifest(f"{labels.manifest} and its config do not have the same layers")
            fetched = await self._bus.ask(FetchLayer(labels.image, labels.layer), timeout=WHOLE_TIMEOUT, trace=here)
            upper, blob = self._places.upper(snapshot.id), Path(fetched.path)
            lower = [self._places.contents(parent) for parent in parents]
            stop = threading.Event()

            def work() -> tuple[int, int]:
                media_type, diff_id = config.media_types[place], config.diff_ids[place]
                unpack(blob, upper, media_type=media_type, diff_id=diff_id, lower=lower, stopped=stop.is_set)
                return disk_usage(upper)

            try:
                size, inodes = await _whole(asyncio.ensure_future(asyncio.to_thread(work)), stop)
            finally:
                with suppress(OSError):
                    blob.unlink(missing_ok=True)
            return Brought(mode, size, inodes)

    async def check(self, chain: Sequence[tuple[Snapshot, Sequence[Snapshot]]]) -> None:
        """Have every lazy snapshot of ``chain`` (each with its parents) shown, else `Unavailable`.

        A mount that is gone, because mounter or machine restarted, is made again from the cache and the labels.
        """
        lazy = [(snapshot, parents) for snapshot, parents in chain if is_lazy(snapshot)]
        if not lazy:
            return
        names = tuple(str(snapshot.id) for snapshot, _ in lazy)
        ends = self.deadline()
        try:
            timeout = min(CHECK_TIMEOUT, self._timeout)
            alive = set((await self._bus.ask(CheckMounts(names), timeout=timeout)).alive)
            for snapshot, parents in reversed(lazy):  # the lowest first: upper layers look at what lies below
                if str(snapshot.id) not in alive:
                    await self._restore(snapshot, parents, ends)
        except SociError as error:
            raise Unavailable(f"lazy layers of this snapshot are not there: {error}") from error

    async def _restore(self, snapshot: Snapshot, parents: Sequence[Snapshot], ends: float) -> None:
        """Show a lazy snapshot again, from the cache where its zTOC is there, with the registry's help otherwise."""
        labels = read_remote_labels(snapshot.labels)
        ztoc, size = snapshot.labels.get(ZTOC), snapshot.labels.get(ZTOC_SIZE, "")
        if not ztoc or not (size.isascii() and size.isdigit()):
            raise FailedPrecondition(f"snapshot {snapshot.name!r} does not say which zTOC it was shown by")
        prepare = PrepareLayer(labels.image, labels.layer, labels.size, parse_digest(ztoc), int(size))
        await self._bus.ask(prepare, timeout=_left(ends))
        await self._mount(snapshot, parents, labels, parse_digest(ztoc), None, ends=ends)

    async def hide(self, number: str) -> None:
        """Take the mount of a snapshot away, if it is there."""
        await self._bus.ask(UnmountLayer(number), timeout=UNMOUNT_TIMEOUT)


def _left(ends: float) -> float:
    """Seconds left until the loop's time ``ends``."""
    left = ends - asyncio.get_running_loop().time()
    if left <= 0:
        raise DeadlineExceeded("the layer was not there within mount_timeout_sec")
    return left


async def _whole(work: asyncio.Future[Result], stop: threading.Event) -> Result:
    """Wait for a thread; where we are not to wait any more, have it end first, so that nothing writes behind us."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        stop.set()
        with suppress(SociError):
            await work
        raise
