# SPDX-License-Identifier: Apache-2.0
"""Whole things from the registry: zTOCs into the span cache, layer blobs into files, an image's configuration."""

from __future__ import annotations

import asyncio
import errno
import secrets
import time
from collections.abc import Callable
from contextlib import aclosing, suppress
from io import RawIOBase
from pathlib import Path

from soci.digest import Digest, hex_of
from soci.errors import InvalidManifest, InvalidZtoc, LimitExceeded, Mismatch, NotFound, SociError, Unavailable
from soci.oci import Manifest, parse_config, parse_manifest
from soci.toc import Ztoc
from soci.ztoc import parse_ztoc
from soci_bus.asks import FetchLayer, ImageConfig, LayerFetched, LayerPrepared, PrepareLayer, ReadImageConfig
from soci_bus.events import NO_LAUNCH, Event, FetchFailed, LayerArrived
from soci_bus.face import Context
from soci_cache import LayerStore
from soci_cache.store import ZTOC_LIMIT
from soci_fetcher.flights import in_thread
from soci_registry import Registry

CONFIG_LIMIT = 8 << 20
"""Bytes of an image's config blob."""
CONCURRENT_LAYERS = 3
"""Whole layers that come at a time."""
WHOLE_STALE = 3600.0
"""Seconds after which a whole layer's file that nobody took is deleted."""


class LayerFetcher:
    """Answers `PrepareLayer`, `FetchLayer` and `ReadImageConfig`. One a process."""

    def __init__(self, store: LayerStore, registry: Registry, publish: Callable[[Event], None], scratch: Path) -> None:
        self._store = store
        self._registry = registry
        self._publish = publish
        self._scratch = scratch
        self._permits = asyncio.Semaphore(CONCURRENT_LAYERS)

    async def prepare(self, ask: PrepareLayer, _context: Context) -> LayerPrepared:
        """The zTOC is in the cache, checked against digest and layer; from the cache alone where it is here."""
        try:
            return await in_thread(self._prepared, ask, None)
        except NotFound:
            pass
        if not 0 < ask.ztoc_size <= ZTOC_LIMIT:
            raise LimitExceeded(f"zTOC {ask.ztoc} of {ask.ztoc_size} bytes; at most {ZTOC_LIMIT} are allowed")
        content = await self._registry.repository(ask.image).blob(ask.ztoc, limit=ask.ztoc_size)
        if len(content) != ask.ztoc_size:
            raise Mismatch(f"zTOC {ask.ztoc} has {len(content)} bytes, not {ask.ztoc_size} as its index says")
        return await in_thread(self._prepared, ask, content)

    def _prepared(self, ask: PrepareLayer, content: bytes | None) -> LayerPrepared:
        if content is not None:
            _check_size(parse_ztoc(content), ask)  # before there is a folder of it
        with self._store.prepare(ask.layer, ask.ztoc, content) as reader:
            _check_size(reader.ztoc, ask)
            return LayerPrepared(str(reader.directory), reader.spans.count, reader.present_count())

    async def fetch(self, ask: FetchLayer, context: Context) -> LayerFetched:
        """The blob as a file of this node; the registry client checks its digest before the end is reached."""
        launch = context.trace.launch if context.trace else NO_LAUNCH
        begun = time.monotonic()
        try:
            async with self._permits:
                path, size = await self._whole(ask)
        except SociError as error:
            self._publish(FetchFailed(launch, ask.layer, "the whole layer", str(error)))
            raise
        self._publish(LayerArrived(launch, ask.layer, size, time.monotonic() - begun))
        return LayerFetched(str(path), size)

    async def _whole(self, ask: FetchLayer) -> tuple[Path, int]:
        stream = self._registry.repository(ask.image).blob_stream(ask.layer)
        path = self._scratch / f"{hex_of(ask.layer)}.{secrets.token_hex(4)}"
        size = 0
        try:
            async with aclosing(stream) as chunks:
                await in_thread(self._make_scratch)
                with path.open("xb", buffering=0) as file:
                    async for chunk in chunks:
                        size += len(chunk)
                        await in_thread(_write_all, file, chunk)
        except OSError as error:
            path.unlink(missing_ok=True)
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise LimitExceeded(f"the disk of the span cache is full: {path.parent}") from error
            raise Unavailable(f"the span cache takes no whole layer: {error}") from error
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path, size

    def _make_scratch(self) -> None:
        self._scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in self._scratch.iterdir():
            with suppress(FileNotFoundError):  # another fetcher tidies up too
                if path.stat().st_mtime < time.time() - WHOLE_STALE:
                    path.unlink()

    async def read_config(self, ask: ReadImageConfig, _context: Context) -> ImageConfig:
        """The image's layers and their diff_ids."""
        repository = self._registry.repository(ask.image)
        manifest = parse_manifest((await repository.manifest(ask.manifest)).content)
        if not isinstance(manifest, Manifest):
            raise InvalidManifest(f"{ask.manifest} is an image index, not an image manifest")
        config = parse_config(await repository.blob(manifest.config.digest, limit=CONFIG_LIMIT))
        if len(config.diff_ids) != len(manifest.layers):
            raise InvalidManifest(
                f"{ask.image}: {len(manifest.layers)} layers, but the config lists {len(config.diff_ids)} diff_ids"
            )
        digests: tuple[Digest, ...] = tuple(layer.digest for layer in manifest.layers)
        return ImageConfig(digests, tuple(layer.media_type for layer in manifest.layers), config.diff_ids)


def _write_all(file: RawIOBase, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[file.write(view) or 0 :]


def _check_size(ztoc: Ztoc, ask: PrepareLayer) -> None:
    """A zTOC of another layer is told by the size it was made for, where the client named the layer's size."""
    if ask.layer_size is not None and ztoc.compressed_size != ask.layer_size:
        raise InvalidZtoc(
            f"zTOC {ask.ztoc} is for a blob of {ztoc.compressed_size} bytes; {ask.layer} has {ask.layer_size}"
        )
