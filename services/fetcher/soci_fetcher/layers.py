# SPDX-License-Identifier: Apache-2.0
"""Whole things from the registry: zTOCs into the span cache, layer blobs into files, an image's configuration."""

from __future__ import annotations

import errno
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from soci.digest import Digest, hex_of
from soci.errors import (
    InvalidInput,
    InvalidManifest,
    InvalidZtoc,
    LimitExceeded,
    Mismatch,
    NotFound,
    SociError,
    Unavailable,
)
from soci.oci import Manifest, parse_config, parse_manifest
from soci.toc import Ztoc
from soci.ztoc import parse_ztoc
from soci_bus.asks import FetchLayer, ImageConfig, LayerFetched, LayerPrepared, PrepareLayer, ReadImageConfig
from soci_bus.events import NO_LAUNCH, Event, FetchFailed, LayerArrived
from soci_bus.face import Context
from soci_cache import LayerStore
from soci_cache.arriving import announce, beside, forget
from soci_cache.store import ZTOC_LIMIT
from soci_fetcher.whole import Permits, WholeBlobs
from soci_registry import Registry
from soci_runtime.flights import in_thread

CONFIG_LIMIT = 8 << 20
"""Bytes of an image's config blob."""
WHOLE_STALE = 3600.0
"""Seconds after which a whole layer's file that nobody took is deleted."""

ZtocSource = Callable[[PrepareLayer], Awaitable[bytes | None]]
"""Gives a layer's zTOC, or None where it is in the cache by now."""


class LayerFetcher:
    """Answers `PrepareLayer`, `FetchLayer` and `ReadImageConfig`. One a process."""

    def __init__(  # noqa: PLR0913  its ways out, and the limits of whole layers
        self,
        store: LayerStore,
        registry: Registry,
        publish: Callable[[Event], None],
        scratch: Path,
        *,
        download_chunk: int = 0,
        max_downloads: int = -1,
        max_downloads_per_image: int = 3,
    ) -> None:
        """``scratch`` is where layers go whose asker names no file. Sizes are bytes; see `soci_fetcher.whole`."""
        self._store = store
        self._registry = registry
        self._publish = publish
        self._scratch = scratch
        self.ztocs: ZtocSource = self.ztoc  # a cluster's, where there is one
        permits = Permits(max_downloads, max_downloads_per_image)
        self._whole = WholeBlobs(registry, permits, chunk=download_chunk)

    async def prepare(self, ask: PrepareLayer, _context: Context) -> LayerPrepared:
        """The zTOC is in the cache, checked against digest and layer; from the cache alone where it is here."""
        try:
            return await in_thread(self._prepared, ask, None)
        except NotFound:
            pass
        return await in_thread(self._prepared, ask, await self.ztocs(ask))

    async def prepare_alone(self, ask: PrepareLayer, _context: Context) -> LayerPrepared:
        """As `prepare`, from the registry whatever ``ztocs`` is: what another node asks of us goes no further."""
        return await in_thread(self._prepared, ask, await self.ztoc(ask))

    async def ztoc(self, ask: PrepareLayer) -> bytes:
        """The zTOC from the registry; that it has its digest is checked, that it is the layer's is not yet."""
        if not 0 < ask.ztoc_size <= ZTOC_LIMIT:
            raise LimitExceeded(f"zTOC {ask.ztoc} of {ask.ztoc_size} bytes; at most {ZTOC_LIMIT} are allowed")
        content = await self._registry.repository(ask.image).blob(ask.ztoc, limit=ask.ztoc_size)
        if len(content) != ask.ztoc_size:
            raise Mismatch(f"zTOC {ask.ztoc} has {len(content)} bytes, not {ask.ztoc_size} as its index says")
        return content

    def _prepared(self, ask: PrepareLayer, content: bytes | None) -> LayerPrepared:
        if content is not None:
            _check_size(parse_ztoc(content), ask)  # before there is a folder of it
        with self._store.prepare(ask.layer, ask.ztoc, content, ask.diff_id) as reader:
            _check_size(reader.ztoc, ask)
            return LayerPrepared(str(reader.directory), reader.spans.count, reader.present_count())

    async def fetch(self, ask: FetchLayer, context: Context) -> LayerFetched:
        """The blob as a file of this node, complete and of its digest."""
        launch = context.trace.launch if context.trace else NO_LAUNCH
        begun = time.monotonic()
        try:
            path, size = await (self._into(ask, Path(ask.path)) if ask.path else self._into_scratch(ask))
        except SociError as error:
            self._publish(FetchFailed(launch, ask.layer, "the whole layer", str(error)))
            raise
        self._publish(LayerArrived(launch, ask.layer, size, time.monotonic() - begun))
        return LayerFetched(str(path), size)

    async def _into(self, ask: FetchLayer, path: Path) -> tuple[Path, int]:
        if not path.is_absolute() or ".." in path.parts:
            raise InvalidInput(f"not a file for a layer: {ask.path[:200]!r}")
        try:
            return path, await self._whole.bring(ask.image, ask.layer, ask.size, path)
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise LimitExceeded(f"the disk for whole layers is full: {path.parent}") from error
            raise Unavailable(f"{path.parent} takes no whole layer: {error}") from error

    async def _into_scratch(self, ask: FetchLayer) -> tuple[Path, int]:
        path = self._scratch / f"{hex_of(ask.layer)}.{secrets.token_hex(4)}"
        try:
            await in_thread(self._make_scratch)
            await in_thread(announce, path)
            found = await self._into(ask, path)
            await in_thread(beside(path).unlink)
        except OSError as error:
            raise Unavailable(f"{self._scratch} takes no whole layer: {error}") from error
        except BaseException:
            forget(path)
            raise
        return found

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
        media_types = tuple(layer.media_type for layer in manifest.layers)
        return ImageConfig(digests, media_types, config.diff_ids, tuple(layer.size for layer in manifest.layers))


def _check_size(ztoc: Ztoc, ask: PrepareLayer) -> None:
    """A zTOC of another layer is told by the size it was made for, where the client named the layer's size."""
    if ask.layer_size is not None and ztoc.compressed_size != ask.layer_size:
        raise InvalidZtoc(
            f"zTOC {ask.ztoc} is for a blob of {ztoc.compressed_size} bytes; {ask.layer} has {ask.layer_size}"
        )
