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
from pathlib import Path
from typing import TypeVar

from soci.errors import AlreadyExists, FailedPrecondition, InvalidInput, SociError, Unavailable, Unsupported
from soci.launch import TraceParent
from soci_bus.asks import AttachLaunch
from soci_bus.events import ContainerPrepared, IndexChosen, LaunchStarted, ModeChosen
from soci_bus.face import Bus
from soci_runtime.logs import log
from soci_runtime.tracing import step
from soci_snapshotter import labels as names
from soci_snapshotter import said, userxattr
from soci_snapshotter.directories import make_directories, numbers, owner_of, was_shown
from soci_snapshotter.filters import parse_filters
from soci_snapshotter.idmap import FIXED, UIDS, MappedLayers, active_usage, is_remapped, mapped_places, owners_of
from soci_snapshotter.idmap_local import remove_place
from soci_snapshotter.labels import RemoteLabels, read_remote_labels, read_traceparent
from soci_snapshotter.launches import Launches
from soci_snapshotter.layers import Brought, Layers
from soci_snapshotter.mode import Defer, Lazy
from soci_snapshotter.mounts import OVERLAY_LAYERS, Mount, Places, is_lazy, mounts_of
from soci_snapshotter.said import Said
from soci_snapshotter.state import Kind, Snapshot
from soci_snapshotter.store import SnapshotStore
from soci_snapshotter.usage import disk_usage, few_usage, lazy_usage

ATTACH_TIMEOUT = 2.0
"""Seconds in which the mounter takes note of a launch; without it misses are only filed under the launch before."""
TRIMS = 50
"""Times that one clean-up trims the log; other calls come in between."""
OWNER_TIMEOUT = 5.0
"""Seconds in which a layer must say whom its root directory belongs to; a mount may hang."""

Result = TypeVar("Result")
Made = tuple[Snapshot, Sequence[Snapshot]]
"""A new snapshot, and what it lies on, nearest first."""


class Snapshots:
    """This node's snapshots."""

    def __init__(  # noqa: PLR0913  its ways out
        self,
        store: SnapshotStore,
        layers: Layers,
        places: Places,
        bus: Bus,
        thread: ThreadPoolExecutor,
        *,
        freed: Callable[[], None] = lambda: None,
    ) -> None:
        """``freed`` is told, and returns at once, when layers that were shown are no more."""
        self._store = store
        self._freed = freed
        self._layers = layers
        self._places = places
        self._bus = bus
        self._thread = thread
        self._launches = Launches()
        self._cleaning = asyncio.Lock()
        self._mapped = MappedLayers(bus, places)
        self._index_off = os.path.exists("/sys/module/overlay/parameters/index")  # noqa: PTH110

    async def _db(self, call: Callable[..., Result], *args: object, **options: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(call, *args, **options))

    # --- the calls

    async def prepare(self, key: str, parent: str, labels: Mapping[str, str], namespace: str) -> tuple[Mount, ...]:
        """A new active snapshot; with `labels.REF` the layer is brought first, and then `AlreadyExists` is raised."""
        target = labels.get(names.REF)
        labels = names.without_ours(labels)
        if not target:
            made, parents = await self._make(key, parent, "active", labels)
            async with self._forgotten_unless_done(made):
                mounts = await self._mounts(made, parents)
                await self._container(made, parents, namespace_of(key, namespace))
                return mounts
        try:
            return await self._prepare_layer(target, key, parent, labels, namespace_of(key, namespace))
        except AlreadyExists:
            raise
        except SociError as error:
            log.warning("no layer was prepared", key=key, parent=parent, error=error, **said.FAILED)
            raise

    async def _prepare_layer(
        self, target: str, key: str, parent: str, labels: Mapping[str, str], namespace: str
    ) -> tuple[Mount, ...]:
        if not namespace:
            raise FailedPrecondition(f"a namespace is required to bring layers, and {key[:200]!r} does not say it")
        await self._raise_if_here(target, parent)
        made, parents = await self._make(key, parent, "active", {**labels, names.NAMESPACE: namespace})
        async with self._forgotten_unless_done(made):
            brought = await self._bring(made, parents)
            if isinstance(brought.mode, Defer):
                return await self._mounts(made, parents)
            await self._commit_remote(target, made, brought)
        raise AlreadyExists(f"target snapshot {target!r}: already exists")

    async def view(self, key: str, parent: str, labels: Mapping[str, str]) -> tuple[Mount, ...]:
        """A new view."""
        made, parents = await self._make(key, parent, "view", names.without_ours(labels))
        async with self._forgotten_unless_done(made):
            return await self._mounts(made, parents)

    async def mounts(self, key: str) -> tuple[Mount, ...]:
        """The mounts of an active snapshot or view."""
        found, *parents = await self._db(self._store.chain, key)
        if found.kind == "committed":
            raise FailedPrecondition(f"snapshot {key!r} is committed and has no mounts")
        await self._check(parents)
        return await self._mounts(found, parents)

    async def commit(self, name: str, key: str, labels: Mapping[str, str], parent: str) -> None:
        """Make an active snapshot a committed one."""
        wanted = names.without_ours(labels)
        if is_remapped(name, key):
            wanted[names.MAPPED] = "true"

        def commit_few() -> Path | None:  # in one go, where little is to be measured; else what is
            found = self._store.find(key)
            upper = self._places.upper(found.id) if found and found.kind == "active" else None
            usage = few_usage(upper) if upper else (0, 0)
            if usage is None:
                return upper
            self._store.commit(name, key, wanted, parent=parent, size=usage[0], inodes=usage[1])
            return None

        upper = await self._db(commit_few)
        if upper:
            size, inodes = await asyncio.to_thread(disk_usage, upper)
            await self._db(self._store.commit, name, key, wanted, parent=parent, size=size, inodes=inodes)

    async def remove(self, key: str) -> None:
        """Forget a snapshot; `cleanup` frees what it held."""
        gone = await self._db(self._store.remove, key)
        if is_lazy(gone):
            self._layers.saw_need([gone])

    async def stat(self, key: str) -> Snapshot:
        """One snapshot."""
        return await self._db(self._store.get, key)

    async def update(self, name: str, labels: Mapping[str, str], paths: Sequence[str]) -> Snapshot:
        """Change labels, but not those that are ours."""
        return await self._db(self._store.update, name, labels, list(paths), FIXED)

    async def list(self, filters: Sequence[str]) -> Sequence[Snapshot]:
        """The snapshots that one of the filters matches."""
        matches = parse_filters(filters)
        found = await self._db(self._store.all)
        return await asyncio.to_thread(lambda: [snapshot for snapshot in found if matches(snapshot)])

    async def usage(self, key: str) -> tuple[int, int]:
        """Bytes and inodes: measured for an active snapshot, what the cache holds of a lazy layer, nothing for a
        view, and as it was at commit for the others.
        """
        found = await self._db(self._store.get, key)
        if found.kind == "active":
            below = (await self._db(self._store.chain, key))[1:] if UIDS in found.labels else []
            return await asyncio.to_thread(active_usage, found, below, self._places)
        if is_lazy(found):
            return await asyncio.to_thread(lazy_usage, self._places.cache, found.labels)
        return found.size, found.inodes

    async def cleanup(self) -> None:
        """Free directories and mounts of snapshots that are no more. What cannot be freed now is tried next time.

        A snapshot that is made meanwhile is safe: its number is none of those read here, and these are not given any
        more once the table was asked about them.
        """
        async with self._cleaning:
            on_disk = await asyncio.to_thread(numbers, self._places.snapshots)
            mapped = await asyncio.to_thread(mapped_places, self._places.snapshots)
            gone = sorted(await self._db(self._store.reserve, on_disk | mapped.keys()))
            mounter_away = hidden = False
            for name in [*(name for number in gone for name in mapped.get(number, ())), *map(str, gone)]:
                place = self._places.snapshots / name
                try:
                    if was_shown(place):
                        if mounter_away:
                            continue
                        await self._layers.hide(name)
                        hidden = True
                    await asyncio.to_thread(remove_place, place)
                except (SociError, OSError) as error:
                    mounter_away = mounter_away or isinstance(error, Unavailable)
                    log.warning("a removed snapshot is not freed yet", snapshot=name, error=error)
            if hidden:
                self._freed()
            for _ in range(TRIMS):
                if not await self._db(self._store.trim):
                    break

    # --- inside

    async def _make(self, key: str, parent: str, kind: Kind, labels: Mapping[str, str]) -> Made:
        """All that may fail or take time comes first, so that a call that fails leaves no snapshot behind."""
        owner = None
        chain = await self._db(self._store.chain, parent) if parent else []
        if chain and chain[0].kind == "committed":
            if len(chain) > OVERLAY_LAYERS:
                raise Unsupported(f"{len(chain)} layers: the kernel's overlayfs takes {OVERLAY_LAYERS}")
            await self._check(chain)
            owner = await self._owner(chain[0])
        owners = owners_of(labels, chain[0] if chain else None)
        if owners:
            owner = owners.of(*owner or (0, 0))

        def directories(number: int) -> None:
            make_directories(self._places.snapshots / str(number), active=kind == "active", owner=owner)

        def make() -> Made:  # in one go: the parent may have gone and come again since it was looked at
            below = self._store.chain(parent) if parent else []
            return self._store.prepare(key, parent, kind, dict(labels), directories), below

        making = asyncio.ensure_future(self._db(make))
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:  # nobody waits for it any more
            with suppress(SociError):
                await self._db(self._store.abandon, (await making)[0])
            raise

    async def _mounts(self, snapshot: Snapshot, parents: Sequence[Snapshot]) -> tuple[Mount, ...]:
        """The mounts, once the layers are there as the snapshot wants them."""
        mapped = await self._mapped.have(snapshot, parents)
        options = {"index_off": self._index_off, "user_xattrs": userxattr.needed()}
        return mounts_of(snapshot, parents, self._places, mapped=mapped, **options)

    async def _owner(self, below: Snapshot) -> tuple[int, int]:
        directory = self._places.contents(below)
        if not is_lazy(below):
            return owner_of(directory)
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
            mode = Defer(str(error))
            log.info("layer", key=made.name, parent=made.parent, **said.of_layer(mode))
            return Brought(mode)
        trace, first = self._launch(wanted, made.labels, by="pull")
        with step("prepare", trace, layer=wanted.layer, image=wanted.image) as here:
            ends = self._layers.deadline()
            image, facts = await self._layers.facts(wanted, here, ends, below=len(parents))
            if first:
                chosen, found_by = (image.index.index, image.index.found_by) if image.index else (None, "")
                self._bus.publish(IndexChosen(trace.launch, chosen, found_by, image.no_index))
                _say(said.of_index(wanted.image, wanted.manifest, image.index, image.no_index))
            _say(said.of_sparse(wanted.image, facts))
            brought = await self._layers.bring(made, parents, wanted, (image, facts), here, ends=ends)
        seconds = time.monotonic() - begun
        name, why = brought.mode.name, brought.mode.why
        self._bus.publish(ModeChosen(trace.launch, wanted.layer, name, why, facts.size, seconds))
        about = {"key": made.name, "parent": made.parent, "launch": trace.launch, "layer": wanted.layer}
        log.info("layer", **about, seconds=round(seconds, 4), **said.of_layer(brought.mode, brought.failed))
        return brought

    async def _raise_if_here(self, target: str, parent: str) -> None:
        """`AlreadyExists` where the layer is here, because another namespace pulled it; only if it can be used."""
        taken = await self._db(self._store.find, target)
        if taken is None or (taken.kind, taken.parent, taken.labels.get(names.REF)) != ("committed", parent, target):
            return
        with suppress(Unavailable):  # else it is brought again
            await self._check([taken, *await self._db(self._store.parents, taken)])
            raise AlreadyExists(f"target snapshot {target!r}: already exists")

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
            mapped = owners_of(made.labels, parents[0]) is not None
            shown = (self._places.mapped(one, made) if mapped else self._places.contents(one) for one in lazy)
            attach = AttachLaunch(trace.launch, tuple(place.name for place in shown))
            try:
                await self._bus.ask(attach, timeout=ATTACH_TIMEOUT, trace=trace)
            except SociError as error:
                log.warning("the mounter does not know of the launch", launch=trace.launch, error=error)
            self._bus.publish(ContainerPrepared(trace.launch, made.name, len(parents), len(lazy)))
            self._layers.saw_need(lazy)  # what the launches before this one needed

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


def _say(line: Said | None) -> None:
    if line:
        getattr(log, line.level)(line.message, **line.facts)


def namespace_of(key: str, header: str) -> str:
    """Containerd's namespace: from the header, or from the key, ``<namespace>/<number>/<client's key>``; else none."""
    namespace, _, rest = key.partition("/")
    number, slash, _ = rest.partition("/")
    return header or (namespace if slash and number.isdigit() else "")
