# SPDX-License-Identifier: Apache-2.0
"""Layers to snapshots, from the lowest up: shown by a remote snapshotter where it can, downloaded where it cannot.

The order is containerd's own. Prepare offers the layer by its labels; ALREADY_EXISTS says that the snapshot is there
and nothing needs to be downloaded. The first Prepare that answers mounts instead starts the download of that
layer and all above it, `PARALLEL_DOWNLOADS` at a time, while they are unpacked one upon the other.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Final

from soci.digest import Digest
from soci.errors import AlreadyExists, Mismatch, NotFound, SociError, Unavailable
from soci.launch import TraceParent
from soci.oci import Descriptor
from soci_cli.border import first_error
from soci_cli.labels import REMOTE, remote_labels
from soci_cli.resolve import Resolved
from soci_containerd import Client, Mount
from soci_registry import Repository

PARALLEL_DOWNLOADS: Final = 3
PREPARE_TRIES: Final = 3
"""How often Prepare may say that a snapshot exists which then cannot be found."""

LAZY: Final = "lazy"
WHOLE: Final = "unpacked by the snapshotter"
HERE: Final = "here already"
DOWNLOADED: Final = "downloaded"


@dataclass(frozen=True, slots=True)
class LayerDone:
    """How a layer came: `LAZY`, `WHOLE`, `HERE` or `DOWNLOADED`; ``seconds`` until its snapshot was there."""

    number: int
    of: int
    layer: Descriptor
    how: str
    seconds: float


Report = Callable[[LayerDone], None]


def extract_key(chain: Digest) -> str:
    """The key of a layer's active snapshot, in the form that containerd's own unpacker uses."""
    return f"extract-{time.time_ns()}-{secrets.token_urlsafe(3)} {chain}"


class _Downloads:
    """Blobs on their way into the content store; each is begun at most once."""

    def __init__(self, group: asyncio.TaskGroup, client: Client, repository: Repository) -> None:
        self._group = group
        self._client = client
        self._repository = repository
        self._places = asyncio.Semaphore(PARALLEL_DOWNLOADS)
        self._running: dict[Digest, asyncio.Task[None]] = {}

    def begin(self, layers: tuple[Descriptor, ...]) -> None:
        for layer in layers:
            if layer.digest not in self._running:
                self._running[layer.digest] = self._group.create_task(self._download(layer))

    async def wait(self, layer: Descriptor) -> None:
        await self._running[layer.digest]

    async def _download(self, layer: Descriptor) -> None:
        async with self._places, aclosing(self._repository.blob_stream(layer.digest)) as chunks:
            await self._client.content.write(layer, chunks, {})


@dataclass(frozen=True, slots=True)
class Unpacker:
    """One image on its way into one snapshotter."""

    client: Client
    repository: Repository
    image: Resolved
    snapshotter: str
    trace: TraceParent

    async def run(self, report: Report) -> None:
        """Bring every layer's snapshot into being; ``report`` hears of each when it is there."""
        try:
            async with asyncio.TaskGroup() as group:
                downloads = _Downloads(group, self.client, self.repository)
                for number, layer in enumerate(self.image.layers):
                    began = time.monotonic()
                    how = await self._layer(number, downloads)
                    report(LayerDone(number, len(self.image.layers), layer, how, time.monotonic() - began))
        except BaseExceptionGroup as group_error:
            raise first_error(group_error) from group_error

    async def _layer(self, number: int, downloads: _Downloads) -> str:
        image, snapshots = self.image, self.client.snapshots(self.snapshotter)
        chain = image.chains[number]
        parent = image.chains[number - 1] if number else ""
        manifest = image.manifest.descriptor.digest
        labels = remote_labels(image.name, manifest, image.layers, number, chain=chain, trace=self.trace)
        was_here = await self._stat(chain) is not None
        for _ in range(PREPARE_TRIES):
            key = extract_key(chain)
            try:
                mounts = await snapshots.prepare(key, parent, labels)
            except AlreadyExists:
                found = await self._stat(chain)
                if found is None:
                    continue
                return HERE if was_here else LAZY if REMOTE in found else WHOLE
            downloads.begin(image.layers[number:])
            try:
                return await self._apply(number, key, mounts, labels, downloads)
            except BaseException:
                await asyncio.shield(self._forget(key))
                raise
        raise Unavailable(f"{self.snapshotter} says that snapshot {chain} exists, and cannot find it")

    async def _apply(
        self, number: int, key: str, mounts: tuple[Mount, ...], labels: dict[str, str], downloads: _Downloads
    ) -> str:
        layer, chain = self.image.layers[number], self.image.chains[number]
        await downloads.wait(layer)
        applied = await self.client.diff.apply(layer, mounts)
        if applied.digest != self.image.parsed.diff_ids[number]:
            raise Mismatch(f"layer {layer.digest} unpacks to {applied.digest}, not to its diff id")
        try:
            await self.client.snapshots(self.snapshotter).commit(chain, key, labels)
        except AlreadyExists:  # another pull was faster
            await self._forget(key)
        return DOWNLOADED

    async def _stat(self, chain: Digest) -> dict[str, str] | None:
        try:
            return dict((await self.client.snapshots(self.snapshotter).stat(chain)).labels)
        except NotFound:
            return None

    async def _forget(self, key: str) -> None:
        with suppress(SociError):  # the lease's end frees it too
            await self.client.snapshots(self.snapshotter).remove(key)
