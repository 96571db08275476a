# SPDX-License-Identifier: Apache-2.0
"""The keeper of the span cache, over a real cache and a bus in memory."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from soci.digest import Digest, sha256_digest
from soci.errors import InvalidMessage, Unavailable
from soci_bus.asks import FreeCache, LayersInUse, LayersUsed, UsedLayer
from soci_bus.events import LayerCompleted, LayerRefused, SpaceFreed
from soci_bus.in_use import TRIES, layers_in_use
from soci_bus.memory import MemoryBus
from soci_cache import LayerStore
from soci_cache.presence import FILLED
from soci_cache.survey import survey
from soci_fetcher import keeper as module
from soci_fetcher.keeper import Keeper, keeping
from support.mounter_layers import Made, item, make, noise

LIMIT = 20.0


@pytest.fixture(scope="module")
def layers() -> list[Made]:
    return [make([item("a", noise(300_000, seed))]) for seed in range(2)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds follow one another without a pause."""
    monkeypatch.setattr(module, "PAUSE", 0.01)


class Node:
    """A bus whose snapshotter says what is in use, and a cache."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.bus = MemoryBus("n")
        self.in_use: list[Made] = []
        self.keeper: Keeper

    async def answer(self, _ask: LayersInUse, _context: object) -> LayersUsed:
        used = (UsedLayer("r/i", one.layer, one.ztoc_digest, len(one.ztoc_bytes)) for one in self.in_use)
        return LayersUsed(tuple(used), "g")

    def bring(
        self, made: Made, said: Digest | None = None, *, spans: int = 99, mark: int = 1, new: bool = False
    ) -> None:
        """What a fetcher does, beside the keeper."""
        store = LayerStore(self.cache, room=self.keeper.make_room, told=self.keeper.told)
        store.prepare(made.layer, made.ztoc_digest, made.ztoc_bytes, said).close()
        with store.write(made.layer, made.ztoc_digest) as writer:
            last = writer.spans.count - 1
            for span in range(min(spans, last + 1)):
                start, end = writer.spans.uncompressed(span)
                writer.fill_pieces(span, (made.tar[start : end if span < last else None],), mark, tail=True)
        if not new:
            os.utime(store.directory(made.layer, made.ztoc_digest), (1, 1))

    def here(self) -> dict[Digest, str]:
        return {one.layer: one.state for one in survey(self.cache)}

    def heard(self, kind: type[Any]) -> list[Any]:
        return [one.event for one in self.bus.events if isinstance(one.event, kind)]


@asynccontextmanager
async def node(tmp_path: Path, budget: int = 1 << 40, *, serving: bool = True, **options: Any) -> AsyncIterator[Node]:
    one = Node(tmp_path / "cache")
    if serving:
        await one.bus.serve(LayersInUse, one.answer)
    async with keeping(one.cache, one.bus, budget=budget, **options) as one.keeper:
        await one.bus.serve(FreeCache, one.keeper.free)
        yield one


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT):
        while not true():
            await asyncio.sleep(0.01)


async def test_a_whole_layer_is_proven(tmp_path: Path, layers: list[Made]) -> None:
    """As soon as its last span is here; what comes of it is an event."""
    async with node(tmp_path) as one:
        one.in_use = layers
        await asyncio.to_thread(one.bring, layers[0], sha256_digest(layers[0].tar))
        await asyncio.to_thread(one.bring, layers[1], sha256_digest(b"another"))
        await until(lambda: set(one.here().values()) == {"complete", "rejected"})
        await until(lambda: bool(one.heard(LayerRefused)))
        (completed,), (refused,) = one.heard(LayerCompleted), one.heard(LayerRefused)
    assert (completed.layer, completed.proven, completed.size) == (
        layers[0].layer,
        True,
        layers[0].ztoc.uncompressed_size,
    )
    assert refused.layer == layers[1].layer
    assert str(layers[1].ztoc_digest) in refused.why


async def test_a_layer_whose_prover_was_killed_is_proven_later(tmp_path: Path, layers: list[Made]) -> None:
    """The next keeper finds it."""
    async with node(tmp_path) as one:
        one.in_use = layers
        one.keeper._to_prove = lambda key: None  # type: ignore[method-assign]
        await asyncio.to_thread(one.bring, layers[0], sha256_digest(layers[0].tar))
        assert one.here() == {layers[0].layer: "filling"}
    async with node(tmp_path, serving=False) as one:
        await until(lambda: one.here() == {layers[0].layer: "complete"})


async def test_what_is_unused_goes_when_told(tmp_path: Path, layers: list[Made]) -> None:
    """Word that snapshots went is enough; nobody waits, what is in use stays."""
    async with node(tmp_path) as one:
        one.in_use = list(layers)
        for made in layers:
            await asyncio.to_thread(one.bring, made, spans=1)
        await one.bus.ask(FreeCache(), timeout=LIMIT)
        assert len(one.here()) == 2
        one.in_use = layers[1:]
        assert (await one.bus.ask(FreeCache(wait=False), timeout=LIMIT)).layers == ()
        await until(lambda: list(one.here()) == [layers[1].layer])
        await until(lambda: bool(one.heard(SpaceFreed)))
        (event,) = one.heard(SpaceFreed)
        assert (event.why, event.layers, event.spans, event.over) == ("unused", 1, 0, 0)


async def test_a_new_layer_goes_once_its_grace_is_over(tmp_path: Path, layers: list[Made]) -> None:
    """It is not in use yet, because its pull is under way; the keeper comes back for it by itself."""
    async with node(tmp_path, grace=1.0) as one:
        await asyncio.to_thread(one.bring, layers[0], spans=1, new=True)
        answer = await one.bus.ask(FreeCache(), timeout=LIMIT)
        assert answer.layers == ()
        one.keeper._round.set()
        await until(lambda: not one.here())


async def test_while_the_snapshotter_is_away_nothing_goes(tmp_path: Path, layers: list[Made]) -> None:
    """Who asks is told why."""
    async with node(tmp_path, budget=1, serving=False) as one:
        await asyncio.to_thread(one.bring, layers[0], spans=2)
        answer = await one.bus.ask(FreeCache(at_once=True), timeout=LIMIT)
        assert (answer.layers, answer.spans) == ((), 0)
        assert "in use" in answer.incomplete
        assert len(one.here()) == 1
        await one.bus.serve(LayersInUse, one.answer)
        answer = await one.bus.ask(FreeCache(at_once=True), timeout=LIMIT)
        assert answer.layers == ((layers[0].layer, layers[0].ztoc_digest),)
        assert answer.incomplete == ""


async def test_a_fill_above_the_budget_is_seen_at_once(tmp_path: Path, layers: list[Made]) -> None:
    """Room is made without the next round being waited for; that it was crossed is an event."""
    async with node(tmp_path, budget=600_000) as one:
        one.in_use = layers
        await until(lambda: one.keeper.room > 0)
        assert one.keeper.room <= 540_000
        for made in layers:
            await asyncio.to_thread(one.bring, made, mark=FILLED)
        await until(lambda: bool(one.heard(SpaceFreed)))
        event = one.heard(SpaceFreed)[-1]
        assert event.why == "budget"
        assert event.spans > 0
        assert event.budget == 600_000


async def test_what_cannot_be_freed_is_told_once(tmp_path: Path, layers: list[Made]) -> None:
    """Not in each round anew."""
    async with node(tmp_path, budget=1) as one:
        one.in_use = layers
        await asyncio.to_thread(one.bring, layers[0], spans=2)
        for _ in range(3):
            await one.bus.ask(FreeCache(), timeout=LIMIT)
        over = [event for event in one.heard(SpaceFreed) if not event.freed]
        assert len(over) <= 1
        assert one.heard(SpaceFreed)[-1].over > 0
        assert one.keeper.room == 0


async def test_a_dry_run_tells_and_does_nothing(tmp_path: Path, layers: list[Made]) -> None:
    """Neither folders nor events."""
    async with node(tmp_path) as one:
        await asyncio.to_thread(one.bring, layers[0], spans=1, new=True)
        answer = await one.bus.ask(FreeCache(at_once=True, dry_run=True), timeout=LIMIT)
        assert len(answer.layers) == 1
        assert len(one.here()) == 1
        assert one.heard(SpaceFreed) == []


async def test_a_full_disk_makes_room(tmp_path: Path, layers: list[Made], monkeypatch: pytest.MonkeyPatch) -> None:
    """The fill goes on in the room of others' spans, and an event says so."""
    async with node(tmp_path) as one:
        one.in_use = layers
        await asyncio.to_thread(one.bring, layers[0], mark=FILLED)
        real, full = os.pwrite, [True]

        def pwrite(descriptor: int, data: bytes, offset: int) -> int:
            if full:
                full.pop()
                raise OSError(28, "No space left on device")
            return real(descriptor, data, offset)

        monkeypatch.setattr(os, "pwrite", pwrite)
        await asyncio.to_thread(one.bring, layers[1], spans=1)
        await until(lambda: any(event.why == "disk-full" for event in one.heard(SpaceFreed)))
        assert one.here()[layers[0].layer] == "lazy"


# --- the pages of what is in use


def page(*numbers: int, generation: str = "g", after: str = "") -> LayersUsed:
    used = (UsedLayer("i", sha256_digest(bytes([number])), sha256_digest(b"z"), 1) for number in numbers)
    return LayersUsed(tuple(used), generation, after)


@pytest.mark.parametrize(
    ("pages", "count"),
    [
        ([page()], 0),
        ([page(1, 2)], 2),
        ([page(1, after="a"), page(2, 3, after="b"), page(4)], 4),
        ([page(1, after="a"), page(2, generation="other"), page(1), page()], 1),
    ],
)
async def test_pages_become_one_answer(pages: list[LayersUsed], count: int) -> None:
    """Where a page is of another generation, all are asked for anew."""
    bus, left = MemoryBus("n"), list(pages)

    async def answer(_ask: LayersInUse, _context: object) -> LayersUsed:
        return left.pop(0)

    await bus.serve(LayersInUse, answer)
    assert len(await layers_in_use(bus)) == count


@pytest.mark.parametrize(
    ("pages", "error"),
    [
        ([page(1, after="a"), page(2, generation="other")] * TRIES, Unavailable),
        ([page(1, after="a"), page(2, after="a")], InvalidMessage),
    ],
)
async def test_a_part_is_never_the_whole(pages: list[LayersUsed], error: type[Exception]) -> None:
    """Pages that never agree, or never end, are no answer."""
    bus, left = MemoryBus("n"), list(pages)

    async def answer(_ask: LayersInUse, _context: object) -> LayersUsed:
        return left.pop(0)

    await bus.serve(LayersInUse, answer)
    with pytest.raises(error):
        await layers_in_use(bus)
