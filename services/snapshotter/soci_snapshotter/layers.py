# SPDX-License-Identifier: Apache-2.0
"""How a layer is brought, once `soci_snapshotter.mode` has said which way."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from soci.digest import Digest, parse_digest
from soci.errors import DeadlineExceeded, FailedPrecondition, InvalidInput, NotFound, SociError, Unavailable
from soci.launch import TraceParent
from soci_bus.asks import CheckMounts, MountLayer, PrepareLayer, UnmountLayer
from soci_runtime.tracing import step
from soci_snapshotter import userxattr
from soci_snapshotter.away import Asking
from soci_snapshotter.directories import mark_shown, remake_upper
from soci_snapshotter.images import Image, Images
from soci_snapshotter.labels import ZTOC, ZTOC_SIZE, RemoteLabels, read_remote_labels
from soci_snapshotter.mode import Facts, Lazy, Mode, Rules, Whole, choose
from soci_snapshotter.mounts import Places, is_lazy
from soci_snapshotter.state import Snapshot
from soci_snapshotter.whole import WholeLayers

CHECK_TIMEOUT = 5.0
"""Seconds within which the mounter says which mounts are alive."""
UNMOUNT_TIMEOUT = 10.0


@dataclass(frozen=True, slots=True)
class Brought:
    """How the layer came: the mode that worked; for `Defer` nothing was done. ``failed`` says what was tried before."""

    mode: Mode
    size: int = 0  # bytes and inodes that a whole layer takes
    inodes: int = 0
    failed: str = ""


class Layers:
    """Brings layers for snapshots. Holds nothing but its ways out."""

    def __init__(  # noqa: PLR0913  its ways out
        self, bus: Asking, places: Places, images: Images, whole: WholeLayers, rules: Rules, *, mount_timeout: float
    ) -> None:
        self._bus = bus
        self._places = places
        self._images = images
        self._whole = whole
        self._rules = rules
        self._timeout = mount_timeout

    def deadline(self) -> float:
        """When a layer that Prepare was called for now is to be shown, at the latest (loop time)."""
        return asyncio.get_running_loop().time() + self._timeout

    async def facts(self, labels: RemoteLabels, trace: TraceParent, ends: float, *, below: int) -> tuple[Image, Facts]:
        """What is known of the image and of the layer; see `soci_snapshotter.images`."""
        return await self._images.facts(labels, trace, ends, below=below)

    def saw_need(self, lazy: Sequence[Snapshot]) -> None:
        """Remember what launches needed of these layers so far; returns at once."""
        seen: list[tuple[Digest, Digest]] = []
        for snapshot in lazy:
            with suppress(InvalidInput):
                seen.append((read_remote_labels(snapshot.labels).layer, parse_digest(snapshot.labels.get(ZTOC, ""))))
        self._images.saw_need(seen)

    async def bring(  # noqa: PLR0913  what is known of the call
        self,
        snapshot: Snapshot,
        parents: Sequence[Snapshot],
        labels: RemoteLabels,
        known: tuple[Image, Facts],
        trace: TraceParent,
        *,
        ends: float,
    ) -> Brought:
        """Try the chosen mode; where it fails, choose again with that failure among the facts.

        A lazy attempt is over at ``ends``. Raises only where the snapshot's directory cannot be had empty again.
        """
        image, facts = known
        while True:
            mode = choose(facts, self._rules)
            try:
                match mode:
                    case Lazy():
                        await self._show(snapshot, parents, labels, mode, image.diff_id(labels.layer), trace, ends=ends)
                        return Brought(mode)
                    case Whole():
                        brought = await self._unpack(snapshot, parents, labels, image, mode, trace)
                        return replace(brought, failed=facts.lazy_failed)
                    case _:
                        return Brought(mode, failed=facts.lazy_failed or facts.whole_failed)
            except SociError as error:
                if isinstance(mode, Lazy):
                    facts = replace(facts, lazy_failed=str(error))
                else:
                    # containerd is to unpack into it now; half a layer below would show through
                    await asyncio.to_thread(remake_upper, self._places.upper(snapshot.id))
                    facts = replace(facts, whole_failed=str(error))

    async def _show(  # noqa: PLR0913, PLR0917
        self,
        snapshot: Snapshot,
        parents: Sequence[Snapshot],
        labels: RemoteLabels,
        mode: Lazy,
        diff_id: Digest | None,
        trace: TraceParent,
        *,
        ends: float,
    ) -> None:
        with step("mount", trace, layer=labels.layer) as here:
            ztoc = mode.ztoc
            prepare = PrepareLayer(labels.image, labels.layer, labels.size, ztoc.ztoc, ztoc.ztoc_size, diff_id)
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
        ask = MountLayer(str(snapshot.id), labels.image, labels.layer, ztoc, lower, user_xattrs=userxattr.needed())
        await asyncio.to_thread(mark_shown, self._places.snapshots / str(snapshot.id))
        shown = await self._bus.ask(ask, timeout=_left(ends), trace=trace)
        expected = self._places.mounts / str(snapshot.id)
        if Path(shown.path) != expected:
            raise FailedPrecondition(
                f"the mounter shows {shown.path}, not {expected}: snapshotter and mounter need the same --root"
            )

    async def _unpack(  # noqa: PLR0913, PLR0917
        self,
        snapshot: Snapshot,
        parents: Sequence[Snapshot],
        labels: RemoteLabels,
        image: Image,
        mode: Whole,
        trace: TraceParent,
    ) -> Brought:
        with step("unpack", trace, layer=labels.layer) as here:
            wanted = image.wanted(labels.layer)
            if wanted is None:
                raise NotFound(image.no_config or f"{labels.manifest} does not say what {labels.layer} unpacks to")
            self._whole.begin(labels.image, labels.manifest, [wanted], here, namespace=labels.namespace)
            lower = [self._places.contents(parent) for parent in parents]
            upper = self._places.upper(snapshot.id)
            size, inodes = await self._whole.claim(labels.manifest, labels.layer, upper, lower)
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
