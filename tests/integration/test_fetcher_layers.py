# SPDX-License-Identifier: Apache-2.0
"""Whole things out of a real registry: zTOCs into the cache, layers into files, an image's configuration."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from soci.digest import Digest, sha256_digest
from soci.errors import (
    InvalidManifest,
    InvalidZtoc,
    LimitExceeded,
    Mismatch,
    NotFound,
    SociError,
    Unavailable,
)
from soci_bus.asks import FetchLayer, LayerPrepared, PrepareLayer, ReadImageConfig
from soci_bus.events import FetchFailed, LayerArrived
from soci_cache.arriving import ArrivingWriter
from soci_dev import image
from soci_dev.faults import Corrupt, Drop, Status, always, first
from soci_dev.proxy import Proxy
from soci_fetcher import layers
from support.bus import LAUNCH
from support.fetching import CONTEXT, GZIP, PATIENCE, fetching, push_layer, small_image, spans_of
from support.images import noise
from support.mounter_layers import Made, item, make


@pytest.fixture(scope="module")
def made() -> Made:
    """A layer whose blob comes in several chunks."""
    return make([item("a", noise(3, 3_000_000))], span_size=1 << 18)


@pytest.fixture
async def reference(registry: str, proxy: Proxy, made: Made) -> str:
    """The layer in the registry, seen through the proxy."""
    name = await push_layer(registry, made)
    proxy.reset()
    return f"{proxy.address}/{name}:1"


def prepare(reference: str, made: Made, **changes: Any) -> PrepareLayer:
    size = made.ztoc.compressed_size
    return replace(PrepareLayer(reference, made.layer, size, made.ztoc_digest, len(made.ztoc_bytes)), **changes)


# --- zTOCs


async def test_a_layer_is_prepared_once(tmp_path: Path, proxy: Proxy, reference: str, made: Made) -> None:
    """The answer says where and how many spans; the second time no registry is asked, and what is here is counted."""
    async with fetching(tmp_path) as one:
        directory = str(one.store.directory(made.layer, made.ztoc_digest))
        count = len(made.ztoc.span_digests)
        assert await one.layers.prepare(prepare(reference, made), CONTEXT) == LayerPrepared(directory, count, 0)
        await one.spans.fetch(spans_of(reference, made, 1, 2), CONTEXT)
        proxy.reset()
        assert await one.layers.prepare(prepare(reference, made), CONTEXT) == LayerPrepared(directory, count, 2)
        unknown = prepare(reference, made, layer_size=None)
        assert (await one.layers.prepare(unknown, CONTEXT)).spans == count
        assert proxy.counts.requests == 0


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"layer_size": 1}, InvalidZtoc),
        ({"ztoc_size": -1}, LimitExceeded),
        ({"ztoc_size": 0}, LimitExceeded),
        ({"ztoc_size": 1 << 40}, LimitExceeded),
        ({"ztoc_size": 100}, LimitExceeded),
        ({"ztoc_size": 1 << 20 << 4}, Mismatch),
        ({"ztoc": Digest("sha256:" + "e" * 64)}, NotFound),
    ],
    ids=str,
)
async def test_a_ztoc_that_is_not_what_it_should_be(
    tmp_path: Path, reference: str, made: Made, changes: dict[str, Any], error: type[SociError]
) -> None:
    """A wrong size of layer or zTOC is refused, and nothing of it is kept."""
    async with fetching(tmp_path) as one:
        with pytest.raises(error):
            await one.layers.prepare(prepare(reference, made, **changes), CONTEXT)
    assert not list(tmp_path.glob("layers/*/*"))


async def test_a_wrong_size_is_refused_from_the_cache_too(tmp_path: Path, reference: str, made: Made) -> None:
    """A zTOC that is here for another layer's size is not shown as this one's."""
    async with fetching(tmp_path) as one:
        await one.layers.prepare(prepare(reference, made), CONTEXT)
        with pytest.raises(InvalidZtoc):
            await one.layers.prepare(prepare(reference, made, layer_size=1), CONTEXT)


@pytest.mark.parametrize("fault", [Corrupt(10), Drop(), Status(503)], ids=repr)
async def test_a_ztoc_damaged_on_its_way(
    tmp_path: Path, proxy: Proxy, reference: str, made: Made, fault: Corrupt | Drop | Status
) -> None:
    """Once: the next answer counts. Always: an error, and nothing is kept."""
    async with fetching(tmp_path, settings=replace(PATIENCE, tries=3, bad_answer_tries=2)) as one:
        proxy.hook = always(fault)
        with pytest.raises(Mismatch if isinstance(fault, Corrupt) else Unavailable):
            await one.layers.prepare(prepare(reference, made), CONTEXT)
        assert not list(tmp_path.glob("layers/*/*"))
        proxy.hook = first(1, fault)
        assert (await one.layers.prepare(prepare(reference, made), CONTEXT)).present == 0


async def test_a_blob_that_is_no_ztoc(tmp_path: Path, reference: str, made: Made) -> None:
    """Even with its right digest and size."""
    async with fetching(tmp_path) as one:
        junk = b"no zTOC" * 100
        await one.registry.repository(reference).push_blob(junk)
        with pytest.raises(InvalidZtoc):
            await one.layers.prepare(prepare(reference, made, ztoc=sha256_digest(junk), ztoc_size=len(junk)), CONTEXT)
    assert not list(tmp_path.glob("layers/*/*"))


async def test_a_ztoc_damaged_in_the_cache_is_fetched_again(tmp_path: Path, reference: str, made: Made) -> None:
    """And the spans that are here stay."""
    async with fetching(tmp_path) as one:
        await one.layers.prepare(prepare(reference, made), CONTEXT)
        await one.spans.fetch(spans_of(reference, made, 1, 2), CONTEXT)
        (one.store.directory(made.layer, made.ztoc_digest) / "ztoc").write_bytes(b"damaged")
        assert (await one.layers.prepare(prepare(reference, made), CONTEXT)).present == 2


# --- whole layers


async def test_a_whole_layer(tmp_path: Path, reference: str, made: Made) -> None:
    """The blob as a file of its own for each asker, readable by us alone."""
    async with fetching(tmp_path) as one:
        found = await asyncio.gather(*(one.layers.fetch(FetchLayer(reference, made.layer), CONTEXT) for _ in range(4)))
        assert len({answer.path for answer in found}) == 4
        for answer in found:
            assert Path(answer.path).read_bytes() == made.blob
            assert answer.size == len(made.blob)
        assert one.scratch.stat().st_mode & 0o77 == 0
        told = one.told(LayerArrived)
        assert {(event.id, event.layer, event.compressed_bytes) for event in told} == {
            (LAUNCH, made.layer, len(made.blob))
        }


@pytest.mark.parametrize(("fault", "error"), [(Corrupt(70_000), Mismatch), (Status(404), NotFound)], ids=repr)
async def test_a_whole_layer_that_does_not_come(
    tmp_path: Path, proxy: Proxy, reference: str, made: Made, fault: Corrupt | Status, error: type[SociError]
) -> None:
    """Its error is raised and told, and no file is left."""
    proxy.hook = always(fault)
    async with fetching(tmp_path) as one:
        with pytest.raises(error):
            await one.layers.fetch(FetchLayer(reference, made.layer), CONTEXT)
        assert [(event.id, event.what) for event in one.told(FetchFailed)] == [(LAUNCH, "the whole layer")]
    assert list(one.scratch.glob("*")) == []


async def test_a_whole_layer_that_nobody_wants_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str, made: Made
) -> None:
    """Cancelling leaves no file."""
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()
    write = ArrivingWriter.write

    def slow(writer: ArrivingWriter, offset: int, content: bytes) -> None:
        loop.call_soon_threadsafe(begun.set)
        write(writer, offset, content)

    monkeypatch.setattr(ArrivingWriter, "write", slow)
    async with fetching(tmp_path) as one:
        fetch = asyncio.ensure_future(one.layers.fetch(FetchLayer(reference, made.layer), CONTEXT))
        await begun.wait()
        fetch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetch
        assert list(one.scratch.iterdir()) == []


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, LimitExceeded), (errno.EIO, Unavailable)])
async def test_a_disk_that_refuses_a_whole_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str, made: Made, number: int, error: type[SociError]
) -> None:
    """`LimitExceeded` where it is full, `Unavailable` else; no file is left."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(ArrivingWriter, "write", refuse)
    async with fetching(tmp_path) as one:
        with pytest.raises(error) as caught:
            await one.layers.fetch(FetchLayer(reference, made.layer), CONTEXT)
        assert type(caught.value) is error
        assert list(one.scratch.iterdir()) == []


async def test_files_that_nobody_took_are_removed(tmp_path: Path, reference: str, made: Made) -> None:
    """After `WHOLE_STALE`; younger ones are somebody's."""
    async with fetching(tmp_path) as one:
        one.scratch.mkdir()
        for name, age in (("old", layers.WHOLE_STALE + 60), ("young", 60)):
            (one.scratch / name).write_bytes(b"x")
            when = (one.scratch / name).stat().st_mtime - age
            os.utime(one.scratch / name, (when, when))
        answer = await one.layers.fetch(FetchLayer(reference, made.layer), CONTEXT)
        assert sorted(path.name for path in one.scratch.iterdir()) == sorted(["young", Path(answer.path).name])


# --- an image's configuration


async def test_the_configuration(tmp_path: Path, registry: str) -> None:
    """Layers, media types and diff_ids in their order."""
    folder = tmp_path / "image"
    made = [image.add_layer(folder, [], gzip=gzip) for gzip in (True, False)]
    built = image.write_image(folder, made)
    image.push(built, registry, "c/" + built.digest[-12:], "1")
    async with fetching(tmp_path) as one:
        ask = ReadImageConfig(f"{registry}/c/{built.digest[-12:]}:1", Digest(built.digest))
        found = await one.layers.read_config(ask, CONTEXT)
    assert found.layers == tuple(layer.digest for layer in made)
    assert found.diff_ids == tuple(layer.diff_id for layer in made)
    assert found.media_types == (GZIP, GZIP.removesuffix("+gzip"))


async def test_a_configuration_that_contradicts_itself(tmp_path: Path, registry: str) -> None:
    """As many diff_ids as layers, or `InvalidManifest`."""
    built = small_image(tmp_path / "image")
    name = "c/" + built.digest[-12:]
    image.push(built, registry, name, "1")
    async with fetching(tmp_path) as one:
        repository = one.registry.repository(f"{registry}/{name}:1")
        content = json.dumps({**built.manifest, "layers": built.manifest["layers"][:1]}).encode()
        pushed = await repository.push_manifest(content, built.manifest["mediaType"])
        with pytest.raises(InvalidManifest, match="1 layers, but the config lists 2 diff_ids"):
            await one.layers.read_config(ReadImageConfig(f"{registry}/{name}:1", pushed.digest), CONTEXT)
        index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []}
        pushed = await repository.push_manifest(json.dumps(index).encode(), str(index["mediaType"]))
        with pytest.raises(InvalidManifest, match="image index"):
            await one.layers.read_config(ReadImageConfig(f"{registry}/{name}:1", pushed.digest), CONTEXT)
