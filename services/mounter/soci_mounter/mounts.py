# SPDX-License-Identifier: Apache-2.0
"""The registry of mounts: what is asked to be shown, what is shown, and what a successor must show again.

Mounts of the same layer through the same zTOC share its tree, its files and its fetches.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

from soci.digest import Digest
from soci.errors import AlreadyExists, Mismatch, SociError, Unavailable
from soci.launch import LaunchId, TraceParent, new_traceparent
from soci.tree import LayerTree
from soci_bus.asks import FetchSpans, LayerMounted, LayersShown, MountLayer, PrepareLayer
from soci_cache import LayerReader, LayerStore
from soci_mounter import device, graduate, kernel
from soci_mounter.filesystem import FileSystem
from soci_mounter.flights import Want
from soci_mounter.inherited import inherit
from soci_mounter.native import Native
from soci_mounter.reader import LayerContent, Seams
from soci_mounter.records import Record, Records, check_ask, manner_of
from soci_mounter.shown import PAGE_MOUNTS, Mounted, page_of
from soci_mounter.state import State, line
from soci_mounter.table import Table, open_table
from soci_runtime.flights import in_stoppable_thread, in_thread
from soci_runtime.turns import Turns

LOOK_SECONDS = 5.0
"""How often to look for layers of which all has come, and for tables that nobody uses."""
Result = TypeVar("Result")
AskSpans = Callable[[FetchSpans | PrepareLayer, float, TraceParent | None], Awaitable[object]]
"""Have spans filled: the ask, the seconds that it may take, its trace."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where things are, and how they are checked."""

    mounts: Path  # where the directories of all mounts are
    store: LayerStore
    records: Records
    verify_headers: bool = True
    fuse: Path | None = None  # the FUSE mount point, where it is not `mounts`
    native: Native | None = None  # shows what it can; FUSE shows the rest
    why: str = ""  # layers are shown so


@dataclass(frozen=True, slots=True)
class Showed:
    """A layer that is shown now, by which way (``fuse``, ``erofs``, ``native``) and why."""

    tree: LayerTree
    reader: LayerReader
    way: str
    why: str


@dataclass(frozen=True, slots=True)
class News:
    """What the registry tells others. ``hidden`` gets the name of a directory that is gone from the root."""

    shown: Callable[[MountLayer, Showed, float, TraceParent | None], None]
    hidden: Callable[[str], None]


@dataclass(slots=True, eq=False)
class _Layer:
    """A layer that at least one mount shows."""

    table: Table
    content: LayerContent
    images: list[str]  # one a mount: from where its bytes may be fetched
    proof: str | None  # what came of the proof of all its headers (`soci_mounter.graduate`)

    members: device.Members | None = None

    async def device(self) -> device.Layer:
        """The layer as a device needs it."""
        tree = await self.table.tree()

        def members() -> device.Members:
            if self.members is None:
                self.members = device.Members(tree)
            return self.members

        size = self.content.reader.spans.uncompressed_size
        return device.Layer(tree, self.content, size, members, self.table.node)


class Mounts:
    """All mounts of this node. Used from one event loop."""

    def __init__(self, filesystem: FileSystem, place: Place, ask_spans: AskSpans, seams: Seams, news: News) -> None:
        self._filesystem = filesystem
        self._place = place
        self._ask_spans = ask_spans
        self._seams = seams
        self._news = news
        self._records: dict[str, Record] = {}
        self._layers: dict[tuple[Digest, Digest], _Layer] = {}
        self._locks = Turns()
        self._work: set[asyncio.Task[Any]] = set()
        self._sequence = 0
        self._whys: dict[str, str] = {}  # why mounts are not shown as all others are
        self._failed: dict[str, str] = {}  # the last failure of mounts' reads

    async def restore(self) -> None:
        """Show again what the records of a predecessor say, without asking anybody.

        A mount that cannot be shown is forgotten, so that who wants it can have it mounted anew.
        """
        records, bad = await asyncio.to_thread(self._place.records.load)
        for path, error in bad:
            self._seams.trouble(f"{path} is not the record of a mount", error)
        native = self._place.native
        missing: list[tuple[Record, _Layer]] = []
        for record in records:
            self._sequence = max(self._sequence, record.sequence)
            try:
                layer = await self._open(record.ask)
                if native and native.adopt(record.ask.mount, await layer.device()):
                    self._records[record.ask.mount] = record
                else:
                    missing.append((record, layer))
            except SociError as error:
                await self._not_again(record, error)
        if native:
            native.all_known()
        for record, layer in missing:
            try:
                await self._show(record, layer)
            except SociError as error:
                await self._close(record.ask)
                await self._not_again(record, error)

    async def _not_again(self, record: Record, error: SociError) -> None:
        self._seams.trouble(f"mount {record.ask.mount} could not be shown again", error)
        await asyncio.to_thread(self._place.records.forget, record.ask.mount)

    async def mount(self, ask: MountLayer, trace: TraceParent | None = None) -> LayerMounted:
        """Show a layer. The same ask again gets the same answer; another one of that name is `AlreadyExists`.

        A caller that gives up leaves the mounting to be finished: its next try finds it done.
        """
        check_ask(ask)
        return await self._finish(self._mount(ask, trace))

    async def unmount(self, mount: str) -> None:
        """Take the directory away and forget it; one that is not there is no error."""
        await self._finish(self._unmount(mount))

    def check(self, mounts: Iterable[str]) -> tuple[str, ...]:
        """Those of ``mounts`` that are shown."""
        return tuple(mount for mount in mounts if mount in self._records)

    def reader(self, mount: str) -> LayerReader | None:
        """The layer that a mount shows; None where there is no such mount (any more)."""
        record = self._records.get(mount)
        layer = self._layers.get((record.ask.layer, record.ask.ztoc)) if record else None
        return layer.content.reader if layer else None

    def failed(self, mount: str, error: SociError) -> None:
        """A read of the mount failed."""
        if mount in self._records:
            self._failed[mount] = str(error)

    async def shown(self, after: str = "") -> LayersShown:
        """The page of mounts behind the name ``after``."""
        names = sorted(self._records)
        start = bisect_right(names, after)
        page = [self._mounted(name) for name in names[start : start + PAGE_MOUNTS]]
        end = start + len(page)
        return await in_thread(page_of, page, names[end - 1] if end < len(names) else "")

    def _mounted(self, mount: str) -> Mounted:
        record, native = self._records[mount], self._place.native
        way = (native.way(mount) if native else "") or "fuse"
        reader = self._layers[record.ask.layer, record.ask.ztoc].content.reader
        return Mounted(record.ask, way, self._whys.get(mount, self._place.why), reader.directory)

    def attach(self, mounts: Iterable[str], launch: LaunchId, trace: TraceParent | None) -> None:
        """Misses of these mounts belong to ``launch`` from now on."""
        place = trace if trace is not None and trace.launch == launch else new_traceparent(launch)
        self._seams.traces.update(dict.fromkeys(self.check(mounts), place))

    async def close(self) -> None:
        """End what is under way and let go of all layers; the records stay for the successor."""
        await asyncio.gather(*self._work, return_exceptions=True)
        for layer in self._layers.values():
            await layer.content.close()
        self._layers.clear()

    async def look_after(self) -> None:
        """Look after layers that the kernel has: prove the headers of those that are complete, one after the other, so
        that their next mount is native; and let go of tables that nobody uses.
        """
        while True:
            for key, layer in list(self._layers.items()):
                if layer.proof is None and not layer.content.closed and layer.content.reader.complete():
                    await self._prove(key, layer)
            await self._forget_tables()
            await asyncio.sleep(LOOK_SECONDS)

    async def _forget_tables(self) -> None:
        gone = {key for key, layer in self._layers.items() if layer.table.forget()}
        for mount, record in self._records.items():
            if self._place.native and (record.ask.layer, record.ask.ztoc) in gone:
                self._place.native.forget(mount)
        if gone:
            await in_thread(kernel.give_back)

    async def _prove(self, key: tuple[Digest, Digest], layer: _Layer) -> None:
        try:
            layer.proof = await in_stoppable_thread(lambda stopped: graduate.prove(self._place.store, *key, stopped))
        except Exception as error:  # noqa: BLE001  an image's tar must not end us
            layer.proof = f"not proven: {type(error).__name__}: {error}"  # not again by this process
        if layer.proof not in {None, graduate.AGREE}:
            trouble = f"layer {key[0]} with zTOC {key[1]} will not be mounted from its file"
            self._seams.trouble(trouble, Mismatch(str(layer.proof)))

    async def _finish(self, work: Coroutine[Any, Any, Result]) -> Result:
        task = asyncio.get_running_loop().create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return await asyncio.shield(task)

    async def _mount(self, ask: MountLayer, trace: TraceParent | None) -> LayerMounted:
        async with self._locks.hold(ask.mount):
            known = self._records.get(ask.mount)
            if known is not None and known.ask != ask:
                raise AlreadyExists(f"mount {ask.mount} shows {known.ask.layer} of {known.ask.image} already")
            if known is None:
                began = monotonic()
                layer = await self._open(ask)
                try:
                    tree = await layer.table.tree()
                    taken = await asyncio.to_thread(inherit, tree, ask.lower, manner_of(ask).opaque)
                    self._sequence += 1
                    by_path = {tree.path(node): attributes for node, attributes in taken.items()}
                    record = Record(ask, self._sequence, by_path)
                    await asyncio.to_thread(self._place.records.save, record)
                    way, why = await self._show(record, layer)
                except BaseException:
                    await self._close(ask)
                    raise
                showed = Showed(tree, layer.content.reader, way, why)
                self._news.shown(ask, showed, monotonic() - began, trace)
            if trace is not None:
                self._seams.traces[ask.mount] = trace
            return LayerMounted(str(self._place.mounts / ask.mount))

    async def _unmount(self, mount: str) -> None:
        async with self._locks.hold(mount):
            record = self._records.get(mount)
            if record is None:
                return
            await asyncio.to_thread(self._place.records.forget, mount)
            del self._records[mount]
            self._seams.traces.pop(mount, None)
            self._whys.pop(mount, None)
            self._failed.pop(mount, None)
            native = self._place.native
            if native and native.way(mount):
                await native.hide(mount)
            else:
                self._filesystem.hide(mount)
                self._news.hidden(mount)
                if self._place.fuse:
                    await asyncio.to_thread((self._place.mounts / mount).unlink, missing_ok=True)
            await self._close(record.ask)

    async def _show(self, record: Record, layer: _Layer) -> tuple[str, str]:
        """Show the layer, and say by which way and why: by EROFS where there is that, by FUSE where it cannot."""
        tree, mount, manner = await layer.table.tree(), record.ask.mount, manner_of(record.ask)
        taken = {
            node: record.inherited[path] for node in tree.implied() if (path := tree.path(node)) in record.inherited
        }
        why = self._place.why
        if self._place.native:
            try:
                way = await self._place.native.show(
                    mount, await layer.device(), taken, manner, await self._whole(layer)
                )
            except SociError as error:
                why = self._whys[mount] = f"EROFS cannot show it: {error}"
                self._seams.trouble(f"mount {mount} is shown by FUSE, for EROFS cannot", error)
            else:
                self._records[mount] = record
                return way, why
        if self._place.fuse:
            await asyncio.to_thread(_link, self._place.mounts / mount, self._place.fuse / mount)
        state = self._state(record.ask, layer.content, why)
        layer.table.pinned = True
        self._filesystem.show(mount, tree, layer.content, taken, manner, state)
        self._records[mount] = record
        return "fuse", why

    def _state(self, ask: MountLayer, of: LayerContent, why: str) -> State:
        def content() -> bytes:
            reader = of.reader
            return line(ask.layer, reader.spans, reader.present, why, self._failed.get(ask.mount, ""))

        return State(ask.layer, content)

    async def _whole(self, layer: _Layer) -> Path | None:
        """The file that the kernel may have itself, where all of the layer is here and proven."""
        reader = layer.content.reader
        try:
            kept = layer.proof == graduate.AGREE and await asyncio.to_thread(reader.keep)
        except SociError as error:
            self._seams.trouble(f"{reader.directory} cannot be kept as it is", error)
            return None
        return reader.directory / "layer.tar" if kept else None

    async def _open(self, ask: MountLayer) -> _Layer:
        key = (ask.layer, ask.ztoc)
        async with self._locks.hold(key):
            layer = self._layers.get(key)
            if layer is None:
                verify = self._place.verify_headers
                table, reader = await open_table(self._place.store, ask.layer, ask.ztoc, verify=verify)
                images: list[str] = []
                proof = graduate.found_before(reader.directory)
                content = LayerContent(reader, self._fetch(ask, images), self._seams, table.headers)
                layer = _Layer(table, content, images, proof)
                self._layers[key] = layer
            layer.images.append(ask.image)
            return layer

    def _fetch(self, ask: MountLayer, images: list[str]) -> Callable[[Want], Awaitable[None]]:
        async def fetch(want: Want) -> None:
            # A layer may be gone from one repository and still be in another: each try asks the next image's.
            image = images[want.attempt % len(images)]
            await self._renew(ask, image, want)
            spans = FetchSpans(image, ask.layer, ask.ztoc, want.first, want.last, want.why, want.ahead)
            await self._ask_spans(spans, want.timeout, want.trace)

        return fetch

    async def _renew(self, ask: MountLayer, image: str, want: Want) -> None:
        """Where the layer's folder was deleted under us: have it made anew, and read from that."""
        layer = self._layers.get((ask.layer, ask.ztoc))
        if layer is None or await asyncio.to_thread(layer.content.reader.current):
            return
        prepare = PrepareLayer(image, ask.layer, None, ask.ztoc, layer.content.reader.ztoc_size)
        await self._ask_spans(prepare, want.timeout, want.trace)
        await self._finish(self._reopen(ask, layer))

    async def _reopen(self, ask: MountLayer, layer: _Layer) -> None:
        async with self._locks.hold((ask.layer, ask.ztoc)):
            if await asyncio.to_thread(layer.content.reader.current):  # another read's try was faster
                return
            reader = await asyncio.to_thread(self._place.store.prepare, ask.layer, ask.ztoc, None)
            reader.forget_table()
            if layer.content.closed:
                reader.close()
            else:
                layer.content.renew(reader)

    async def _close(self, ask: MountLayer) -> None:
        key = (ask.layer, ask.ztoc)
        layer = self._layers[key]
        layer.images.remove(ask.image)
        if not layer.images:
            del self._layers[key]
            await layer.content.close()


def _link(path: Path, to: Path) -> None:
    """Have ``path`` lead to ``to``, whatever it was before."""
    draft = path.with_name(f".{path.name}")
    try:
        draft.unlink(missing_ok=True)
        draft.symlink_to(to)
        if not path.is_symlink():  # where it leads may be a dead mount, which is not to be looked at
            with suppress(FileNotFoundError):
                path.rmdir()
        draft.replace(path)
    except OSError as error:
        raise Unavailable(f"{path} cannot be made: {error}") from error
