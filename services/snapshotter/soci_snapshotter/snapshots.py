# SPDX-License-Identifier: Apache-2.0
"""The ten calls of containerd's snapshots service, in our own words. `soci_snapshotter.grpc_door` translates.

What runs at the same time: each call is a task; all of them share one thread in which the database is used, a
transaction at a time. No transaction is open while anything but this node's disk is waited for.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TypeVar

from soci.errors import AlreadyExists, FailedPrecondition, InvalidInput, NoIndex, SociError, Unavailable, Unsupported
from soci.launch import TraceParent
from soci_bus.asks import AttachLaunch
from soci_bus.events import ContainerPrepared, IndexChosen, LaunchStarted, ModeChosen
from soci_bus.face import Bus
from soci_runtime.logs import log
from soci_runtime.tracing import step
from soci_snapshotter import labels as names
from soci_snapshotter.directories import make_directories, numbers, owner_of, remove_directory, was_shown
from soci_snapshotter.filters import parse_filters
from soci_snapshotter.labels import RemoteLabels, read_remote_labels, read_traceparent
from soci_snapshotter.launches import Launches
from soci_snapshotter.layers import Brought, Layers
from soci_snapshotter.mode import Defer, Facts, Lazy
from soci_snapshotter.mounts import OVERLAY_LAYERS, Mount, Places, is_lazy, mounts_of
from soci_snapshotter.state import Kind, Snapshot
from soci_snapshotter.store import SnapshotStore
from soci_snapshotter.usage import disk_usage

ATTACH_TIMEOUT = 2.0
"""Seconds in which the mounter takes note of a launch; without it misses are only filed under the launch before."""
OWNER_TIMEOUT = 5.0
"""Seconds in which a layer must say whom its root directory belongs to; a mount may hang."""

# what operators of the reference grep their logs for
_SAID = {
    "lazy": {"remote-snapshot-prepared": "true"},
    "whole": {"remote-snapshot-prepared": "false", "local-snapshot-prepared": "true"},
    "defer": {"remote-snapshot-prepared": "false", "defer-snapshot-runtime": "true"},
}

Result = TypeVar("Result")


class Snapshots:
    """This node's snapshots."""

    def __init__(
        self, store: SnapshotStore, layers: Layers, places: Places, bus: Bus, thread: ThreadPoolExecutor
    ) -> None:
        self._store = store
        self._layers = layers
        self._places = places
        self._bus = bus
        self._thread = thread
        self._launches = Launches()
        self._cleaning = asyncio.Lock()
        self._index_off = os.path.exists("/sys/module/overlay/parameters/index")  # noqa: PTH110

    async def _db(self, call: Callable[..., Result], *args: object, **options: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(call, *args, **options))

    # --- the calls

    async def prepare(self, key: str, parent: str, labels: Mapping[str, str], namespace: str) -> tuple[Mount, ...]:
        """A new active snapshot; with `labels.REF` the layer is brought first, and then `AlreadyExists` is raised."""
        target = labels.get(names.REF)
        labels = names.without_ours(labels)
        if target:
            found = namespace_of(key, namespace)
            if not found:
                raise FailedPrecondition(f"a namespace is required to bring layers, and {key[:200]!r} does not say it")
            labels = {**labels, names.NAMESPACE: found}
        made = await self._make(key, parent, "active", labels)
        async with self._forgotten_unless_done(made):
            parents = await self._db(self._store.parents, made)
            if not target:
                await self._container(made, parents, namespace_of(key, namespace))
                return mounts_of(made, parents, self._places, index_off=self._index_off)
            brought = await self._bring(made, parents)
            if isinstance(brought.mode, Defer):
                return mounts_of(made, parents, self._places, index_off=self._index_off)
            await self._commit_remote(target, made, brought)
        raise AlreadyExists(f"target snapshot {target!r}: already exists")

    async def view(self, key: str, parent: str, labels: Mapping[str, str]) -> tuple[Mount, ...]:
        """A new view."""
        made = await self._make(key, parent, "view", names.without_ours(labels))
        async with self._forgotten_unless_done(made):
            parents = await self._db(self._store.parents, made)
            return mounts_of(made, parents, self._places, index_off=self._index_off)

    async def mounts(self, key: str) -> tuple[Mount, ...]:
        """The mounts of an active snapshot or view."""
        found = await self._db(self._store.get, key)
        if found.kind == "committed":
            raise FailedPrecondition(f"snapshot {key!r} is committed and has no mounts")
        parents = await self._db(self._store.parents, found)
        await self._check(parents)
        return mounts_of(found, parents, self._places, index_off=self._index_off)

    async def commit(self, name: str, key: str, labels: Mapping[str, str], parent: str) -> None:
        """Make an active snapshot a committed one."""
        found = await self._db(self._store.find, key)
        size = inodes = 0
        if found and found.kind == "active":
            size, inodes = await asyncio.to_thread(disk_usage, self._places.upper(found.id))
        wanted = names.without_ours(labels)
        await self._db(self._store.commit, name, key, wanted, parent=parent, size=size, inodes=inodes)

    async def remove(self, key: str) -> None:
        """Forget a snapshot; `cleanup` frees what it held."""
        await self._db(self._store.remove, key)

    async def stat(self, key: str) -> Snapshot:
        """One snapshot."""
        return await self._db(self._store.get, key)

    async def update(self, name: str, labels: Mapping[str, str], paths: Sequence[str]) -> Snapshot:
        """Change labels, but not those that are ours."""
        return await self._db(self._store.update, name, labels, list(paths), names.OURS)

    async def list(self, filters: Sequence[str]) -> Sequence[Snapshot]:
        """The snapshots that one of the filters matches."""
        matches = parse_filters(filters)
        found = await self._db(self._store.all)
        return await asyncio.to_thread(lambda: [snapshot for snapshot in found if matches(snapshot)])

    async def usage(self, key: str) -> tuple[int, int]:
        """Bytes and inodes: measured for an active snapshot, as it was at commit for the others."""
        found = await self._db(self._store.get, key)
        if found.kind == "active":
            return await asyncio.to_thread(disk_usage, self._places.upper(found.id))
        return found.size, found.inodes

    async def cleanup(self) -> None:
        """Free directories and mounts of snapshots that are no more. What cannot be freed now is tried next time.

        A snapshot that is made meanwhile is safe: its number is none of those read here, and these are not given any
        more once the table was asked about them.
        """
        async with self._cleaning:
            on_disk = await asyncio.to_thread(numbers, self._places.snapshots)
            mounter_away = False
            for number in sorted(await self._db(self._store.reserve, on_disk)):
                place = self._places.snapshots / str(number)
                try:
                    if was_shown(place):
                        if mounter_away:
                            continue
                        await self._layers.hide(str(number))
                    await asyncio.to_thread(remove_directory, place)
                except (SociError, OSError) as error:
                    mounter_away = mounter_away or isinstance(error, Unavailable)
                    log.warning("a removed snapshot is not freed yet", snapshot=number, error=error)
            await self._db(self._store.trim)

    # --- inside

    async def _make(self, key: str, parent: str, kind: Kind, labels: Mapping[str, str]) -> Snapshot:
        """All that may fail or take time comes first, so that a call that fails leaves no snapshot behind."""
        owner = None
        below = await self._db(self._store.find, parent) if parent else None
        if below and below.kind == "committed":
            chain = [below, *await self._db(self._store.parents, below)]
            if len(chain) > OVERLAY_LAYERS:
                raise Unsupported(f"{len(chain)} layers: the kernel's overlayfs takes {OVERLAY_LAYERS}")
            await self._check(chain)
            owner = await self._owner(below)

        def directories(number: int) -> None:
            make_directories(self._places.snapshots / str(number), active=kind == "active", owner=owner)

        made = asyncio.ensure_future(self._db(self._store.prepare, key, parent, kind, dict(labels), directories))
        try:
            return await asyncio.shield(made)
        except asyncio.CancelledError:  # nobody waits for it any more
            with suppress(SociError):
                await self._db(self._store.abandon, await made)
            raise

    async def _owner(self, below: Snapshot) -> tuple[int, int]:
        directory = self._places.contents(below)
        try:
            async with asyncio.timeout(OWNER_TIMEOUT):
                return await asyncio.to_thread(owner_of, directory)
        except TimeoutError as error:
            raise Unavailable(f"{directory} does not answer") from error

    @asynccontextmanager
    async def _forgotten_unless_done(self, made: Snapshot) -> AsyncIterator[None]:
        """Where the call fails, or its client goes away, the snapshot goes too: the key is free again."""
        try:
            yield
        except BaseException:
            await self._forget(made)
            raise

    async def _forget(self, made: Snapshot) -> None:
        try:
            await asyncio.shield(self._db(self._store.abandon, made))
        except SociError as error:
            log.warning("a snapshot whose making failed is still there", key=made.name, error=error)

    async def _check(self, chain: Sequence[Snapshot]) -> None:
        """`Unavailable` unless every lazy layer of ``chain`` (nearest first) is shown."""
        await self._layers.check([(snapshot, chain[place + 1 :]) for place, snapshot in enumerate(chain)])

    async def _bring(self, made: Snapshot, parents: Sequence[Snapshot]) -> Brought:
        begun = time.monotonic()
        try:
            wanted = read_remote_labels(made.labels)
        except InvalidInput as error:
            log.info("layer", key=made.name, mode="defer", why=str(error), **_SAID["defer"])
            return Brought(Defer(str(error)))
        trace, first = self._launch(wanted, made.labels, by="pull")
        with step("prepare", trace, layer=wanted.layer, image=wanted.image) as here:
            ends = self._layers.deadline()
            try:
                index = await self._layers.find_index(wanted, here, ends)
                facts = Facts(wanted.layer, index=index, size=wanted.size)
                chosen = IndexChosen(trace.launch, index.index, index.found_by, "")
            except NoIndex as error:
                facts = Facts(wanted.layer, no_index=str(error), size=wanted.size)
                chosen = IndexChosen(trace.launch, None, "", str(error))
            if first:
                self._bus.publish(chosen)
            brought = await self._layers.bring(made, parents, wanted, facts, here, ends=ends)
        mode = brought.mode
        seconds = time.monotonic() - begun
        self._bus.publish(ModeChosen(trace.launch, wanted.layer, mode.name, mode.why, wanted.size, seconds))
        about = {"key": made.name, "parent": made.parent, "launch": trace.launch, "layer": wanted.layer}
        log.info("layer", **about, mode=mode.name, why=mode.why, seconds=round(seconds, 4), **_SAID[mode.name])
        return brought

    async def _commit_remote(self, target: str, made: Snapshot, brought: Brought) -> None:
        """Commit under the chain id itself, and tell the client by `AlreadyExists` that the layer is here."""
        labels = dict(made.labels)
        labels[names.HAS_INDEX] = "true"
        if isinstance(brought.mode, Lazy):
            labels[names.REMOTE] = names.REMOTE_VALUE
            labels[names.ZTOC] = brought.mode.ztoc.ztoc
            labels[names.ZTOC_SIZE] = str(brought.mode.ztoc.ztoc_size)
        usage = {"size": brought.size, "inodes": brought.inodes}
        try:
            await self._db(self._store.commit, target, made.name, labels, **usage)
        except AlreadyExists:
            taken = await self._db(self._store.find, target)
            wanted = ("committed", made.parent, target)
            if taken and (taken.kind, taken.parent, taken.labels.get(names.REF)) == wanted:
                await self._forget(made)  # another pull of the same layer was faster
            else:  # containerd looks for label and parent, not for a name
                await self._db(self._store.commit, f"{target} {made.id}", made.name, labels, **usage)

    async def _container(self, made: Snapshot, parents: Sequence[Snapshot], namespace: str) -> None:
        """A container is about to start over lazy layers: its launch begins, or goes on."""
        lazy = [snapshot for snapshot in parents if is_lazy(snapshot)]
        if not lazy:
            return
        with suppress(InvalidInput):
            wanted = read_remote_labels(lazy[0].labels)
            said = {**lazy[0].labels, names.NAMESPACE: namespace}
            said.pop(names.TRACEPARENT, None)  # the pull's, which may be long ago
            if names.TRACEPARENT in made.labels:
                said[names.TRACEPARENT] = made.labels[names.TRACEPARENT]
            trace, _ = self._launch(wanted, said, by="container")
            self._launches.end(namespace, wanted.manifest)
            attach = AttachLaunch(trace.launch, tuple(str(snapshot.id) for snapshot in lazy))
            try:
                await self._bus.ask(attach, timeout=ATTACH_TIMEOUT, trace=trace)
            except SociError as error:
                log.warning("the mounter does not know of the launch", launch=trace.launch, error=error)
            self._bus.publish(ContainerPrepared(trace.launch, made.name, len(parents), len(lazy)))

    def _launch(self, wanted: RemoteLabels, labels: Mapping[str, str], *, by: str) -> tuple[TraceParent, bool]:
        """The launch of this call, and whether it begins here."""
        now = time.monotonic()
        namespace = labels.get(names.NAMESPACE, "")
        told = read_traceparent(labels)
        found = self._launches.find(namespace, wanted.manifest, told, now)
        if found:
            return found, False
        with step("launch", told, image=wanted.image, manifest=wanted.manifest) as trace:
            self._launches.begin(namespace, wanted.manifest, trace, now)
        self._bus.publish(LaunchStarted(trace.launch, wanted.image, wanted.manifest, namespace, by))
        return trace, True


def namespace_of(key: str, header: str) -> str:
    """Containerd's namespace: from the header, or from the key, ``<namespace>/<number>/<client's key>``; else none."""
    namespace, _, rest = key.partition("/")
    number, slash, _ = rest.partition("/")
    return header or (namespace if slash and number.isdigit() else "")
