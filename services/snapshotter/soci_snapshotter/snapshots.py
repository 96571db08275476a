# SPDX-License-Identifier: Apache-2.0
"""The ten calls of containerd's snapshots service, in our own words. `soci_snapshotter.grpc_door` translates.

What runs at the same time: each call is a task; all of them share one thread in which the database is used, a
transaction at a time. No transaction is open while anything but this node's disk is waited for.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeVar

from soci.errors import AlreadyExists, FailedPrecondition, InvalidInput, NoIndex, SociError
from soci.launch import TraceParent
from soci_bus.asks import AttachLaunch
from soci_bus.events import ContainerPrepared, IndexChosen, LaunchStarted, ModeChosen
from soci_bus.face import Bus
from soci_runtime.logs import log
from soci_runtime.tracing import step
from soci_snapshotter import labels as names
from soci_snapshotter.directories import make_directories, numbers, owner_of, remove_directory
from soci_snapshotter.filters import parse_filters
from soci_snapshotter.labels import RemoteLabels, read_remote_labels, read_traceparent
from soci_snapshotter.launches import Launches
from soci_snapshotter.layers import Brought, Layers
from soci_snapshotter.mode import Defer, Facts, Lazy
from soci_snapshotter.mounts import Mount, Places, is_lazy, mounts_of
from soci_snapshotter.state import Kind, Snapshot
from soci_snapshotter.store import SnapshotStore
from soci_snapshotter.usage import disk_usage

ATTACH_TIMEOUT = 2.0
"""Seconds in which the mounter takes note of a launch; without it misses are only filed under the launch before."""

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
        self._index_off = os.path.exists("/sys/module/overlay/parameters/index")  # noqa: PTH110

    async def _db(self, call: Callable[..., Result], *args: object, **options: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(call, *args, **options))

    # --- the calls

    async def prepare(self, key: str, parent: str, labels: Mapping[str, str], namespace: str) -> tuple[Mount, ...]:
        """A new active snapshot; with `labels.REF` the layer is brought first, and then `AlreadyExists` is raised."""
        target = labels.get(names.REF)
        labels = names.without_ours(labels)
        if target:
            labels = {**labels, names.NAMESPACE: namespace_of(key, namespace)}
        made = await self._make(key, parent, "active", labels)
        parents = await self._db(self._store.parents, made)
        if target:
            brought = await self._bring(made, parents)
            if not isinstance(brought.mode, Defer):
                await self._commit_remote(target, made, brought)
                raise AlreadyExists(f"target snapshot {target!r}: already exists")
        else:
            await self._check(parents)
            await self._container(made, parents)
        return mounts_of(made, parents, self._places, index_off=self._index_off)

    async def view(self, key: str, parent: str, labels: Mapping[str, str]) -> tuple[Mount, ...]:
        """A new view."""
        made = await self._make(key, parent, "view", names.without_ours(labels))
        parents = await self._db(self._store.parents, made)
        await self._check(parents)
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
        found = await self._db(self._store.get, key)
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
        """Change labels."""
        ours = names.only_ours((await self._db(self._store.get, name)).labels)
        if any(path.removeprefix("labels.") in names.OURS for path in paths):
            raise InvalidInput(f"labels {', '.join(names.OURS)} are the snapshotter's own")
        return await self._db(self._store.update, name, {**names.without_ours(labels), **ours}, list(paths))

    async def list(self, filters: Sequence[str]) -> Sequence[Snapshot]:
        """The snapshots that one of the filters matches."""
        matches = parse_filters(filters)
        return [snapshot for snapshot in await self._db(self._store.all) if matches(snapshot)]

    async def usage(self, key: str) -> tuple[int, int]:
        """Bytes and inodes: measured for an active snapshot, as it was at commit for the others."""
        found = await self._db(self._store.get, key)
        if found.kind == "active":
            return await asyncio.to_thread(disk_usage, self._places.upper(found.id))
        return found.size, found.inodes

    async def cleanup(self) -> None:
        """Free directories and mounts of snapshots that are no more. What cannot be freed now is tried next time."""
        on_disk = await asyncio.to_thread(numbers, self._places.snapshots)
        known = {str(snapshot.id) for snapshot in await self._db(self._store.all)}  # read after the directories
        for number in on_disk:
            if number in known:
                continue
            try:
                await self._layers.hide(number)
                await asyncio.to_thread(remove_directory, self._places.snapshots / number)
            except (SociError, OSError) as error:
                log.warning("a removed snapshot is not freed yet", snapshot=number, error=error)

    # --- inside

    async def _make(self, key: str, parent: str, kind: Kind, labels: Mapping[str, str]) -> Snapshot:
        owner = None
        if parent:
            below = await self._db(self._store.find, parent)
            if below and below.kind == "committed":
                if is_lazy(below):
                    await self._check([below, *await self._db(self._store.parents, below)])
                owner = await asyncio.to_thread(owner_of, self._places.contents(below))

        def directories(number: int) -> None:
            make_directories(self._places.snapshots / str(number), active=kind == "active", owner=owner)

        return await self._db(self._store.prepare, key, parent, kind, dict(labels), directories)

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
            facts = Facts(wanted.layer, size=wanted.size)
            try:
                index = await self._layers.find_index(wanted, here)
                facts = Facts(wanted.layer, index=index, size=wanted.size)
                chosen = IndexChosen(trace.launch, index.index, index.found_by, "")
            except NoIndex as error:
                facts = Facts(wanted.layer, no_index=str(error), size=wanted.size)
                chosen = IndexChosen(trace.launch, None, "", str(error))
            if first:
                self._bus.publish(chosen)
            brought = await self._layers.bring(made, parents, wanted, facts, here)
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
        with suppress(AlreadyExists):  # another pull of the same layer was faster; containerd drops our active one
            await self._db(self._store.commit, target, made.name, labels, size=brought.size, inodes=brought.inodes)

    async def _container(self, made: Snapshot, parents: Sequence[Snapshot]) -> None:
        """A container is about to start over lazy layers: its launch begins, or goes on."""
        lazy = [snapshot for snapshot in parents if is_lazy(snapshot)]
        if not lazy:
            return
        with suppress(InvalidInput):
            wanted = read_remote_labels(lazy[0].labels)
            said = {**lazy[0].labels, names.NAMESPACE: namespace_of(made.name, "")}
            said.pop(names.TRACEPARENT, None)  # the pull's, which may be long ago
            if names.TRACEPARENT in made.labels:
                said[names.TRACEPARENT] = made.labels[names.TRACEPARENT]
            trace, _ = self._launch(wanted, said, by="container")
            self._launches.end(said[names.NAMESPACE], wanted.manifest)
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
    """Containerd's namespace: from the header, or from the key, ``<namespace>/<number>/<client's key>``."""
    return header or key.partition("/")[0]
