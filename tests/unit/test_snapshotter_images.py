# SPDX-License-Identifier: Apache-2.0
"""What is asked about an image, how often, and what is begun ahead of time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from soci.digest import Digest, sha256_digest
from soci.errors import NoIndex, Unavailable
from soci.launch import TraceParent, parse_traceparent
from soci.oci import OCI_LAYER_GZIP
from soci_bus import asks
from soci_bus.face import Context
from soci_bus.memory import MemoryBus
from soci_cache import LayerStore
from soci_runtime.flights import Flights
from soci_snapshotter.estimate import Link, Need
from soci_snapshotter.history import History
from soci_snapshotter.images import IMAGE_TTL, Images
from soci_snapshotter.labels import RemoteLabels
from soci_snapshotter.mode import Lazy, Rules, Whole, choose
from soci_snapshotter.whole import WantedLayer

MANIFEST, INDEX, ZTOC = (sha256_digest(text) for text in (b"manifest", b"index", b"ztoc"))
LAYERS = tuple(sha256_digest(bytes([number])) for number in range(5))
SMALL, BIG = 1000, 500_000_000
TRACE = parse_traceparent("00-" + "1" * 32 + "-" + "2" * 16 + "-01")
# layers 0, 2 and 4 have a zTOC; 2 is too small for it to pay
FOUND = asks.IndexFound(INDEX, "explicit", tuple(asks.IndexedLayer(LAYERS[at], ZTOC, 99) for at in (0, 2, 4)))
CONFIG = asks.ImageConfig(LAYERS, (OCI_LAYER_GZIP,) * 5, LAYERS, (BIG, BIG, SMALL, SMALL, BIG))


def labels(layer: int = 0) -> RemoteLabels:
    return RemoteLabels("r:5000/image:1", MANIFEST, LAYERS[layer], None, None, "k8s.io")


@dataclass
class World:
    """The images of a snapshotter, with fetchers and whole layers as a few lines each."""

    folder: Path
    flights: Flights
    rules: Rules = field(default_factory=Rules)
    bus: MemoryBus = field(default_factory=MemoryBus)
    asked: Counter[str] = field(default_factory=Counter)
    prepared: list[asks.PrepareLayer] = field(default_factory=list)
    begun: list[Digest] = field(default_factory=list)
    index: asks.IndexFound | Exception = FOUND
    config: asks.ImageConfig | Exception = CONFIG
    now: float = 0.0

    def __post_init__(self) -> None:
        self.history = History(self.folder / "history.db")
        self.images = self.made()

    def made(self) -> Images:
        return Images(
            self.bus,
            self.flights,
            self,
            self.history,
            LayerStore(self.folder / "cache"),
            self.rules,
            timeout=5.0,
            clock=lambda: self.now,
        )

    def begin(
        self,
        image: str,
        manifest: Digest,
        wanted: Sequence[WantedLayer],
        trace: TraceParent | None = None,
        *,
        namespace: str = "",
    ) -> None:
        assert (image, manifest, namespace) == ("r:5000/image:1", MANIFEST, "k8s.io")
        assert trace == TRACE
        self.begun += [one.layer for one in wanted]

    async def serve(self) -> None:
        await self.bus.serve(asks.FindIndex, self._answer("index"))
        await self.bus.serve(asks.ReadImageConfig, self._answer("config"))
        await self.bus.serve(asks.PrepareLayer, self._prepare)

    def _answer(self, name: str) -> Any:
        async def handler(_ask: Any, _context: Context) -> Any:
            self.asked[name] += 1
            answer = getattr(self, name)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return handler

    async def _prepare(self, ask: asks.PrepareLayer, _context: Context) -> asks.LayerPrepared:
        self.prepared.append(ask)
        return asks.LayerPrepared("x", 1, 0)

    async def mode(self, layer: int = 0) -> Any:
        assert TRACE
        ends = asyncio.get_running_loop().time() + 5.0
        _, facts = await self.images.facts(labels(layer), TRACE, ends, below=layer)
        await asyncio.sleep(0.01)  # what was begun ahead begins
        return choose(facts, self.rules)


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with Flights() as flights:
        world = World(tmp_path, flights)
        await world.serve()
        yield world
        world.history.close()


@pytest.mark.asyncio
async def test_all_layers_share_one_look(world: World) -> None:
    """Index and manifest are asked for once a pull, also by layers that come at the same time."""
    modes = await asyncio.gather(*(world.mode(layer) for layer in range(5)))
    assert [type(mode) for mode in modes] == [Lazy, Whole, Whole, Whole, Lazy]
    assert world.asked == {"index": 1, "config": 1}


@pytest.mark.asyncio
async def test_what_follows_is_begun_at_the_first_layer(world: World) -> None:
    """Whole layers are begun in order, zTOCs of lazy ones are asked for, each once; the layer's own is not."""
    await world.mode(0)
    assert world.begun == [LAYERS[1], LAYERS[2], LAYERS[3]]
    assert [ask.layer for ask in world.prepared] == [LAYERS[4]]
    for layer in range(1, 5):
        await world.mode(layer)
    assert world.begun == [LAYERS[1], LAYERS[2], LAYERS[3]]
    assert [ask.layer for ask in world.prepared] == [LAYERS[4]]


@pytest.mark.asyncio
async def test_layers_below_are_left_alone(world: World) -> None:
    """containerd begins at the first layer it has not: nothing below that is brought."""
    await world.mode(3)
    assert world.begun == [LAYERS[3]]


@pytest.mark.asyncio
async def test_a_second_pull_is_looked_ahead_for_again(world: World) -> None:
    """An image that was removed and is pulled again soon comes as quickly as before; nothing below is brought."""
    for layer in range(5):
        await world.mode(layer)
    world.begun.clear()
    world.prepared.clear()
    await world.mode(0)
    await world.mode(1)
    assert world.begun == [LAYERS[1], LAYERS[2], LAYERS[3]]
    assert [ask.layer for ask in world.prepared] == [LAYERS[4]]


@pytest.mark.asyncio
async def test_a_long_pull_brings_nothing_twice(world: World) -> None:
    """When what is known of the image is asked anew in the middle, layers below are not begun again, though the same
    blob lies there, too."""
    twice = (LAYERS[1], LAYERS[2], LAYERS[1], LAYERS[3])
    types, sizes = (OCI_LAYER_GZIP,) * 4, (BIG,) * 4
    world.index, world.config = asks.IndexFound(INDEX, "explicit", ()), asks.ImageConfig(twice, types, twice, sizes)
    assert TRACE
    ends = asyncio.get_running_loop().time() + 5.0
    await world.images.facts(labels(1), TRACE, ends, below=0)
    assert world.begun == list(twice)
    world.begun.clear()
    world.now += IMAGE_TTL + 1
    await world.images.facts(labels(1), TRACE, ends, below=2)
    assert world.begun == [LAYERS[1], LAYERS[3]]


@pytest.mark.asyncio
async def test_each_layer_is_looked_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache's maps and the history are not read a second time for the layer that is called for."""
    looked: list[Digest] = []
    need = world.history.need

    def counted(layer: Digest) -> Need | None:
        looked.append(layer)
        return need(layer)

    monkeypatch.setattr(world.history, "need", counted)
    await world.mode()
    assert sorted(looked) == sorted(LAYERS[at] for at in (0, 2, 4))


@pytest.mark.asyncio
async def test_without_an_index_nothing_is_begun(world: World) -> None:
    """What is left to containerd is not downloaded twice."""
    world.index = NoIndex("none was pushed")
    mode = await world.mode()
    assert (mode.name, mode.why) == ("defer", "none was pushed")
    assert not world.begun
    assert not world.prepared


@pytest.mark.asyncio
async def test_without_an_index_all_come_whole_by_the_rule(world: World) -> None:
    """As the fallback, every layer is brought by us."""
    world.index, world.rules = NoIndex("none was pushed"), Rules(whole_without_index=True)
    world.images = world.made()
    assert (await world.mode()).name == "whole"
    assert world.begun == list(LAYERS)


@pytest.mark.asyncio
async def test_as_a_mode_of_its_own_no_index_is_looked_for(world: World) -> None:
    """With lazy loading off, no registry is asked for an index."""
    world.rules = Rules(always_whole=True)
    world.images = world.made()
    assert (await world.mode()).name == "whole"
    assert world.begun == list(LAYERS)
    assert world.asked == {"config": 1}


@pytest.mark.asyncio
async def test_failures_are_not_kept(world: World) -> None:
    """A failed look-up is made again for the next layer: how long it counts is the fetchers' to say."""
    world.index, world.config = NoIndex("not yet"), Unavailable("away")
    assert (await world.mode()).name == "defer"
    world.index, world.config = FOUND, CONFIG
    assert (await world.mode()).name == "lazy"


@pytest.mark.asyncio
async def test_a_manifest_that_cannot_be_had_stops_no_lazy_layer(world: World) -> None:
    """Without sizes the index alone decides."""
    world.config = Unavailable("away")
    assert (await world.mode(2)).name == "lazy"


@pytest.mark.asyncio
async def test_facts_are_asked_anew_after_a_while(world: World) -> None:
    """A later pull sees a new index."""
    await world.mode()
    world.now += IMAGE_TTL + 1
    await world.mode()
    assert world.asked == {"index": 2, "config": 2}


@pytest.mark.asyncio
async def test_links_are_remembered(world: World) -> None:
    """A fetcher that has seen nothing yet is helped by what was seen before."""
    world.index = asks.IndexFound(INDEX, "explicit", FOUND.layers, bytes_per_second=5e6, round_trip=0.03)
    await world.mode()
    assert world.history.link("r:5000") == Link(5e6, 0.03)
    world.index, world.images = FOUND, world.made()
    ends = asyncio.get_running_loop().time() + 5.0
    assert TRACE
    image, facts = await world.images.facts(labels(), TRACE, ends, below=0)
    assert image.link == facts.link == Link(5e6, 0.03)


@pytest.mark.asyncio
async def test_history_decides(world: World) -> None:
    """A layer of which earlier launches needed all, in many waits, comes whole."""
    world.history.saw_need(LAYERS[0], Need(1.0, 2000))
    mode = await world.mode()
    assert mode.name == "whole"
    assert "100% in 2000 runs" in mode.why
