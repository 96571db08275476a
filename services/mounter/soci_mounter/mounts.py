# SPDX-License-Identifier: Apache-2.0
"""The registry of mounts: what is asked to be shown, what is shown, and what a successor must show again.

Mounts of the same layer through the same zTOC share its tree, its files and its fetches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

from soci.errors import AlreadyExists, SociError, Unavailable
from soci.launch import LaunchId, TraceParent, new_traceparent
from soci.tree import LayerTree
from soci_bus.asks import FetchSpans, LayerMounted, MountLayer
from soci_cache import LayerReader, LayerStore
from soci_mounter.filesystem import FileSystem
from soci_mounter.flights import Want
from soci_mounter.headers import Headers
from soci_mounter.inherited import inherit
from soci_mounter.reader import LayerContent, Seams
from soci_mounter.records import Record, Records, check_ask, manner_of
from soci_runtime.turns import Turns

Result = TypeVar("Result")
AskSpans = Callable[[FetchSpans, float, TraceParent | None], Awaitable[object]]
"""Have spans filled: the ask, the seconds that it may take, its trace."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where things are, and how they are checked."""

    mounts: Path  # the FUSE mount point
    store: LayerStore
    records: Records
    verify_headers: bool = True


@dataclass(frozen=True, slots=True)
class News:
    """What the registry tells others. ``hidden`` gets the name of a directory that is gone from the root."""

    shown: Callable[[MountLayer, LayerTree, LayerReader, float, TraceParent | None], None]
    hidden: Callable[[str], None]


@dataclass(slots=True, eq=False)
class _Layer:
    """A layer that at least one mount shows."""

    tree: LayerTree
    content: LayerContent
    images: list[str]  # one a mount: from where its bytes may be fetched


class Mounts:
    """All mounts of this node. Used from one event loop."""

    def __init__(self, filesystem: FileSystem, place: Place, ask_spans: AskSpans, seams: Seams, news: News) -> None:
        self._filesystem = filesystem
        self._place = place
        self._ask_spans = ask_spans
        self._seams = seams
        self._news = news
        self._records: dict[str, Record] = {}
        self._layers: dict[tuple[str, str], _Layer] = {}
        self._locks = Turns()
        self._work: set[asyncio.Task[Any]] = set()
        self._sequence = 0

    async def restore(self) -> None:
        """Show again what the records of a predecessor say, without asking anybody.

        A mount that cannot be shown is forgotten, so that who wants it can have it mounted anew.
        """
        records, bad = await asyncio.to_thread(self._place.records.load)
        for path, error in bad:
            self._seams.trouble(f"{path} is not the record of a mount", error)
        for record in records:
            self._sequence = max(self._sequence, record.sequence)
            try:
                layer = await self._open(record.ask)
                self._show(record, layer)
            except SociError as error:
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
                    taken = await asyncio.to_thread(inherit, layer.tree, ask.lower, manner_of(ask).opaque)
                    self._sequence += 1
                    by_path = {layer.tree.path(node): attributes for node, attributes in taken.items()}
                    record = Record(ask, self._sequence, by_path)
                    await asyncio.to_thread(self._place.records.save, record)
                    self._show(record, layer)
                except BaseException:
                    await self._close(ask)
                    raise
                self._news.shown(ask, layer.tree, layer.content.reader, monotonic() - began, trace)
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
            self._filesystem.hide(mount)
            self._news.hidden(mount)
            await self._close(record.ask)

    def _show(self, record: Record, layer: _Layer) -> None:
        tree = layer.tree
        taken = {
            node: record.inherited[path] for node in tree.implied() if (path := tree.path(node)) in record.inherited
        }
        self._filesystem.show(record.ask.mount, tree, layer.content, taken, manner_of(record.ask))
        self._records[record.ask.mount] = record

    async def _open(self, ask: MountLayer) -> _Layer:
        key = (ask.layer, ask.ztoc)
        async with self._locks.hold(key):
            layer = self._layers.get(key)
            if layer is None:
                tree, reader, headers = await asyncio.to_thread(self._read, ask)
                images: list[str] = []
                layer = _Layer(tree, LayerContent(reader, self._fetch(ask, images), self._seams, headers), images)
                self._layers[key] = layer
            layer.images.append(ask.image)
            return layer

    def _read(self, ask: MountLayer) -> tuple[LayerTree, LayerReader, Headers | None]:
        """In a thread: a large layer's table of contents takes a while to read."""
        try:
            # Not `read`: after another boot the cache must be proven before it is believed.
            reader = self._place.store.prepare(ask.layer, ask.ztoc, None)
        except OSError as error:
            raise Unavailable(f"the span cache cannot be read: {error}") from error
        try:
            tree = LayerTree.of(reader.ztoc.entries)
            headers = Headers.of(reader.ztoc.entries) if self._place.verify_headers else None
        except BaseException:
            reader.close()
            raise
        return tree, reader, headers

    def _fetch(self, ask: MountLayer, images: list[str]) -> Callable[[Want], Awaitable[None]]:
        async def fetch(want: Want) -> None:
            # A layer may be gone from one repository and still be in another: each try asks the next image's.
            image = images[want.attempt % len(images)]
            spans = FetchSpans(image, ask.layer, ask.ztoc, want.first, want.last, want.why)
            await self._ask_spans(spans, want.timeout, want.trace)

        return fetch

    async def _close(self, ask: MountLayer) -> None:
        key = (ask.layer, ask.ztoc)
        layer = self._layers[key]
        layer.images.remove(ask.image)
        if not layer.images:
            del self._layers[key]
            await layer.content.close()
