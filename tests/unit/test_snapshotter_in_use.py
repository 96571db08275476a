# SPDX-License-Identifier: Apache-2.0
"""What the snapshotter says of the lazy layers that are in use."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest

from soci.digest import Digest, sha256_digest
from soci.errors import SociError
from soci_bus.asks import CacheFreed, FreeCache, LayersInUse, LayersUsed, UsedLayer
from soci_bus.memory import MemoryBus
from soci_runtime.flights import Flights
from soci_snapshotter import in_use, labels
from soci_snapshotter.in_use import InUse, layers_of, page_of
from soci_snapshotter.state import Snapshot
from soci_snapshotter.store import SnapshotStore


def digest(number: int) -> Digest:
    return sha256_digest(str(number).encode())


def said(number: int, image: str = "r/i:1", ztoc: int = 0) -> Mapping[str, str]:
    return {
        "containerd.io/snapshot/cri.image-ref": image,
        "containerd.io/snapshot/cri.manifest-digest": digest(-1),
        "containerd.io/snapshot/cri.layer-digest": digest(number),
        labels.REMOTE: labels.REMOTE_VALUE,
        labels.ZTOC: digest(1000 + number + ztoc),
        labels.ZTOC_SIZE: "77",
    }


def lazy(number: int, image: str = "r/i:1", ztoc: int = 0) -> Snapshot:
    return Snapshot(number, f"n{number}", "committed", "", said(number, image, ztoc), 0, 0)


def used(number: int, image: str = "r/i:1", ztoc: int = 0) -> UsedLayer:
    return UsedLayer(image, digest(number), digest(1000 + number + ztoc), 77)


def test_each_lazy_layer_once() -> None:
    """Snapshots that show the same layer by the same zTOC are one; another zTOC is another; local ones are none."""
    local = Snapshot(9, "local", "committed", "", {}, 0, 0)
    found = layers_of([lazy(1), local, lazy(1, "r/j:2"), lazy(2), lazy(2, ztoc=5)])
    assert sorted(found, key=lambda one: (one.layer, one.ztoc)) == found
    assert set(found) == {used(1), used(2), used(2, ztoc=5)}


@pytest.mark.parametrize("name", [labels.ZTOC, "containerd.io/snapshot/cri.layer-digest"])
def test_a_lazy_snapshot_without_its_layer_is_an_error(name: str) -> None:
    """To pass over it would say that its bytes may go."""
    broken = {**said(1), name: "nonsense"}
    with pytest.raises(SociError, match="n1"):
        layers_of([Snapshot(1, "n1", "committed", "", broken, 0, 0)])


@pytest.mark.parametrize(("page", "size"), [(1, 1 << 20), (3, 1 << 20), (100, 1), (100, 700), (5, 1 << 20)])
def test_pages_are_all_layers(monkeypatch: pytest.MonkeyPatch, page: int, size: int) -> None:
    """However they are cut, all pages together are all layers, each once, and of one generation."""
    monkeypatch.setattr(in_use, "PAGE_LAYERS", page)
    monkeypatch.setattr(in_use, "PAGE_BYTES", size)
    layers = layers_of([lazy(number) for number in range(10)])
    pages = [page_of(layers, "")]
    while pages[-1].next:
        pages.append(page_of(layers, pages[-1].next))
        assert len(pages) <= 10
    assert [one for found in pages for one in found.layers] == layers
    assert len({found.generation for found in pages}) == 1
    assert all(found.layers for found in pages)


def test_the_generation_is_the_layers_own() -> None:
    """It changes with the set of layers, and with nothing else; none at all is an answer too."""
    layers = layers_of([lazy(1), lazy(2)])
    assert page_of(layers, "").generation == page_of(layers_of([lazy(2), lazy(1), lazy(1)]), "").generation
    assert page_of(layers, "").generation != page_of(layers[:1], "").generation
    assert page_of([], "") == LayersUsed((), page_of([], "zzz").generation)


async def test_the_answer_comes_from_the_records(tmp_path: Path) -> None:
    """A committed lazy layer is in use until its snapshot is removed."""
    path = tmp_path / "metadata.db"
    bus = MemoryBus("n")
    with closing(SnapshotStore(path)) as store:
        async with Flights() as flights:
            await InUse(path, bus, flights).serve()
            store.prepare("k", "", "active", {}, lambda _: None)
            assert (await bus.ask(LayersInUse(), timeout=5)).layers == ()
            store.commit("n", "k", said(3))
            assert (await bus.ask(LayersInUse(), timeout=5)).layers == (used(3),)
            store.remove("n")
            assert (await bus.ask(LayersInUse(), timeout=5)).layers == ()


async def test_word_of_unused_layers_waits_for_nobody(tmp_path: Path) -> None:
    """A fetcher hears it, once for several at a time; without one it is passed over in silence."""
    bus = MemoryBus("n")
    heard: list[FreeCache] = []
    done = asyncio.Event()

    async def free(ask: FreeCache, _context: object) -> CacheFreed:
        heard.append(ask)
        done.set()
        return CacheFreed()

    async with Flights() as flights:
        one = InUse(tmp_path / "none.db", bus, flights)
        one.freed()  # nobody serves it
        while one._telling:
            await asyncio.sleep(0.001)
        await bus.serve(FreeCache, free)
        one.freed()
        one.freed()
        await asyncio.wait_for(done.wait(), 10)
    assert heard == [FreeCache(wait=False)]
